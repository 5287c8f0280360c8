// RunningRequest: one choice of a request, from the queue to its last token: its tokens, its KV, and what turns logits
// into text. Step thread only.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "runtime/engine/request.h"
#include "runtime/engine/stop_matcher.h"
#include "runtime/kv/prefix_cache.h"
#include "runtime/text/detokenizer.h"

namespace thermocline {

/// A request with its handle, shared by its choices.
struct SubmittedRequest {
  Request request;
  std::shared_ptr<RequestHandle> handle;
  std::chrono::steady_clock::time_point at;
  int choices_waiting = 0;            // the ticket goes back with the last one
  bool waited_too_long = false;       // none of its choices is begun any more
  std::vector<uint64_t> behind = {};  // choices that wait until the first one's prompt is computed
};

class RunningRequest {
 public:
  using Clock = std::chrono::steady_clock;

  /// `limit`: the most tokens of prompt and answer.
  RunningRequest(uint64_t id, std::shared_ptr<SubmittedRequest> submitted, int choice, const Tokenizer& tokenizer,
                 int32_t eos, int64_t limit);

  uint64_t id() const { return id_; }
  const Request& request() const { return submitted_->request; }
  RequestHandle& handle() const { return *submitted_->handle; }
  SubmittedRequest& submitted() const { return *submitted_; }
  bool ended() const { return ended_; }
  FinishReason reason() const { return end_.reason; }

  // --- the sequence ---
  const std::vector<int32_t>& ids() const { return ids_; }
  int64_t stored() const { return kv ? kv->length() : 0; }
  int64_t remaining() const { return static_cast<int64_t>(ids_.size()) - stored(); }
  int64_t prompt_tokens() const { return prompt_tokens_; }
  int64_t answered() const { return static_cast<int64_t>(ids_.size()) - prompt_tokens_; }
  bool decoding() const { return answered() > 0 && remaining() == 1; }
  /// Logits of every token are wanted: prompt logprobs are not complete.
  bool wants_all_logits() const;

  // --- a step's results ---
  /// How its next token is drawn; the span lives as long as this.
  SampleOptions sample_options() const;
  /// Whether the most likely token will do, as a device finds it.
  bool takes_argmax() const;
  /// Its next token: drawn, or the end of reasoning whose budget is used up. Worker thread.
  Result<SampledToken> draw(std::span<const float> logits, SamplingScratch& scratch);
  /// The log-probability of the prompt token after `position`, from that one's logits. Worker thread.
  Result<SampledToken> prompt_logprob(int64_t position, std::span<const float> logits, SamplingScratch& scratch) const;
  /// Keeps it, once, in the order of the prompt.
  void add_prompt_logprob(int64_t position, SampledToken token);
  /// The prompt is computed: to the client with its log-probabilities; the end where no answer is wanted.
  void finish_prompt();
  /// A token of the answer: to the client with its text, and the end where it is one.
  void take(SampledToken token);

  /// To a client that wants it: how much of the prompt is there.
  void tell_progress();

  /// Ends it, once: text that was held back goes with it unless the answer is lost. The client hears of it by
  /// tell_end(), when everything it held has been given back.
  void finish(FinishReason reason);
  void fail(Error error);
  void tell_end();

  // Owned by the loop.
  std::unique_ptr<SequenceKv> kv;
  PrefixKeys prefix_keys;
  Sampler sampler;
  int preemptions = 0, fetches = 0;
  std::shared_ptr<const PrefixArrival> arrival;  // what it waits for
  int64_t cached_tokens = 0;                     // of the prompt, from the prefix cache when it was first admitted
  int64_t kept_tokens = 0;                       // of those, what was there before anything came from the disk
  Clock::time_point admitted{}, first_token{}, last_token{}, blocked_since{}, awaits_since{};

 private:
  void end(TokenEvent event);
  bool hidden(int32_t id) const;
  /// Whether reasoning goes on that has used up its budget.
  bool must_end_reasoning() const { return reasons_ && answered() >= request().reasoning_budget; }
  TokenEvent event(TokenEvent::Kind kind) const {
    TokenEvent e;
    e.kind = kind;
    e.choice = choice_;
    return e;
  }

  const uint64_t id_;
  const std::shared_ptr<SubmittedRequest> submitted_;
  const int choice_;
  const int32_t eos_;
  const int64_t prompt_tokens_, limit_;
  std::vector<int32_t> ids_;
  std::vector<int32_t> ends_;    // tokens that end the answer
  std::vector<int32_t> banned_;  // that cannot be chosen before min_tokens
  const Tokenizer& tokenizer_;
  Detokenizer detokenizer_;
  StopMatcher stops_;
  std::vector<SampledToken> prompt_logprobs_;
  TokenEvent end_;
  bool ended_ = false, prompt_published_ = false, stop_met_ = false;
  bool reasons_ = false;  // within a budget, until reasoning_end
};

}  // namespace thermocline
