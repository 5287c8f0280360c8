// Value: what a slot is worth is how often its expert saves the CPU a read. Frequencies are counted over several
// half-lives at once; ghost caches say which one suits the present work. Hysteresis, a second use before the first
// fill, a guard against thrashing and an allowance keep fills rare. Where steps wait for the device, as the slack of
// the layers says, one more expert there makes them longer: nothing is filled. Source: spec/scheduler.md 2.3 to 2.5.
#include <algorithm>

#include "scheduler/placement/scored_policy.h"
#include "scheduler/stats/ghost_cache.h"
#include "scheduler/stats/slack.h"

namespace thermocline::sched {
namespace {

constexpr size_t kFirstHalfLife = 1;  // 16 steps
constexpr int kStepsBetweenChoices = 256;
constexpr int kStepsBetweenLooks = 64;                    // at the slack
constexpr double kSwitchMargin = 0.05, kFillCost = 0.25;  // of a hit
constexpr double kLeastMargin = 1.15, kMostMargin = 2, kMarginUp = 1.5, kMarginDown = 0.9;
constexpr int kGuardFills = 512;
constexpr double kShareOfDemand = 0.25, kMostAllowance = 64;  // fills: of what fetching misses on demand would be
constexpr double kTwoUses = 1.25;                             // uses, the older one halved at most twice
constexpr double kPromptSteps = 16;                           // what a prompt's step counts for, at most
constexpr double kProfileUses = 2;  // what a profile counts for where an expert is used in every step

class ValuePolicy final : public ScoredPolicy {
 public:
  ValuePolicy(const PolicyOptions& o, bool eager)
      : ScoredPolicy(o), eager_(eager), counts_(scores_.size()), used_since_fill_(scores_.size(), -1) {
    if (o.costs) slack_.resize(static_cast<size_t>(o.layers));
    const float most = o.profile.empty() ? 0 : *std::max_element(o.profile.begin(), o.profile.end());
    for (size_t i = 0; most > 0 && i < o.profile.size(); ++i) counts_.use(i, kProfileUses * o.profile[i] / most);
    rescore();
    for (size_t h = 0; h < DecayedCounts::kCount; ++h)
      ghosts_.emplace_back(h, scores_.size(), static_cast<size_t>(o.slots));
  }

  void observe(const StepUses& step) override {
    const double steps = step.prefill ? std::min(kPromptSteps, static_cast<double>(step.tokens)) : 1;
    if (counts_.advance(steps)) {
      rescore();
      for (GhostCache& ghost : ghosts_) ghost.rebuild(counts_);
    }
    if (o_.costs) last_uses_.assign(step.uses.begin(), step.prefill ? step.uses.begin() : step.uses.end());
    times_of_one_ = step.prefill ? steps / static_cast<double>(step.tokens) : 1;
    ScoredPolicy::observe(step);
  }

  std::vector<Admission> plan(const Residency& residency, int max_fills) override {
    if (!last_uses_.empty()) learn_slack(residency);
    if (device_is_slower_) max_fills = 0;
    if (eager_) return ScoredPolicy::plan(residency, max_fills);
    const auto missed = std::count_if(candidates_.begin(), candidates_.end(),
                                      [&](const ExpertId& id) { return !residency.resident(id); });
    allowance_ = std::min(kMostAllowance, allowance_ + kShareOfDemand * o_.demand_share * static_cast<double>(missed));
    std::vector<Admission> plan =
        ScoredPolicy::plan(residency, std::min(max_fills, residency.free_slots + static_cast<int>(allowance_)));
    for (const Admission& a : plan) allowance_ -= a.evicts();
    return plan;
  }

 protected:
  void count(const ExpertUse& use, const StepUses& step) override {
    const size_t i = at(use.id);
    counts_.use(i, step.prefill ? times_of_one_ * use.tokens : 1);
    scores_[i] = counts_.sum(i, half_life_);
    if (used_since_fill_[i] >= 0) ++used_since_fill_[i];
    if (!step.prefill && GhostCache::watches(i))
      for (GhostCache& ghost : ghosts_) ghost.use(i, counts_, margin_);
  }
  void counted(const StepUses&) override {
    if (step_ % kStepsBetweenChoices == 0) choose_half_life();
  }
  bool wanted(const ExpertId& id) const override { return counts_.uses(at(id), half_life_) >= kTwoUses; }
  bool worth(const ExpertId& id, const ExpertId& victim) const override {
    return scores_[at(id)] > margin_ * scores_[at(victim)];
  }
  void planned(std::span<const Admission> plan) override {
    for (const Admission& a : plan) {
      used_since_fill_[at(a.fill)] = 0;
      if (!a.evicts()) continue;
      int& uses = used_since_fill_[at(a.victim)];
      if (uses >= 0) {
        ++ended_fills_;
        useless_fills_ += uses == 0;
      }
      uses = -1;
    }
    if (ended_fills_ < kGuardFills) return;
    margin_ = std::clamp(2 * useless_fills_ > ended_fills_ ? margin_ * kMarginUp : margin_ * kMarginDown, kLeastMargin,
                         kMostMargin);
    ended_fills_ = useless_fills_ = 0;
  }

 private:
  void rescore() {
    for (size_t i = 0; i < scores_.size(); ++i) scores_[i] = counts_.sum(i, half_life_);
    reorder();
  }
  void learn_slack(const Residency& residency) {
    for (auto use = last_uses_.begin(); use != last_uses_.end();) {
      const int layer = use->id.layer;
      LayerBranches step;
      for (; use != last_uses_.end() && use->id.layer == layer; ++use)
        step.add(residency.resident(use->id), use->tokens, *o_.costs);
      slack_[static_cast<size_t>(layer)].observe(step, *o_.costs);
    }
    last_uses_.clear();
    if (++looked_on_ % kStepsBetweenLooks != 0) return;
    double saved_ns = 0;
    for (const LayerSlack& layer : slack_) saved_ns += layer.saved_ns(*o_.costs);
    device_is_slower_ = saved_ns <= 0;
  }
  void choose_half_life() {
    size_t best = half_life_;
    std::vector<double> scores;
    for (GhostCache& ghost : ghosts_) scores.push_back(ghost.take_score(kFillCost));
    for (size_t h = 0; h < scores.size(); ++h)
      if (scores[h] > scores[best]) best = h;
    if (best == half_life_ || scores[best] <= (1 + kSwitchMargin) * scores[half_life_]) return;
    half_life_ = best;
    rescore();
  }

  const bool eager_;
  DecayedCounts counts_;
  std::vector<GhostCache> ghosts_;
  size_t half_life_ = kFirstHalfLife;
  double margin_ = kLeastMargin, times_of_one_ = 1, allowance_ = 0;
  std::vector<int> used_since_fill_;  // -1: not filled by us
  int ended_fills_ = 0, useless_fills_ = 0;
  std::vector<ExpertUse> last_uses_;  // of a step without a prompt that plan() has not seen yet
  std::vector<LayerSlack> slack_;
  int64_t looked_on_ = 0;  // steps
  bool device_is_slower_ = false;
};

}  // namespace

std::unique_ptr<ExpertPolicy> make_value_policy(const PolicyOptions& o) {
  return std::make_unique<ValuePolicy>(o, false);
}
std::unique_ptr<ExpertPolicy> make_eager_policy(const PolicyOptions& o) {
  return std::make_unique<ValuePolicy>(o, true);
}

}  // namespace thermocline::sched
