// One request from prompt to answer: prefill, then sample and decode until EOS, a stop string, a limit or a cancel.
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "runtime/engine/engine.h"
#include "runtime/engine/sampling/sampler.h"
#include "runtime/text/tokenizer.h"

namespace thermocline {

struct GenerationRequest {
  std::vector<int32_t> prompt;
  SamplingParams sampling;
  int64_t max_tokens = -1;        // -1: as many as the context holds
  int64_t min_tokens = 0;         // EOS cannot be chosen before
  std::vector<std::string> stop;  // the answer ends before any of these
  bool keep_special = true;       // special tokens of the answer are part of its text; EOS never is
  bool ignore_eos = false;
};

enum class FinishReason { stop, length, cancelled };

struct GenerationResult {
  FinishReason reason = FinishReason::stop;
  int64_t prompt_tokens = 0, completion_tokens = 0;
  int64_t prefilled_tokens = 0;  // less than prompt_tokens where a sequence was continued
  double prefill_seconds = 0, decode_seconds = 0;
  std::vector<int32_t> ids;  // of the answer, with its EOS
};

/// Gets the text of each token as it is complete (may be empty); returning false cancels.
using TextSink = std::function<bool(const std::string& text, int32_t id)>;

/// Runs a request on a sequence that already holds the first sequence.length() tokens of the prompt.
/// Errors: invalid_argument (an empty prompt, one longer than the context, a bad sampling field); those of the engine.
/// A cancel is a result, not an error.
Result<GenerationResult> generate(Engine& engine, const Tokenizer& tokenizer, Sequence& sequence,
                                  const GenerationRequest& request, const std::atomic<bool>& cancel,
                                  const TextSink& sink);

/// Holds back text that may be the start of a stop string.
class StopMatcher {
 public:
  explicit StopMatcher(const std::vector<std::string>& stops) : stops_(stops) {}
  /// The text that is certain; `stopped` turns true when a stop string was met (it and what follows are dropped).
  std::string push(const std::string& text, bool& stopped);
  std::string finish() { return std::move(held_); }

 private:
  const std::vector<std::string>& stops_;
  std::string held_;
};

}  // namespace thermocline
