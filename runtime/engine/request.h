// Request: one question to the engine as data, and RequestHandle: what its client keeps. The step loop decides every
// step what is done for whom (docs/serving.md).
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/engine/queue_ticket.h"
#include "runtime/engine/sampling/sampler.h"
#include "runtime/engine/token_stream.h"

namespace thermocline {

struct Request {
  using Clock = std::chrono::steady_clock;

  std::vector<int32_t> prompt;  // ids inside the vocabulary
  SamplingParams sampling;      // choice i draws with seed + i
  int64_t max_tokens = -1;      // of the answer; 0: none (prompt logprobs); -1: LoopOptions::default_max_tokens
  int64_t min_tokens = 0;       // EOS and stop tokens cannot be chosen before

  std::vector<std::string> stop;        // the answer ends before any of these
  bool include_stop = false;            // ... or behind it
  std::vector<int32_t> stop_token_ids;  // the answer ends with any of these; they give no text
  bool ignore_eos = false;
  bool skip_special_tokens = true;     // special tokens of the answer give no text; EOS never does
  std::vector<int32_t> shown_special;  // ... but these do: markup that is parsed later

  int64_t reasoning_budget = -1;  // tokens of an answer before reasoning_end is the next; -1: no limit
  int32_t reasoning_end = -1;     // ends the reasoning that the answer begins with; -1: it begins with none

  int choices = 1;               // answers to the same prompt
  int top_logprobs = -1;         // of every token of the answer; -1: no logprobs, 0: of the chosen token alone
  int prompt_top_logprobs = -1;  // the same of every prompt token but the first
  bool report_progress = false;  // TokenEvent::Kind::progress while the prompt is computed

  std::string id;           // for logs and errors
  std::string key;          // whom the fair queue counts it to; "": everyone without a key
  std::string cache_scope;  // whose cached prefixes it may find; "": those of its key
  std::string cache_salt;   // ... and of the same salt
  int priority = 0;         // higher goes first; waiting raises it (sched::FairQueue)
  Clock::time_point deadline = Clock::time_point::max();  // it ends with ErrorCode::deadline then
  QueueTicket ticket;  // its place in the queue's caps, where that was taken before the prompt was made
};

/// When an answer got where it is; a default time: it has not.
struct Milestones {
  Request::Clock::time_point submitted = {}, admitted = {}, first_token = {};

  /// What its time went to until `now`, into `stats`.
  void tell(Request::Clock::time_point now, AnswerStats& stats) const;
};

enum class RequestPhase { waiting, prefill, decode, finished };

/// A submitted request, shared by its client and the step loop. Any thread.
class RequestHandle {
 public:
  using Clock = Request::Clock;
  RequestHandle(int choices, size_t capacity) : stream_(choices, capacity) {}

  /// It ends within one step, with FinishReason::cancelled. Idempotent.
  void cancel();
  bool cancelled() const { return cancel_.load(std::memory_order_relaxed); }

  TokenStream& stream() { return stream_; }
  RequestPhase phase() const { return phase_.load(std::memory_order_relaxed); }
  /// What the time of an answer that has not ended went to, of the choice that is ahead; no counts.
  AnswerStats times(Clock::time_point now) const;

  /// Step thread, of each choice; the first counts.
  void note_admitted(Clock::time_point now) { note(admitted_, now); }
  void note_first_token(Clock::time_point now) { note(first_token_, now); }

 private:
  friend class StepLoop;
  friend class Engine;
  static void note(std::atomic<Clock::time_point>& milestone, Clock::time_point now) {
    if (milestone.load(std::memory_order_relaxed) == Clock::time_point()) milestone = now;
  }

  TokenStream stream_;
  std::atomic<bool> cancel_{false};
  std::atomic<RequestPhase> phase_{RequestPhase::waiting};
  const Clock::time_point submitted_ = Clock::now();
  std::atomic<Clock::time_point> admitted_{Clock::time_point()}, first_token_{Clock::time_point()};
  std::weak_ptr<class Inbox> inbox_;  // woken by a cancel
};

}  // namespace thermocline
