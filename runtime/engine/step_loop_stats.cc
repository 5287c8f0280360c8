// What the step loop tells of itself.
#include "runtime/engine/step_loop.h"

namespace thermocline {

// Once a step: plain integers, copied under the lock that readers take.
void StepLoop::publish_stats() {
  const sched::KvPages p = pages();
  counted_.running = static_cast<int64_t>(running_.size());
  counted_.kv_tokens_total = p.total * p.page_tokens;
  counted_.kv_tokens_used = (p.total - p.free) * p.page_tokens;
  counted_.prefix_cache = cache_.stats();
  counted_.hot_rows = m_.step.hot_rows();
  counted_.experts = m_.step.expert_traffic();
  if (m_.forecast) counted_.forecast = m_.forecast->stats();
  if (m_.meters) counted_.measures = m_.meters->measures();
  const StepMeasures& measures = counted_.measures;
  const RateCounts counts{.prompt_tokens = counted_.prompt_tokens,
                          .answer_tokens = counted_.answer_tokens,
                          .read_bytes = measures.weight_bytes + measures.kv_bytes,
                          .step_seconds = counted_.step_seconds,
                          .weight_seconds = measures.weight_seconds,
                          .node_bytes = measures.node_bytes};
  const std::lock_guard lock(mutex_);
  stats_ = counted_;
  rates_.add(Clock::now(), counts);
}

// Before a step, which may take long: a request in its first one runs, and holds pages.
void StepLoop::publish_running() {
  const sched::KvPages p = pages();
  const std::lock_guard lock(mutex_);
  stats_.running = static_cast<int64_t>(running_.size());
  stats_.kv_tokens_used = (p.total - p.free) * p.page_tokens;
}

EngineStats StepLoop::stats() const {
  const QueueCounters::Amount waiting = counters_->waiting();
  const std::chrono::duration<double> running = watchdog_.running();
  const std::lock_guard lock(mutex_);
  EngineStats stats = stats_;
  stats.waiting = waiting.requests;
  stats.waiting_tokens = waiting.tokens;
  stats.waiting_bytes = waiting.bytes;
  stats.recent = rates_.span(Clock::now());
  stats.step_running_seconds = running.count();
  return stats;
}

}  // namespace thermocline
