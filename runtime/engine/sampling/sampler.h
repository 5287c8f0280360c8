// Sampling: a row of logits to a token. The token depends on the row, the parameters and what this answer has drawn
// before, and on nothing else: not on who shares the step, the thread, or the machine's instruction set.
#pragma once

#include <cstdint>
#include <random>
#include <span>

#include "runtime/base/result.h"
#include "runtime/engine/sampling/logprobs.h"
#include "runtime/engine/sampling/penalties.h"
#include "runtime/engine/sampling/sampling_params.h"
#include "runtime/engine/sampling/scratch.h"

namespace thermocline {

struct SampleOptions {
  int top_logprobs = -1;            // -1: no log-probabilities; 0: of the chosen token; n: and of the n most likely
  std::span<const int32_t> banned;  // not to be chosen now: EOS before min_tokens
};

/// The state of one answer: its random numbers and counts. One thread at a time; different samplers run in parallel,
/// each thread with a scratch of its own.
class Sampler {
 public:
  Sampler(const SamplingParams& params, std::span<const int32_t> prompt);

  /// Picks a token and counts it. logits [V] is only read, V <= 2^24.
  /// In order: logit_bias, penalties, bans; then with a temperature min-p, top-k, top-p of what is left, and one draw;
  /// without one the best. Where every token is banned the bans are void: a token is always chosen. One random number
  /// is used where temperature > 0.
  /// Errors: internal for NaN or infinite logits, naming the token (-inf of a banned token is none). Nothing is drawn
  /// or counted then.
  Result<SampledToken> sample(std::span<const float> logits, const SampleOptions& options, SamplingScratch& scratch);

  /// Counts a token chosen elsewhere (a device's argmax).
  void accept(int32_t id) { penalties_.count(id); }

 private:
  struct Row {
    std::span<const float> logits, block_max;
    sampling::RowScan scan;
  };
  bool edits(const SampleOptions& options) const;
  Row edit(std::span<const float> logits, std::span<const int32_t> banned, SamplingScratch& scratch) const;
  int32_t draw(const Row& row, SamplingScratch& scratch);

  SamplingParams params_;
  std::mt19937_64 random_;
  sampling::Penalties penalties_;
};

}  // namespace thermocline
