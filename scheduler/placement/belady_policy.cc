// Belady: of all experts those stay that are needed again soonest. It reads the trace ahead: a bound, not a policy.
#include <limits>

#include "scheduler/placement/scored_policy.h"
#include "scheduler/trace/trace.h"

namespace thermocline::sched {
namespace {

class BeladyPolicy final : public ScoredPolicy {
 public:
  explicit BeladyPolicy(const PolicyOptions& o) : ScoredPolicy(o), steps_of_(scores_.size()), next_(scores_.size()) {
    for (double& score : scores_) score = kNever;
    if (!o.future) return;
    const Trace& trace = *o.future;
    int64_t step = 0;
    for (int64_t i = 0; i < trace.size(); ++i) {
      step += i == 0 || trace.token(i).step != trace.token(i - 1).step;
      for (int layer = 0; layer < o.layers; ++layer)
        for (const TracePick& pick : trace.picks(i, layer)) {
          std::vector<int64_t>& steps = steps_of_[at({layer, pick.expert})];
          if (steps.empty() || steps.back() != step) steps.push_back(step);
        }
    }
    for (size_t i = 0; i < scores_.size(); ++i)
      if (!steps_of_[i].empty()) scores_[i] = -static_cast<double>(steps_of_[i].front());
  }

 protected:
  void count(const ExpertUse& use, const StepUses&) override {
    const size_t i = at(use.id);
    const std::vector<int64_t>& steps = steps_of_[i];
    while (next_[i] < steps.size() && steps[next_[i]] <= step_) ++next_[i];
    scores_[i] = next_[i] < steps.size() ? -static_cast<double>(steps[next_[i]]) : kNever;
  }

 private:
  static constexpr double kNever = -1e18;
  std::vector<std::vector<int64_t>> steps_of_;  // by expert, rising
  std::vector<size_t> next_;                    // the first of them that is to come
};

}  // namespace

std::unique_ptr<ExpertPolicy> make_belady_policy(const PolicyOptions& o) { return std::make_unique<BeladyPolicy>(o); }

}  // namespace thermocline::sched
