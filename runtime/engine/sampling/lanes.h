// Four float lanes in SSE2, which every x86-64 has: the same instructions, so the same bits, on every machine.
// Only for the units of this folder: they are built without contraction to FMA.
#pragma once

#include <emmintrin.h>

#include <algorithm>
#include <span>

#include "runtime/engine/sampling/row_scan.h"
#include "runtime/engine/sampling/weights.h"

namespace thermocline::sampling {

/// Calls fn(block, values) for every 64 logits; behind the last one of the row lies `padding`.
template <class Fn>
void for_each_block(std::span<const float> row, float padding, const Fn& fn) {
  const int64_t size = static_cast<int64_t>(row.size()), whole = size / kBlock;
  for (int64_t block = 0; block < whole; ++block) fn(block, row.data() + block * kBlock);
  if (whole * kBlock == size) return;
  float tail[kBlock];
  std::fill(std::copy(row.begin() + whole * kBlock, row.end(), tail), tail + kBlock, padding);
  fn(whole, static_cast<const float*>(tail));
}

/// exp(x), -87 <= x <= 0, within 3 ulp. x = n ln 2 + r with |r| <= ln(2) / 2: 2^n goes to the exponent, exp(r) is its
/// Taylor polynomial of degree 7, whose first missing term is at most 0.3466^8 / 8! = 5e-9.
inline __m128 exp4(__m128 x) {
  const __m128i n = _mm_cvtps_epi32(_mm_mul_ps(x, _mm_set1_ps(1.44269504f)));
  const __m128 whole = _mm_cvtepi32_ps(n);
  // ln 2 in two parts; the first has 9 bits, so its products with n are exact.
  __m128 r = _mm_sub_ps(x, _mm_mul_ps(whole, _mm_set1_ps(0.693359375f)));
  r = _mm_sub_ps(r, _mm_mul_ps(whole, _mm_set1_ps(-2.12194440e-4f)));
  __m128 sum = _mm_set1_ps(1.0f / 5040);
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = _mm_add_ps(_mm_mul_ps(sum, r), _mm_set1_ps(term));
  return _mm_mul_ps(sum, _mm_castsi128_ps(_mm_slli_epi32(_mm_add_epi32(n, _mm_set1_epi32(127)), 23)));
}

/// Whether four exponents are so low that their weights, below exp(-26) < 2^-37.5, all round to 0.
inline bool all_weightless(__m128 exponents) {
  return _mm_movemask_ps(_mm_cmpgt_ps(exponents, _mm_set1_ps(-26.0f))) == 0;
}

/// Weighting on four lanes.
class Weighting4 {
 public:
  explicit Weighting4(const Weighting& w)
      : best_(_mm_set1_ps(w.best)),
        scale_(_mm_set1_ps(w.scale)),
        min_weight_(_mm_set1_ps(w.min_weight)),
        grid_(_mm_set1_ps(w.grid)) {}

  /// (logit - best) / temperature, not below -87. Never falls as the logit rises: rounding is monotone.
  __m128 exponents(__m128 logits) const {
    return _mm_max_ps(_mm_mul_ps(_mm_sub_ps(logits, best_), scale_), _mm_set1_ps(-87.0f));
  }
  __m128 weights(__m128 exponents) const {
    const __m128 rounded = _mm_sub_ps(_mm_add_ps(exp4(exponents), grid_), grid_);
    return _mm_and_ps(rounded, _mm_cmpge_ps(rounded, min_weight_));
  }

 private:
  __m128 best_, scale_, min_weight_, grid_;
};

}  // namespace thermocline::sampling
