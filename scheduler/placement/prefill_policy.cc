// Refresh at prefill: the slots get what the prompt used most, and keep it until the next prompt.
#include <algorithm>
#include <numeric>

#include "scheduler/placement/expert_policy.h"

namespace thermocline::sched {
namespace {

class PrefillPolicy final : public ExpertPolicy {
 public:
  explicit PrefillPolicy(const PolicyOptions& o)
      : o_(o), counts_(static_cast<size_t>(o.layers) * static_cast<size_t>(o.experts)) {
    std::copy(o.profile.begin(), o.profile.end(), counts_.begin());
  }

  void observe(const StepUses& step) override {
    if (!step.prefill) return;
    if (!in_prompt_) std::fill(counts_.begin(), counts_.end(), 0.0f);
    in_prompt_ = true;
    for (const ExpertUse& use : step.uses)
      counts_[static_cast<size_t>(use.id.layer * o_.experts + use.id.expert)] += static_cast<float>(use.tokens);
    chosen_ = false;
  }

  std::vector<Admission> plan(const Residency& residency, int max_fills) override {
    if (!chosen_) choose(residency);
    in_prompt_ = false;
    std::vector<Admission> plan;
    int free = residency.free_slots;
    while (static_cast<int>(plan.size()) < max_fills && !fills_.empty()) {
      const ExpertId fill = id_of(fills_.back());
      fills_.pop_back();
      if (residency.resident(fill)) continue;
      Admission admission{fill};
      if (free > 0) {
        --free;
      } else {
        while (!victims_.empty() && !residency.resident(id_of(victims_.back()))) victims_.pop_back();
        if (victims_.empty()) break;
        admission.victim = id_of(victims_.back());
        victims_.pop_back();
      }
      plan.push_back(admission);
    }
    return plan;
  }

 private:
  ExpertId id_of(int i) const { return {i / o_.experts, i % o_.experts}; }

  // What should be there and is not, the best last; what is there and should not be, the worst last.
  void choose(const Residency& residency) {
    chosen_ = true;
    fills_.clear();
    victims_.clear();
    std::vector<int> order(counts_.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int a, int b) {
      const float x = counts_[static_cast<size_t>(a)], y = counts_[static_cast<size_t>(b)];
      return x > y || (x == y && a < b);
    });
    const auto slots = static_cast<size_t>(residency.residents + residency.free_slots);
    for (size_t i = std::min(slots, order.size()); i-- > 0;)
      if (!residency.resident(id_of(order[i])) && counts_[static_cast<size_t>(order[i])] > 0)
        fills_.push_back(order[i]);
    for (size_t i = slots; i < order.size(); ++i)
      if (residency.resident(id_of(order[i]))) victims_.push_back(order[i]);
  }

  const PolicyOptions o_;
  std::vector<float> counts_;  // of the last prompt
  std::vector<int> fills_, victims_;
  bool in_prompt_ = false, chosen_ = false;
};

}  // namespace

std::unique_ptr<ExpertPolicy> make_prefill_policy(const PolicyOptions& o) { return std::make_unique<PrefillPolicy>(o); }

}  // namespace thermocline::sched
