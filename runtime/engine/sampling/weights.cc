#include "runtime/engine/sampling/weights.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "runtime/base/check.h"
#include "runtime/engine/sampling/lanes.h"

namespace thermocline::sampling {

Weighting Weighting::of(int64_t vocab, float best, double temperature, double min_p) {
  TC_CHECK(vocab >= 1 && vocab <= 1 << 24);
  const int bits = std::max(17, static_cast<int>(std::bit_width(static_cast<uint64_t>(vocab))));
  // A temperature of 1e-30 already tells any two logits apart; its inverse is still a float.
  return {best, static_cast<float>(1 / std::max(temperature, 1e-30)), static_cast<float>(min_p),
          std::ldexp(1.5f, 23 + bits - 53)};
}

float Weighting::operator()(float logit) const {
  const Weighting4 lanes(*this);
  return _mm_cvtss_f32(lanes.weights(lanes.exponents(_mm_set1_ps(logit))));
}

double total_weight(std::span<const float> row, const Weighting& weighting) {
  const Weighting4 lanes(weighting);
  __m128d low = _mm_setzero_pd(), high = _mm_setzero_pd();
  for_each_block(row, -INFINITY, [&](int64_t, const float* values) {
    for (int i = 0; i < kBlock; i += 4) {
      const __m128 exponents = lanes.exponents(_mm_loadu_ps(values + i));
      if (all_weightless(exponents)) continue;
      const __m128 w = lanes.weights(exponents);
      low = _mm_add_pd(low, _mm_cvtps_pd(w));
      high = _mm_add_pd(high, _mm_cvtps_pd(_mm_movehl_ps(w, w)));
    }
  });
  double sums[2];
  _mm_storeu_pd(sums, _mm_add_pd(low, high));
  return sums[0] + sums[1];
}

double log_of(double x) {
  int exponent = 0;
  const double m = std::frexp(x, &exponent);  // [0.5, 1)
  // ln m = 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 1/3: the first missing term of the series is s^33 / 33 < 1e-17.
  const double s = (m - 1) / (m + 1), square = s * s;
  double sum = 0;
  for (int power = 31; power >= 1; power -= 2) sum = sum * square + 1.0 / power;
  return std::max(0.0, exponent * 0.6931471805599453 + 2 * s * sum);  // no probability above 1
}

}  // namespace thermocline::sampling
