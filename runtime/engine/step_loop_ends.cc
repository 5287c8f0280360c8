// How requests leave the step loop: given up, ended, told of it.
#include <fmt/format.h>

#include <algorithm>

#include "runtime/base/log.h"
#include "runtime/engine/step_loop.h"

namespace thermocline {

// Cancelled, past its deadline, ended by the watchdog, or too long in the queue.
bool StepLoop::unwanted(RunningRequest& r, Clock::time_point now) {
  if (r.blocked_since != Clock::time_point() && now - r.blocked_since > options_.stream_stall) {
    log_info("request {}: its client takes nothing, cancelled", r.request().id);
    r.handle().cancel();
  }
  if (r.handle().cancelled())
    r.finish(FinishReason::cancelled);
  else if (r.request().deadline <= now)
    r.fail({ErrorCode::deadline,
            "the request's time is over; its answer had " + std::to_string(r.answered()) + " tokens so far"});
  else if (waits_too_long(r, now))
    r.fail({ErrorCode::overloaded, fmt::format("the request waited for {:.0f} s and was not begun (--queue-timeout)",
                                               std::chrono::duration<double>(now - r.submitted().at).count())});
  return r.ended();
}

// With the first of its choices that is looked at all are: none was begun.
bool StepLoop::waits_too_long(RunningRequest& r, Clock::time_point now) const {
  SubmittedRequest& s = r.submitted();
  const auto most = options_.queue_timeout;
  s.waited_too_long =
      s.waited_too_long || (most.count() > 0 && s.choices_waiting == s.request.choices && now - s.at > most);
  return s.waited_too_long;
}

void StepLoop::drop_unwanted(Clock::time_point now) {
  for (auto it = waiting_.begin(); it != waiting_.end();) {
    if (unwanted(*it->second, now)) {
      queue_.remove(it->first);
      release(std::move(it->second));
      it = waiting_.erase(it);
    } else {
      ++it;
    }
  }
  for (const Running& r : running_) unwanted(*r, now);
  retire_ended();
}

// Whoever has ended gives back its place; a kept sequence goes back to its conversation.
void StepLoop::release(Running r) {
  if (r->admitted == Clock::time_point() && --r->submitted().choices_waiting == 0)
    r->submitted().request.ticket.release();
  if (r->reason() != FinishReason::error) keep_prefix(*r, r->stored());
  r->kv.reset();
  enqueue_behind(r->submitted());
  r->handle().phase_ = RequestPhase::finished;
  const FinishReason reason = r->reason();
  ++(reason == FinishReason::cancelled ? counted_.cancelled
     : reason == FinishReason::error   ? counted_.failed
                                       : counted_.finished);
  ended_.push_back(std::move(r));
}

void StepLoop::retire_ended() {
  const auto ended =
      std::stable_partition(running_.begin(), running_.end(), [](const Running& r) { return !r->ended(); });
  for (auto r = ended; r != running_.end(); ++r) release(std::move(*r));
  running_.erase(ended, running_.end());
}

// What a client finds when it hears of its end is true already: counts, pages, its kept sequence.
void StepLoop::tell_ended() {
  publish_stats();
  for (const Running& r : ended_) r->tell_end();
  ended_.clear();
}

void StepLoop::fail_all(const Error& error) {
  for (const auto& [id, r] : waiting_) r->submitted().behind.clear();
  for (const Running& r : running_) r->fail(error);
  retire_ended();
  for (auto& [id, r] : waiting_) {
    queue_.remove(id);
    r->fail(error);
    release(std::move(r));
  }
  waiting_.clear();
}

}  // namespace thermocline
