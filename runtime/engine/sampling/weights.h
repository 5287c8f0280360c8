// Logits to weights, in numbers that add up exactly: whatever the order of a sum, and however it is split over lanes,
// bins and threads, it is the same sum.
#pragma once

#include <cstdint>
#include <span>

namespace thermocline::sampling {

/// The weight of a logit is exp((logit - best) / temperature), rounded to a multiple of 2^-36 (vocabularies up to
/// 131,072 tokens; 2^(b - 53) for one of b bits). Weights are at most 1, so sums of a whole row are exact in a double.
/// A token below 2^-37 of the best one weighs nothing; all such tokens together have less than 1e-6 of its weight.
struct Weighting {
  float best = 0;
  float scale = 1;       // 1 / temperature
  float min_weight = 0;  // a lower weight becomes 0
  float grid = 0;        // 3/2 of 2^23 times the multiple: adding and subtracting it rounds

  /// vocab <= 2^24; temperature > 0; 0 <= min_p <= 1.
  static Weighting of(int64_t vocab, float best, double temperature, double min_p);
  /// 0 to 1; 1 for the best, 0 for -inf. Within 1e-5 of its relative value before rounding, for logits within 80 of the
  /// best (exp within 3 ulp; the exponent in float32).
  float operator()(float logit) const;
};

/// The sum of all weights of a row, exact.
double total_weight(std::span<const float> row, const Weighting& weighting);

/// ln(x), 1 <= x < 2^25, within 1e-15 of 1 + ln(x): the C library's differs between instruction sets.
double log_of(double x);

}  // namespace thermocline::sampling
