#include "runtime/engine/sampling/row_scan.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "runtime/base/check.h"
#include "runtime/engine/sampling/lanes.h"

namespace thermocline::sampling {
namespace {

float largest(__m128 x) {
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return std::max(_mm_cvtss_f32(x), _mm_cvtss_f32(_mm_shuffle_ps(x, x, 1)));
}

// Everything at or above `low`, in rising order of ids.
std::span<Candidate> gather(std::span<const float> row, std::span<const float> block_max, float low,
                            std::span<Candidate> candidates) {
  size_t count = 0;
  for (size_t block = 0; block < block_max.size(); ++block) {
    if (block_max[block] < low) continue;
    const size_t first = block * kBlock, last = std::min(first + kBlock, row.size());
    for (size_t id = first; id < last; ++id)
      if (row[id] >= low) candidates[count++] = {row[id], static_cast<int32_t>(id), 0};
  }
  return candidates.first(count);
}

}  // namespace

RowScan scan_row(std::span<const float> row, std::span<float> block_max) {
  TC_CHECK(!row.empty() && block_max.size() == (row.size() + kBlock - 1) / kBlock);
  const __m128i exponent = _mm_set1_epi32(0x7f800000);
  __m128i not_finite = _mm_setzero_si128();
  float best = -INFINITY;
  int64_t best_block = 0;
  for_each_block(row, row.back(), [&](int64_t block, const float* values) {
    __m128 max[2] = {_mm_set1_ps(-INFINITY), _mm_set1_ps(-INFINITY)};
    for (int i = 0; i < kBlock; i += 4) {
      const __m128 x = _mm_loadu_ps(values + i);
      max[i / 4 % 2] = _mm_max_ps(max[i / 4 % 2], x);
      not_finite = _mm_or_si128(not_finite, _mm_cmpeq_epi32(_mm_and_si128(_mm_castps_si128(x), exponent), exponent));
    }
    const float value = block_max[static_cast<size_t>(block)] = largest(_mm_max_ps(max[0], max[1]));
    if (value > best) {  // an equal one stays behind the lower block
      best = value;
      best_block = block;
    }
  });
  const auto first = row.begin() + best_block * kBlock, last = std::min(first + kBlock, row.end());
  const auto at = std::find(first, last, best);  // `last` only where NaN hides the order; the id is not used then
  return {best, static_cast<int32_t>((at == last ? first : at) - row.begin()), _mm_movemask_epi8(not_finite) == 0};
}

std::span<Candidate> select_first(std::span<const float> row, std::span<const float> block_max, int64_t n,
                                  std::span<float> spare_max, std::span<Candidate> candidates) {
  if (n <= 0) return {};
  const auto wanted = static_cast<size_t>(n);
  float low = std::numeric_limits<float>::lowest();
  if (wanted <= block_max.size()) {
    const auto at = spare_max.begin() + (n - 1);
    std::copy(block_max.begin(), block_max.end(), spare_max.begin());
    std::nth_element(spare_max.begin(), at, spare_max.begin() + static_cast<int64_t>(block_max.size()),
                     std::greater<>());
    low = std::max(low, *at);
  }
  const std::span<Candidate> found = gather(row, block_max, low, candidates);
  if (found.size() <= wanted) return found;
  std::nth_element(found.begin(), found.begin() + n, found.end(), before);
  return found.first(wanted);
}

}  // namespace thermocline::sampling
