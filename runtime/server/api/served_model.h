// What the APIs serve: an engine that runs, its text layer, and what a request may cost.
#pragma once

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "runtime/server/api/model_facts.h"
#include "runtime/server/backend.h"
#include "runtime/text/prose_constants.h"
#include "runtime/text/tokenizer.h"

namespace thermocline::server {

struct ServedModel {
  Backend* backend = nullptr;  // nullptr where requests are read and never run
  int64_t vocab_size = 0, max_context = 0;
  int32_t bos_token_id = 0;
  const Tokenizer& tokenizer;
  Result<ProseConstants> constants;  // the error of reading them: chats answer with it
  SamplingParams defaults = {};      // of generation_config.json
  std::string name;
  std::vector<std::string> aliases = {};    // other names of it
  bool think = false;                       // whether a chat thinks when the request does not say
  bool strict_name = false;                 // other names are refused; else they are served with a warning
  bool strict_fields = false;               // unknown fields of completions are refused; else they are ignored
  bool reasoning_twice = false;             // chats give reasoning as `reasoning` too
  int64_t reasoning_budget = -1;            // of chats that name none
  std::chrono::seconds request_timeout{0};  // of every request, from its arrival on; 0: none
  int64_t created = 0;
  int max_sequences = 0;  // that run together
  ModelFacts facts = {};
  std::string plan = {};  // JSON: what `thermocline plan` says of it on this box; empty: nothing

  /// The name, then the aliases.
  std::vector<std::string> names() const;
  bool has_name(const std::string& asked) const;
  /// "'a', 'b'"
  std::string names_text() const;
  /// A request's `model`. Errors: not_found, listing the names, where that is strict.
  Status check_name(const std::string& asked) const;
  using Headers = std::vector<std::pair<std::string, std::string>>;
  /// What a reply to that name carries: a warning, where it is none of its own.
  Headers name_headers(const std::string& asked) const;

  // Longest token of the vocabulary: what a context can hold at most, in bytes of text.
  size_t longest_token = longest_token_of(tokenizer);
  size_t most_text_bytes() const { return static_cast<size_t>(max_context) * longest_token; }
  /// The largest body that can be a request to this model: its text with every byte escaped, or its ids, and the rest.
  uint64_t most_body_bytes() const {
    return (uint64_t{1} << 20) + std::max<uint64_t>(6 * most_text_bytes(), 16 * 9 * static_cast<uint64_t>(max_context));
  }
  /// What a body takes of the queue's caps before it is read: some four bytes a token, and no more than a context, lest
  /// a body of mostly something else finds no place in an empty queue. Settled when it is tokenised.
  QueueCounters::Amount estimate(uint64_t body_bytes) const;
  /// Errors: context_length, for text that no tokenising makes fit; how many tokens it has is not known then.
  Status check_bytes(size_t text_bytes, const std::string& field) const;

 private:
  static size_t longest_token_of(const Tokenizer& tokenizer);
};

}  // namespace thermocline::server
