// StepTime: what a step takes, phase by phase: predicted by the cost model, measured by the step.
#pragma once

#include <array>
#include <cstddef>

namespace thermocline::sched {

/// On the CPU the shared expert runs with the routed ones and counts as one of them; on a device it is dense.
enum class Phase { dense, attention, index, experts_cpu, experts_gpu, handover, copies, head, table };
constexpr std::array<const char*, 9> kPhaseNames = {"dense",    "attention", "index", "experts (CPU)", "experts (GPU)",
                                                    "handover", "copies",    "head",  "table"};

/// Nanoseconds of a step; 0: a phase it does not have, or that was not measured. Phases that run beside each other are
/// all in `phases`; `total` has the longer one.
struct StepTime {
  std::array<double, kPhaseNames.size()> phases{};
  double total = 0;
  double& operator[](Phase phase) { return phases[static_cast<size_t>(phase)]; }
  double operator[](Phase phase) const { return phases[static_cast<size_t>(phase)]; }
  /// The phase that takes longest of those that are not hidden behind another.
  Phase bottleneck() const;
};

}  // namespace thermocline::sched
