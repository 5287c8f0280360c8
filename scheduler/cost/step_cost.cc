#include "scheduler/cost/step_cost.h"

#include <algorithm>
#include <bit>

namespace thermocline::sched {
namespace {

constexpr double kNew = 0.25;  // weight of the newest step

}  // namespace

void StepCost::observe(int64_t tokens, double ns) {
  if (tokens < 1 || !(ns > 0)) return;
  const size_t i = std::min(points_.size() - 1, static_cast<size_t>(std::bit_width(static_cast<uint64_t>(tokens)) - 1));
  Point& point = points_[i];
  const double weight = point.ns > 0 ? kNew : 1;
  point.tokens += weight * (static_cast<double>(tokens) - point.tokens);
  point.ns += weight * (ns - point.ns);
}

double StepCost::ns(int64_t tokens) const {
  const double n = static_cast<double>(tokens);
  const Point* below = nullptr;
  for (const Point& point : points_) {
    if (point.ns == 0) continue;
    if (n <= point.tokens) {
      if (!below) return point.ns;                        // fewer tokens than ever measured
      const double high = std::max(point.ns, below->ns);  // noise never makes more tokens cheaper
      return below->ns + (high - below->ns) * (n - below->tokens) / (point.tokens - below->tokens);
    }
    below = &point;
  }
  return below ? below->ns * n / below->tokens : 0;
}

int64_t StepCost::tokens_within(double budget_ns, int64_t limit) const {
  int64_t low = 0, high = std::max<int64_t>(0, limit);  // ns() never falls
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (ns(middle) <= budget_ns)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

}  // namespace thermocline::sched
