// Correction: how far the cost model is off, phase by phase, learned from the steps that run. Source: spec/scheduler.md
// 2.2, item 8.
#pragma once

#include <array>

#include "scheduler/cost/step_time.h"

namespace thermocline::sched {

class Correction {
 public:
  static constexpr double kLeast = 0.7, kMost = 1.5;  // factors beyond these are a wrong model, not a correction
  static constexpr double kNew = 1.0 / 32;            // weight of the newest step
  static constexpr double kOff = 0.2;                 // |log ratio| of a phase that is off ..
  static constexpr int kAlarmSteps = 256;             // .. for so many steps in a row, and somebody should know

  /// A step as predicted and as measured. Phases that either does not have are left out.
  void observe(const StepTime& predicted, const StepTime& measured);
  /// Measured by predicted, of late; 1 before there was a step.
  double ratio(Phase phase) const;
  /// The same within kLeast and kMost: what a prediction should be multiplied by.
  double factor(Phase phase) const;
  /// A prediction, corrected. Its total changes in proportion to the phases, hidden or not.
  StepTime corrected(StepTime predicted) const;
  /// Whether the phase has been off for kAlarmSteps: a hot CPU, a neighbour, memory on the wrong node.
  bool alarmed(Phase phase) const { return off_[static_cast<size_t>(phase)] >= kAlarmSteps; }

 private:
  std::array<double, kPhaseNames.size()> log_ratio_{};
  std::array<bool, kPhaseNames.size()> seen_{};
  std::array<int, kPhaseNames.size()> off_{};
};

}  // namespace thermocline::sched
