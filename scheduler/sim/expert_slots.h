// ExpertSlots: a device's slots as SlotPool keeps them, without bytes. What is filled after a step is in the table of
// the step after the next; what is evicted is out of the next one's.
#pragma once

#include <vector>

#include "runtime/base/check.h"
#include "scheduler/placement/expert_policy.h"

namespace thermocline::sched {

class ExpertSlots {
 public:
  ExpertSlots(int layers, int experts, int slots)
      : layers_(layers),
        experts_(experts),
        slots_(slots),
        free_(slots),
        planned_(static_cast<size_t>(layers) * static_cast<size_t>(experts), -1),
        resident_(planned_.size()),
        uses_(planned_.size(), -1) {}

  int slots() const { return slots_; }
  Residency residency() const { return {planned_, layers_, experts_, free_, slots_ - free_}; }
  bool resident(size_t i) const { return resident_[i]; }

  /// Between steps. now: without a copy (it is on the device already). False: nothing was done, as the victim is still
  /// on its way, as SlotPool has it.
  bool apply(const Admission& a, bool now) {
    if (a.evicts()) {
      const size_t victim = at(a.victim);
      TC_CHECK(planned_[victim] >= 0, "a victim that is not there");
      if (!resident_[victim]) return false;
      planned_[victim] = -1;
      resident_[victim] = false;
      fills_ += uses_[victim] >= 0;
      useful_fills_ += uses_[victim] > 0;
      uses_[victim] = -1;
      ++free_;
    }
    const size_t i = at(a.fill);
    planned_[i] = 0;
    --free_;
    if (now) {
      resident_[i] = true;
      uses_[i] = 0;
    } else {
      coming_.push_back(i);
    }
    return true;
  }
  /// Before a step: what was filled before the last one is there.
  void begin_step() {
    for (const size_t i : due_) {
      resident_[i] = true;
      uses_[i] = 0;
    }
    due_.swap(coming_);
    coming_.clear();
  }
  void begin_with(const ExpertId& id) {
    planned_[at(id)] = 0;
    resident_[at(id)] = true;
    --free_;
  }
  void use(size_t i) { uses_[i] += uses_[i] >= 0; }
  /// Of the fills whose expert has gone again: all, and those that were used at least once.
  int64_t ended_fills() const { return fills_; }
  int64_t useful_fills() const { return useful_fills_; }
  size_t at(const ExpertId& id) const { return static_cast<size_t>(id.layer * experts_ + id.expert); }

 private:
  const int layers_, experts_, slots_;
  int free_;
  std::vector<int32_t> planned_;  // as a policy sees it
  std::vector<bool> resident_;    // of the next step
  std::vector<int> uses_;         // since it was filled; -1: it never was
  std::vector<size_t> coming_, due_;
  int64_t fills_ = 0, useful_fills_ = 0;
};

}  // namespace thermocline::sched
