// What the step loop keeps for later requests that begin alike, and how far a part may go for it (docs/kv.md).
#include <algorithm>
#include <new>

#include "runtime/base/log.h"
#include "runtime/engine/step_loop.h"

namespace thermocline {
namespace {

constexpr int64_t kCheckpointTokens = 4 * kPageTokens;   // of long prompts, for others that begin alike
constexpr int64_t kSavedTokens = 8 * kCheckpointTokens;  // of those that go to the disk, beside both ends of a turn
constexpr int kMostFetches = 8;  // of a request: what others evict before it runs is computed at last

}  // namespace

// Whoever asked finds it in the counts already.
void StepLoop::flush(const std::function<void(const PrefixCacheFlush&)>& done) {
  const PrefixCacheFlush flushed = cache_.clear();
  publish_stats();
  done(flushed);
}

// What of its tokens a kept prefix may stand for: one at least is fed, for its logits; all where all logits are wanted.
std::span<const int32_t> StepLoop::resumable(const RunningRequest& r) const {
  return std::span(r.ids()).first(r.wants_all_logits() ? 0 : r.ids().size() - 1);
}

// The other choices, once the first one has left them its prompt, or one of them has ended; those that end right now
// have left their place already.
void StepLoop::enqueue_behind(SubmittedRequest& submitted) {
  for (const uint64_t id : std::exchange(submitted.behind, {}))
    if (const auto r = waiting_.find(id); r != waiting_.end() && r->second) queue_.push(waiting_of(*r->second));
}

// Whether more of it is on its way from the disk: it waits for that, outside of the queue.
bool StepLoop::await_prefix(RunningRequest& r) {
  if (r.fetches >= kMostFetches) return false;
  r.awaits_since = Clock::now();
  try {
    r.arrival = cache_.fetch(r.prefix_keys, resumable(r), nanoseconds(r.awaits_since));
  } catch (const std::bad_alloc&) {
    log_warn("request {}: no memory for its prefix from the disk", r.request().id);
  }
  if (r.arrival && r.fetches++ == 0) r.kept_tokens = cache_.find(r.prefix_keys, resumable(r));
  return r.arrival != nullptr;
}

// Whose prefix has arrived, or will not: it had its turn in the queue already.
void StepLoop::take_arrivals(Clock::time_point now) {
  cache_.poll(nanoseconds(now));
  std::vector<RunningRequest*> ready;
  for (const auto& [id, r] : waiting_) {
    if (!r->arrival) continue;
    const bool late = now - r->awaits_since > PrefixCache::kPatience;
    if (late) r->fetches = kMostFetches;
    if (late || r->arrival->done) ready.push_back(r.get());
  }
  for (RunningRequest* const r : ready) {
    r->arrival.reset();
    queue_.push_preempted(waiting_of(*r));
  }
}

// Errors: out_of_memory; internal (a device fault).
Status StepLoop::admit(uint64_t id) {
  RunningRequest& r = *waiting_.at(id);
  if (await_prefix(r)) return {};
  TC_ASSIGN(r.kv, cache_.resume(r.prefix_keys, resumable(r), nanoseconds(Clock::now())));
  if (!r.kv) {
    TC_ASSIGN(r.kv, m_.kv.new_sequence());
  }
  if (r.admitted == Clock::time_point()) {
    r.handle().note_admitted(r.admitted = Clock::now());
    r.cached_tokens = r.stored();
    if (r.fetches == 0) r.kept_tokens = r.cached_tokens;
    r.kept_tokens = std::min(r.kept_tokens, r.cached_tokens);
    counted_.admitted_tokens += r.prompt_tokens();
    counted_.kept_tokens += r.kept_tokens;
    counted_.fetched_tokens += r.cached_tokens - r.kept_tokens;
    if (--r.submitted().choices_waiting == 0) r.submitted().request.ticket.release();
  }
  r.handle().phase_ = RequestPhase::prefill;
  r.tell_progress();
  running_.push_back(std::move(waiting_.extract(id).mapped()));
  return {};
}

// What it feeds of its part: as the cache may hold more than when it was planned for, no more than it has left, and not
// the last token if no row of logits was planned; and a prompt stops where a checkpoint is due.
int64_t StepLoop::part_tokens(const RunningRequest& r, const sched::StepPlan::Part& part) const {
  const bool without_logits = part.logits == sched::StepPlan::Part::Logits::none;
  int64_t tokens = std::min(part.tokens, r.remaining() - without_logits);
  if (cache_.enabled() && r.stored() < r.prompt_tokens())
    if (const int64_t due = (r.stored() + tokens) / kCheckpointTokens * kCheckpointTokens; due > r.stored())
      tokens = due - r.stored();
  return tokens;
}

// The cache is a service to later requests: a fault of the device shows in the step that meets it.
void StepLoop::keep_prefix(RunningRequest& r, int64_t length, bool durable) {
  if (!r.kv || length < std::max<int64_t>(1, r.kv->rollback_floor())) return;
  try {
    const Status kept = cache_.keep(r.prefix_keys, r.ids(), *r.kv, length, nanoseconds(Clock::now()), durable);
    if (!kept.ok()) log_warn("a prefix of {} tokens was not kept: {}", length, kept.error().message);
  } catch (const std::bad_alloc&) {
    log_warn("a prefix of {} tokens was not kept: no memory for its checkpoint", length);
  }
}

// After a step: the end of a prompt, but for its last token, whose logits the same prompt needs again, and where a
// checkpoint is due on the way there.
void StepLoop::keep_prompt(RunningRequest& r) {
  if (r.stored() == r.prompt_tokens()) {
    keep_prefix(r, r.prompt_tokens() - 1);
    enqueue_behind(r.submitted());
  } else if (r.stored() < r.prompt_tokens() && r.stored() % kCheckpointTokens == 0) {
    keep_prefix(r, r.stored(), r.stored() % kSavedTokens == 0);
  }
}

}  // namespace thermocline
