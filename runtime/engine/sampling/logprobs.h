// Log-probabilities of the model's own choice: the log-softmax of its logits, before bias, penalties, bans and
// temperature.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/base/result.h"
#include "runtime/engine/sampling/scratch.h"

namespace thermocline {

struct TokenLogprob {
  int32_t id = -1;
  float logprob = 0;
};

struct SampledToken {
  int32_t id = -1;
  float logprob = 0;              // of id, where it was asked for; -inf only where the row itself holds -inf
  std::vector<TokenLogprob> top;  // the most likely ones, falling; a tie goes to the lower id; none with -inf
};

/// Log-probability of `id` and the `top` most likely ones (fewer where the row has fewer) of a row: for prompt
/// logprobs. The same row gives the same bits here and in Sampler::sample, in `logprob` and in `top`.
/// `id` is in the row. Errors: internal for NaN or infinite logits, naming the token.
Result<SampledToken> logprobs_of(std::span<const float> logits, int32_t id, int top, SamplingScratch& scratch);

namespace sampling {

/// The same of a row whose scan with scratch.block_max is `scan`, and that has neither NaN nor +inf.
SampledToken logprobs_of(std::span<const float> logits, const RowScan& scan, int32_t id, int top,
                         SamplingScratch& scratch);

/// Scans a row into scratch.block_max. Errors: internal for NaN, +inf, and -inf of a token that is not `banned`.
Result<RowScan> scan_logits(std::span<const float> logits, std::span<const int32_t> banned, SamplingScratch& scratch);

}  // namespace sampling
}  // namespace thermocline
