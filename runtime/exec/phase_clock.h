// PhaseClock: how long a step is at what. The thread that drives the step stops the time when a phase ends; workers
// have nothing to do with it.
#pragma once

#include <chrono>

#include "scheduler/cost/step_time.h"

namespace thermocline {

class PhaseClock {
 public:
  void start() {
    time_ = {};
    start_ = last_ = Clock::now();
  }
  /// What went by since the last call belongs to this phase.
  void lap(sched::Phase phase) {
    const Clock::time_point now = Clock::now();
    time_[phase] += ns(now - last_);
    last_ = now;
  }
  double elapsed_ns() const { return ns(Clock::now() - start_); }
  /// What went by is waiting for others, and in the whole alone.
  void skip() { last_ = Clock::now(); }
  /// The phases so far, and all of the time.
  sched::StepTime time() const {
    sched::StepTime time = time_;
    time.total = elapsed_ns();
    return time;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static double ns(Clock::duration d) { return std::chrono::duration<double, std::nano>(d).count(); }
  Clock::time_point start_, last_;
  sched::StepTime time_;
};

}  // namespace thermocline
