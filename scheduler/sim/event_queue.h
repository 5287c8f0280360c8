// EventQueue: virtual time. Events run in the order of their times, those of one time in the order they were posted, so
// a simulation is the same every time.
#pragma once

#include <cstdint>
#include <functional>
#include <queue>
#include <vector>

namespace thermocline::sched {

class EventQueue {
 public:
  double now() const { return now_; }  // ns
  void at(double time, std::function<void()> run) { events_.push({time, next_++, std::move(run)}); }
  void after(double ns, std::function<void()> run) { at(now_ + ns, std::move(run)); }
  /// Runs the next event. False: there is none.
  bool step() {
    if (events_.empty()) return false;
    Event event = std::move(const_cast<Event&>(events_.top()));
    events_.pop();
    now_ = event.time;
    event.run();
    return true;
  }

 private:
  struct Event {
    double time;
    uint64_t number;
    std::function<void()> run;
    bool operator<(const Event& other) const {
      return time > other.time || (time == other.time && number > other.number);
    }
  };
  std::priority_queue<Event> events_;
  double now_ = 0;
  uint64_t next_ = 0;
};

}  // namespace thermocline::sched
