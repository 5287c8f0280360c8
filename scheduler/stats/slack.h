// LayerSlack: of one layer, how much longer the CPU's branch of its experts takes than the device's, how many experts
// its steps miss, and what one more resident would save. Newer steps count for more. Source:
// spec/scheduler.md 2.3, 2.4.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "scheduler/cost/expert_cost.h"

namespace thermocline::sched {

/// The experts that a step uses of a layer, one by one.
struct LayerBranches {
  double cpu_ns = 0, gpu_ns = 0;  // without the handover
  int missing = 0, resident = 0;
  int64_t tokens = 0;

  void add(bool here, int64_t n, const ExpertCosts& costs) {
    (here ? gpu_ns : cpu_ns) += (here ? costs.gpu : costs.cpu).ns(n);
    ++(here ? resident : missing);
    tokens += n;
  }
  /// How much longer the CPU's branch is.
  double slack_ns(const ExpertCosts& costs) const { return (missing > 0 ? cpu_ns + costs.sync_ns : 0) - gpu_ns; }
};

class LayerSlack {
 public:
  static constexpr double kHalfLife = 64;  // steps
  static constexpr size_t kBins = 8;       // of missing experts; the last one: that many and more

  void observe(const LayerBranches& step, const ExpertCosts& costs) {
    const double keep = std::exp2(-1 / kHalfLife), slack_ns = step.slack_ns(costs);
    for (double* sum : {&steps_, &slack_ns_, &cpu_critical_, &only_miss_, &tokens_each_}) *sum *= keep;
    for (double& bin : missing_) bin *= keep;
    steps_ += 1;
    slack_ns_ += slack_ns;
    cpu_critical_ += slack_ns > 0;
    only_miss_ += slack_ns > 0 && step.missing == 1;
    tokens_each_ += static_cast<double>(step.tokens) / std::max(1, step.missing + step.resident);
    missing_[std::min(static_cast<size_t>(step.missing), kBins - 1)] += 1;
  }

  double mean_ns() const { return mean(slack_ns_); }
  /// Share of the steps in which the device waits for the CPU.
  double cpu_critical() const { return mean(cpu_critical_); }
  /// Share of the steps in which it waits for one expert alone.
  double only_miss() const { return mean(only_miss_); }
  /// Share of the steps that miss so many experts; of kBins - 1, that many or more.
  double missing(size_t experts) const { return mean(missing_[experts]); }
  /// What a step that uses one more resident saves: the CPU's branch gets shorter, or needs no handover any more, and
  /// the device's longer. Negative where the device is what steps wait for.
  double saved_ns(const ExpertCosts& costs) const {
    const auto n = std::max<int64_t>(1, std::llround(mean(tokens_each_)));
    return cpu_critical() * costs.cpu.ns(n) + only_miss() * costs.sync_ns - (1 - cpu_critical()) * costs.gpu.ns(n);
  }

 private:
  double mean(double sum) const { return steps_ > 0 ? sum / steps_ : 0; }
  double steps_ = 0, slack_ns_ = 0, cpu_critical_ = 0, only_miss_ = 0, tokens_each_ = 0;
  std::array<double, kBins> missing_{};
};

}  // namespace thermocline::sched
