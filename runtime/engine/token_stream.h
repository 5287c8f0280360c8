// TokenStream: what a request's client gets, token by token: a bounded ring that the step thread fills and the client
// empties.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "runtime/base/result.h"
#include "runtime/engine/sampling/sampler.h"

namespace thermocline {

enum class FinishReason {
  stop,       // EOS, a stop token or a stop string
  length,     // max_tokens, or the context is full
  cancelled,  // by its client, or because the client took nothing for too long
  error,      // TokenEvent::error says what
};

/// Counts and times of one answer.
struct AnswerStats {
  int64_t prompt_tokens = 0, completion_tokens = 0;
  int64_t cached_tokens = 0;  // of the prompt, whose rows were there already
  int preemptions = 0;
  double queue_seconds = 0, prefill_seconds = 0, decode_seconds = 0;
};

struct TokenEvent {
  enum class Kind {
    progress,  // stats of a prompt that is not yet computed; only where asked for, and where the client takes it
    prompt,    // prompt_logprobs, once, before the first token; only where asked for
    token,     // id, text, logprobs
    finish,    // the end of a choice: text that was held back, reason, error, stats
  } kind = Kind::token;
  int choice = 0;
  int32_t id = -1;
  std::string text;                           // whole characters; empty while a character or a stop string may go on
  std::optional<SampledToken> logprobs;       // where asked for
  std::vector<SampledToken> prompt_logprobs;  // [prompt tokens]; that of the first has id only
  FinishReason reason = FinishReason::stop;
  std::string stop = {};  // the stop string that ended it
  Error error = {};
  AnswerStats stats = {};        // of a token cached_tokens alone; of progress what is there so far
  int64_t processed_tokens = 0;  // progress: of the prompt, computed or cached
};

class TokenStream {
 public:
  /// Room for `capacity` events a choice, and always for the one that ends it.
  TokenStream(int choices, size_t capacity)
      : ended_(static_cast<size_t>(choices)), open_(ended_.size()), room_(capacity * ended_.size()) {}

  /// Step thread. Never blocks; push() needs room() first, finish() does not. What comes after the end of its choice
  /// is dropped: the watchdog may have ended it.
  bool room(size_t events = 1) const;
  void push(TokenEvent event);
  void finish(TokenEvent event);
  /// Ends every choice that goes on. Any thread.
  void finish_all(const Error& error);

  /// Client: all events since the last call.
  std::vector<TokenEvent> take();
  /// Client: blocks until there is something to take, or everything was taken, or the time is over (false).
  bool wait_for(std::chrono::milliseconds time);
  /// Every choice has ended; its events may wait to be taken.
  bool ended() const;
  /// Every choice has ended and every event was taken.
  bool finished() const;
  /// Client: called from the step thread, without a lock, when events came after a take() had left none.
  void on_ready(std::function<void()> ready);

 private:
  void put(TokenEvent event, bool last);

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<TokenEvent> events_;
  std::vector<bool> ended_;  // by choice
  size_t open_;              // choices that go on
  const size_t room_;        // events
  std::function<void()> ready_;
};

}  // namespace thermocline
