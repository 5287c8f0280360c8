// StepCost: how long a step of n tokens takes, measured and corrected with every step.
#pragma once

#include <array>
#include <cstdint>

namespace thermocline::sched {

/// One point per power of two, each an average that forgets (EWMA) of the steps of that size, in nanoseconds; linear
/// between points, in proportion beyond the last one. The time of a step grows slower than its tokens (weights are read
/// once), so what was not measured yet is judged as too dear and never as too cheap.
class StepCost {
 public:
  /// A step of `tokens` took `ns`.
  void observe(int64_t tokens, double ns);
  /// Predicted; 0 before anything was observed.
  double ns(int64_t tokens) const;
  /// The most tokens, at most `limit`, that a step of at most `budget_ns` computes; 0 where one is too many already.
  int64_t tokens_within(double budget_ns, int64_t limit) const;

 private:
  struct Point {
    double tokens = 0, ns = 0;  // averages; 0: none yet
  };
  std::array<Point, 24> points_{};  // of steps of [2^i, 2^(i+1)) tokens
};

}  // namespace thermocline::sched
