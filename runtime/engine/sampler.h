// Sampling: logits to a token, deterministic for a seed whatever else runs.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <unordered_map>
#include <vector>

#include "runtime/base/result.h"

namespace thermocline {

struct SamplingParams {
  double temperature = 1.0;         // 0: the most likely token, the lower id among equals
  double top_p = 1.0;               // keep the most likely tokens up to this mass
  int64_t top_k = 0;                // keep this many; 0: all
  double min_p = 0.0;               // keep tokens with at least this share of the best one's probability
  double repetition_penalty = 1.0;  // of every token of prompt and answer, as a divisor
  double presence_penalty = 0.0;    // of tokens of the answer, subtracted once
  double frequency_penalty = 0.0;   // the same, for every time
  uint64_t seed = 0;
  bool has_seed = false;  // otherwise the seed comes from the system

  /// Whether the answer is the most likely token each time, whatever came before.
  bool greedy() const {
    return temperature == 0 && repetition_penalty == 1 && presence_penalty == 0 && frequency_penalty == 0;
  }
  /// Errors: invalid_argument, naming the field, for a value out of its range.
  Status check() const;
};

class Sampler {
 public:
  Sampler(const SamplingParams& params, std::span<const int32_t> prompt);
  /// Picks a token and counts it.
  int32_t sample(std::span<const float> logits);

 private:
  void penalise(std::vector<float>& logits) const;
  int32_t draw(const std::vector<float>& logits);

  const SamplingParams params_;
  std::mt19937_64 random_;
  std::unordered_map<int32_t, int64_t> seen_;  // prompt and answer
  std::unordered_map<int32_t, int64_t> answered_;
  std::vector<float> logits_;
};

}  // namespace thermocline
