// Log-probabilities in the shapes of the two completion endpoints.
#pragma once

#include "runtime/engine/sampling/sampler.h"
#include "runtime/io/json_document.h"
#include "runtime/text/tokenizer.h"

namespace thermocline::server {

/// A number, or null for what JSON cannot hold.
Json finite_or_null(float value);
/// The token's own text; bytes that are no whole characters become U+FFFD.
std::string token_text(const Tokenizer& tokenizer, int32_t id);

/// An entry of a chat's `logprobs.content`: {token, logprob, bytes, top_logprobs}.
Json chat_logprob(const Tokenizer& tokenizer, const SampledToken& token);

/// vLLM's `prompt_logprobs`: of each token an object {logprob, rank, decoded_token} by id, its own first; null for the
/// first of the prompt. The rank of one that is not among the likeliest asked for is null.
Json prompt_logprobs(const Tokenizer& tokenizer, const std::vector<SampledToken>& tokens);

/// The legacy object of completions: {tokens, token_logprobs, top_logprobs, text_offset}, filled token by token.
class CompletionLogprobs {
 public:
  explicit CompletionLogprobs(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  struct Token {
    bool known = true;    // false for the first of a prompt, whose probability nothing gives
    bool top = false;     // alternatives were asked for
    bool in_text = true;  // false for a BOS in front, and for special tokens that are not shown
  };
  void add(const SampledToken& token, const Token& what);
  /// What was added since the last call; offsets count on, in characters from the start of the text.
  Json take();
  bool empty() const { return tokens_.empty(); }

 private:
  const Tokenizer& tokenizer_;
  Json tokens_ = Json::array(), logprobs_ = Json::array(), top_ = Json::array(), offsets_ = Json::array();
  int64_t offset_ = 0;
};

}  // namespace thermocline::server
