#include "runtime/engine/sampling/select_mass.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime/base/check.h"
#include "runtime/engine/sampling/lanes.h"

namespace thermocline::sampling {
namespace {

// A bin rises as the exponent falls: both products and the cut to an integer are monotone.
template <int kBins>
__m128i bins_of(__m128 exponents) {
  const __m128 clamped = _mm_max_ps(exponents, _mm_set1_ps(-38.0f));
  return _mm_cvttps_epi32(_mm_mul_ps(clamped, _mm_set1_ps(-(kBins - 1) / 38.0f)));
}

// The tokens of one bin, with their weights, in rising order of ids.
template <int kBins>
std::span<Candidate> gather_bin(std::span<const float> row, std::span<const float> block_max,
                                const Weighting& weighting, int bin, std::span<Candidate> candidates) {
  const Weighting4 lanes(weighting);
  size_t count = 0;
  for_each_block(row, -INFINITY, [&](int64_t block, const float* values) {
    const __m128 max = _mm_set1_ps(block_max[static_cast<size_t>(block)]);
    if (_mm_cvtsi128_si32(bins_of<kBins>(lanes.exponents(max))) > bin) return;  // all of the block lies lower
    for (int i = 0; i < kBlock; i += 4) {
      const __m128 exponents = lanes.exponents(_mm_loadu_ps(values + i));
      const __m128i same = _mm_cmpeq_epi32(bins_of<kBins>(exponents), _mm_set1_epi32(bin));
      const int mask = _mm_movemask_ps(_mm_castsi128_ps(same));
      if (mask == 0) continue;
      float weights[4];
      _mm_storeu_ps(weights, lanes.weights(exponents));
      for (int lane = 0; lane < 4; ++lane)
        if (mask >> lane & 1 && weights[lane] > 0)
          candidates[count++] = {values[i + lane], static_cast<int32_t>(block * kBlock + i + lane), weights[lane]};
    }
  });
  return candidates.first(count);
}

}  // namespace

Cut find_mass(std::span<Candidate> list, double mass_before, double target) {
  while (list.size() > 1) {
    const size_t half = list.size() / 2;
    std::nth_element(list.begin(), list.begin() + static_cast<int64_t>(half), list.end(), before);
    double mass = mass_before;
    for (const Candidate& c : list.first(half)) mass += c.weight;
    if (mass > target) {
      list = list.first(half);
    } else {
      mass_before = mass;
      list = list.subspan(half);
    }
  }
  return {list[0].id, mass_before + list[0].weight};
}

void MassHistogram::fill(std::span<const float> row, const Weighting& weighting) {
  const Weighting4 lanes(weighting);
  std::memset(copies_, 0, sizeof copies_);
  for_each_block(row, -INFINITY, [&](int64_t, const float* values) {
    for (int i = 0; i < kBlock; i += 4) {
      const __m128 exponents = lanes.exponents(_mm_loadu_ps(values + i));
      if (all_weightless(exponents)) continue;
      float weights[4];
      int32_t bins[4];
      _mm_storeu_ps(weights, lanes.weights(exponents));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bins), bins_of<kBins>(exponents));
      for (int lane = 0; lane < 4; ++lane) copies_[bins[lane]][lane] += weights[lane];
    }
  });
  total_ = 0;
  for (int bin = 0; bin < kBins; ++bin) {
    bins_[bin] = copies_[bin][0] + copies_[bin][1] + copies_[bin][2] + copies_[bin][3];
    total_ += bins_[bin];
  }
}

Cut MassHistogram::find(std::span<const float> row, std::span<const float> block_max, const Weighting& weighting,
                        double target, std::span<Candidate> candidates) const {
  TC_CHECK(target < total_);
  int bin = 0;
  double mass = 0;
  while (mass + bins_[bin] <= target) mass += bins_[bin++];
  return find_mass(gather_bin<kBins>(row, block_max, weighting, bin, candidates), mass, target);
}

}  // namespace thermocline::sampling
