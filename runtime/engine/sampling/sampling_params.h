// What a request says about the choice of its tokens.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "runtime/base/result.h"

namespace thermocline {

struct SamplingParams {
  double temperature = 1.0;         // 0: the most likely token, the lower id among equals
  double top_p = 1.0;               // keep the most likely tokens up to this mass
  int64_t top_k = 0;                // keep this many; 0, -1: all
  double min_p = 0.0;               // keep tokens with at least this share of the best one's probability
  double repetition_penalty = 1.0;  // of every token of prompt and answer, as a divisor
  double presence_penalty = 0.0;    // of tokens of the answer, subtracted once
  double frequency_penalty = 0.0;   // the same, for every time
  uint64_t seed = 0;                // all 64 bits count; a negative seed is its two's complement
  bool has_seed = false;            // otherwise the seed comes from the system
  std::vector<std::pair<int32_t, float>> logit_bias;  // token id -> added to its logit, -100 to 100

  bool penalises() const { return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0; }
  /// Whether the answer is the most likely token each time, whatever came before.
  bool greedy() const { return temperature == 0 && !penalises() && logit_bias.empty(); }
  /// Errors: invalid_argument, naming the field (also `logit_bias[id]`), for a value out of its range. With `vocab` the
  /// ids of logit_bias are checked too.
  Status check(int64_t vocab = -1) const;
};

}  // namespace thermocline
