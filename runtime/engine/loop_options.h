// What the step loop may do at most, and what it reports.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "runtime/engine/queue_ticket.h"
#include "runtime/engine/step_forecast.h"
#include "runtime/engine/step_meters.h"
#include "runtime/exec/step_report.h"
#include "runtime/kv/prefix_cache.h"

namespace thermocline {

struct LoopOptions {
  QueueCaps queue;
  /// A step that decodes for somebody takes this long at most: chunks of prompts beside it are cut to fit.
  std::chrono::milliseconds step_budget{250};
  int64_t default_max_tokens = -1;               // of answers that do not say; -1: what the context holds
  int64_t max_answer_tokens = -1;                // no answer gets more; -1: what the context holds
  std::chrono::milliseconds stream_stall{5000};  // a client that takes nothing for this long is cancelled
  std::chrono::milliseconds watchdog{300'000};   // without progress of a step: its requests fail, health turns red
  std::chrono::milliseconds queue_timeout{0};    // a request that nobody began within this is refused; 0: it waits
  size_t stream_capacity = 256;                  // events a choice
};

struct EngineHealth {
  enum class State { ready, draining, failed, stopped } state = State::ready;
  std::string reason;  // of failed
  bool ok() const { return state == State::ready; }
};

/// Of the step loop, since its start. Counters only grow.
struct EngineStats {
  int64_t running = 0, waiting = 0, waiting_tokens = 0,
          waiting_bytes = 0;                        // now; waiting: taken tickets, prepared or not
  int64_t kv_tokens_used = 0, kv_tokens_total = 0;  // now, in whole pages
  int64_t steps = 0, prompt_tokens = 0, answer_tokens = 0, preemptions = 0;
  int64_t finished = 0, cancelled = 0, failed = 0;  // choices
  int64_t failed_steps = 0;
  /// Of prompts, when they were first admitted: all tokens, those that the prefix cache had in memory, those that it
  /// read from the disk for them.
  int64_t admitted_tokens = 0, kept_tokens = 0, fetched_tokens = 0;
  PrefixCacheStats prefix_cache = {};
  HotRows hot_rows = {};       // of devices whose CSA rows lie in host memory
  ExpertTraffic experts = {};  // of devices
  ForecastStats forecast = {};
  double step_seconds = 0, last_step_seconds = 0;
  double longest_decode_step_seconds = 0;  // of steps that decoded for somebody
  /// From the end of a step to the next one: with nobody to run, and for the loop itself.
  double idle_seconds = 0, between_steps_seconds = 0;
  StepMeasures measures = {};
  Buckets<kTokenGapSeconds.size()> token_gaps = {};  // between tokens of an answer
  RateSpan recent = {};                              // what was counted of late
  double step_running_seconds = 0;                   // of the step that runs now; 0: none does
};

}  // namespace thermocline
