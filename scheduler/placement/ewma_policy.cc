// Score EWMA: what was used most over a fixed half-life; a newcomer has to be 25 % better than what goes for it.
#include "scheduler/placement/scored_policy.h"
#include "scheduler/stats/decayed_counts.h"

namespace thermocline::sched {
namespace {

class EwmaPolicy final : public ScoredPolicy {
 public:
  explicit EwmaPolicy(const PolicyOptions& o) : ScoredPolicy(o), counts_(scores_.size()) {
    for (size_t i = 0; i < o.profile.size(); ++i) {
      counts_.use(i, o.profile[i]);
      scores_[i] = counts_.sum(i, kHalfLife);
    }
  }

  void observe(const StepUses& step) override {
    if (counts_.advance(1)) {
      for (size_t i = 0; i < scores_.size(); ++i) scores_[i] = counts_.sum(i, kHalfLife);
      reorder();
    }
    ScoredPolicy::observe(step);
  }

 protected:
  static constexpr size_t kHalfLife = 2;  // 32 steps
  static constexpr double kMargin = 1.25;

  void count(const ExpertUse& use, const StepUses&) override {
    counts_.use(at(use.id), 1);
    scores_[at(use.id)] = counts_.sum(at(use.id), kHalfLife);
  }
  bool worth(const ExpertId& id, const ExpertId& victim) const override {
    return scores_[at(id)] > kMargin * scores_[at(victim)];
  }

 private:
  DecayedCounts counts_;
};

}  // namespace

std::unique_ptr<ExpertPolicy> make_ewma_policy(const PolicyOptions& o) { return std::make_unique<EwmaPolicy>(o); }

}  // namespace thermocline::sched
