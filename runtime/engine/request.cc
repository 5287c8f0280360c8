#include "runtime/engine/request.h"

#include <algorithm>

#include "runtime/engine/inbox.h"

namespace thermocline {

void Milestones::tell(Request::Clock::time_point now, AnswerStats& stats) const {
  const auto or_now = [&](Request::Clock::time_point t) { return t == Request::Clock::time_point() ? now : t; };
  const auto seconds = [](Request::Clock::time_point from, Request::Clock::time_point to) {
    return std::max(0.0, std::chrono::duration<double>(to - from).count());
  };
  stats.queue_seconds = seconds(submitted, or_now(admitted));
  stats.prefill_seconds = seconds(or_now(admitted), or_now(first_token));
  stats.decode_seconds = seconds(or_now(first_token), now);
}

AnswerStats RequestHandle::times(Clock::time_point now) const {
  AnswerStats stats;
  Milestones{submitted_, admitted_, first_token_}.tell(now, stats);
  return stats;
}

void RequestHandle::cancel() {
  if (cancel_.exchange(true)) return;
  if (const std::shared_ptr<Inbox> inbox = inbox_.lock()) inbox->wake();
}

}  // namespace thermocline
