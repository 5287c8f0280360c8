// The middle and other ranks of several values.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

namespace thermocline {

/// Of an even number the mean of the two in the middle; at least one value.
inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

/// Of values, at least one; the nearest of them.
inline double percentile(std::vector<double> values, double percent) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(std::lround(percent / 100 * static_cast<double>(values.size() - 1)))];
}

}  // namespace thermocline
