#include "scheduler/cost/hit_curve.h"

#include <algorithm>
#include <cstddef>

namespace thermocline::sched {

double expected_hits(double resident) {
  struct Point {
    double resident, hits;
  };
  constexpr Point kPoints[] = {
      {0, 0}, {14.0 / 256, 0.405}, {28.0 / 256, 0.594}, {56.0 / 256, 0.744}, {112.0 / 256, 0.865}, {224.0 / 256, 0.910},
      {1, 1}};
  const double share = std::clamp(resident, 0.0, 1.0);
  size_t i = 0;
  while (share > kPoints[i + 1].resident) ++i;
  const Point &a = kPoints[i], &b = kPoints[i + 1];
  return a.hits + (b.hits - a.hits) * (share - a.resident) / (b.resident - a.resident);
}

}  // namespace thermocline::sched
