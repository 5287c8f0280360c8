// FillBudget: how many speculative bytes may move. Measured idle time of the copy engine fills a bucket; what has to
// move anyway drains it first, so guesses never make anybody wait who knows. Source: spec/scheduler.md 2.6.
#pragma once

#include <algorithm>

namespace thermocline::sched {

class FillBudget {
 public:
  static constexpr double kShareOfIdle = 0.7;

  explicit FillBudget(double most_ns) : most_ns_(most_ns) {}
  /// A step in which the copy engine had nothing to do for so long, and had to do so much that was asked for.
  void step(double idle_ns, double demanded_ns) {
    left_ns_ = std::clamp(left_ns_ + kShareOfIdle * idle_ns - demanded_ns, 0.0, most_ns_);
  }
  /// Whether a guess may be copied, that takes so long; if so it is spent.
  bool spend(double ns) {
    if (ns > left_ns_) return false;
    left_ns_ -= ns;
    return true;
  }
  double left_ns() const { return left_ns_; }

 private:
  const double most_ns_;
  double left_ns_ = 0;
};

}  // namespace thermocline::sched
