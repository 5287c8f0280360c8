// LFU: the steps that used an expert, ever.
#include "scheduler/placement/scored_policy.h"

namespace thermocline::sched {
namespace {

class LfuPolicy final : public ScoredPolicy {
 public:
  explicit LfuPolicy(const PolicyOptions& o) : ScoredPolicy(o) {
    for (size_t i = 0; i < o.profile.size(); ++i) scores_[i] = o.profile[i];
  }

 protected:
  void count(const ExpertUse& use, const StepUses&) override { ++scores_[at(use.id)]; }
};

}  // namespace

std::unique_ptr<ExpertPolicy> make_lfu_policy(const PolicyOptions& o) { return std::make_unique<LfuPolicy>(o); }

}  // namespace thermocline::sched
