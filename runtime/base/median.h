// The middle of some values.
#pragma once

#include <algorithm>
#include <vector>

namespace thermocline {

/// Of an even number the mean of the two in the middle; at least one value.
inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

}  // namespace thermocline
