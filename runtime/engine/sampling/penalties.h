// What the request and the answer so far change in a row of logits, sparsely: only the tokens named or seen.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "runtime/engine/sampling/sampling_params.h"

namespace thermocline::sampling {

/// Adds each bias to its logit. Ids outside the row are passed over.
void add_bias(std::span<const std::pair<int32_t, float>> bias, std::span<float> row);

/// Sets the logits of `ids` to -inf. Ids outside the row are passed over.
void ban(std::span<const int32_t> ids, std::span<float> row);

/// Counts tokens and pushes them down. One answer's; counts nothing where no penalty asks for it.
class Penalties {
 public:
  Penalties(const SamplingParams& params, std::span<const int32_t> prompt);
  /// A token of the answer.
  void count(int32_t id);
  /// Whether apply() would touch a row.
  bool any() const { return !tokens_.empty(); }
  /// Repetition: positive logits of tokens of prompt and answer are divided, negative ones multiplied. Then presence
  /// and frequency, of tokens of the answer. Results stay finite.
  void apply(std::span<float> row) const;

 private:
  struct Token {
    int32_t id;
    int64_t answered;
  };
  int64_t& answered(int32_t id);

  bool active_;
  float repetition_;
  double presence_, frequency_;
  std::vector<Token> tokens_;
  std::unordered_map<int32_t, size_t> places_;  // in tokens_
};

}  // namespace thermocline::sampling
