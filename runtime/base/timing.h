// What measurements share: the time since some point, and the middle of several of them.
#pragma once

#include <chrono>

#include "runtime/base/statistics.h"

namespace thermocline {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace thermocline
