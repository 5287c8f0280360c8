// Buckets: a histogram in plain integers, filled on the step path and read when somebody looks.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace thermocline {

/// counts[i] are values of at most bounds[i] and above the bound before; the last are beyond all of them.
template <size_t N>
struct Buckets {
  std::array<uint64_t, N + 1> counts{};
  double sum = 0;
  void add(const std::array<double, N>& bounds, double value) {
    ++counts[static_cast<size_t>(std::lower_bound(bounds.begin(), bounds.end(), value) - bounds.begin())];
    sum += value;
  }
};

/// Of a step, and of its phases.
inline constexpr std::array kStepSeconds = {.0005, .001, .0025, .005, .01, .025, .05, .1,  .25,
                                            .5,    1.,   2.5,   5.,   10., 30.,  60., 120.};
/// Between two tokens of an answer, as vLLM has them.
inline constexpr std::array kTokenGapSeconds = {.01, .025, .05, .075, .1,  .15, .2,  .3,  .4, .5,
                                                .75, 1.,   2.5, 5.,   7.5, 10., 20., 40., 80.};
/// Tokens of a step, as vLLM has them.
inline constexpr std::array kStepTokens = {1., 8., 16., 32., 64., 128., 256., 512., 1024., 2048., 4096., 8192., 16384.};

}  // namespace thermocline
