// StepLoop: the thread that owns all requests and decides every step what is computed for whom.
//
//   inbox -> planner -> preempt, admit -> step -> sample on the pool -> text, stops -> token streams -> finish, release
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "runtime/engine/inbox.h"
#include "runtime/engine/loop_options.h"
#include "runtime/engine/running_request.h"
#include "runtime/engine/step_forecast.h"
#include "runtime/engine/watchdog.h"
#include "runtime/exec/step_executor.h"
#include "runtime/hw/worker_pool.h"
#include "runtime/text/tokenizer.h"
#include "scheduler/batch/fair_queue.h"
#include "scheduler/batch/step_planner.h"
#include "scheduler/cost/step_cost.h"

namespace thermocline {

class StepLoop {
 public:
  /// What the loop steps; all of it outlives the loop and is touched by nobody else meanwhile.
  struct Machine {
    StepExecutor& step;
    KvStore& kv;
    WorkerPool& pool;
    const ModelGeometry& geometry;
    const Tokenizer& tokenizer;
    int64_t max_context = 0;  // as asked for: the cache may hold less
    PrefixCache::Options prefix_cache = {};
    std::vector<StepExecutor::Recorder*> recorders = {};  // of the step, from its first request on
    const StepForecast* forecast = nullptr;               // of the step, where there is one
    StepMeters* meters = nullptr;                         // the same; one of the recorders
  };
  /// Measures the cost of two steps, then starts the thread. Errors: those of a step.
  static Result<std::unique_ptr<StepLoop>> start(const Machine& machine, const LoopOptions& options);
  /// Ends everything at once.
  ~StepLoop();

  // Any thread; as in Engine.
  Result<QueueTicket> ticket(const QueueCounters::Amount& amount);
  Result<std::shared_ptr<RequestHandle>> submit(Request request);
  void drain(std::chrono::steady_clock::time_point deadline);
  void flush_prefix_cache(std::function<void(const PrefixCacheFlush&)> done) { inbox_->flush(std::move(done)); }
  EngineHealth health() const;
  EngineStats stats() const;

 private:
  using Clock = std::chrono::steady_clock;
  using Running = std::unique_ptr<RunningRequest>;
  struct Row;       // a row of logits and whose it is
  class BatchStop;  // asks whether anybody wants the batch that runs

  static int64_t nanoseconds(Clock::time_point time) {
    return std::chrono::nanoseconds(time.time_since_epoch()).count();
  }

  StepLoop(const Machine& machine, const LoopOptions& options);
  Status calibrate();
  Status check(const Request& request) const;
  int64_t most_tokens(const Request& request) const;

  void run();
  void turn();
  void take_mail();
  void flush(const std::function<void(const PrefixCacheFlush&)>& done);
  void accept(Inbox::Mail::Submitted submitted);
  void enqueue(Running r);
  void enqueue_behind(SubmittedRequest& submitted);
  sched::WaitingRequest waiting_of(RunningRequest& r) const;
  void drop_unwanted(Clock::time_point now);
  bool unwanted(RunningRequest& r, Clock::time_point now);
  sched::StepPlan plan(Clock::time_point now);
  void preempt(uint64_t id);
  Status admit(uint64_t id);
  bool await_prefix(RunningRequest& r);
  void take_arrivals(Clock::time_point now);
  std::span<const int32_t> resumable(const RunningRequest& r) const;
  int64_t part_tokens(const RunningRequest& r, const sched::StepPlan::Part& part) const;
  void make_room_for(RunningRequest* r);
  void keep_prefix(RunningRequest& r, int64_t length, bool durable = true);
  void keep_prompt(RunningRequest& r);
  void step(const sched::StepPlan& plan);
  void sample(const std::vector<Row>& rows);
  void deliver(Row row);
  void release(Running r);
  void retire_ended();
  void tell_ended();
  void unstick();
  void fail_all(const Error& error);
  void wait(Clock::time_point now);
  void count_gap(Clock::time_point start);
  bool waits_too_long(RunningRequest& r, Clock::time_point now) const;
  void bark();
  void end_active(const Error& error);
  void publish_running();
  void publish_stats();
  sched::KvPages pages() const;
  RunningRequest* running(uint64_t id);
  Error too_long(int64_t prompt, bool for_context) const;

  const Machine m_;
  const LoopOptions options_;
  const sched::StepPlanner planner_;
  const std::shared_ptr<QueueCounters> counters_;
  const std::shared_ptr<Inbox> inbox_;

  // Step thread.
  PrefixCache cache_;  // goes after every sequence
  sched::FairQueue queue_;
  sched::StepCost cost_;
  std::vector<Running> running_;                   // oldest first
  std::unordered_map<uint64_t, Running> waiting_;  // those in queue_
  std::vector<SamplingScratch> scratch_;           // one a worker
  std::vector<Running> ended_;                     // they have given back everything; their clients do not know yet
  uint64_t next_id_ = 1;
  EngineStats counted_;
  /// Since the end of the last step, and how much of it the loop slept.
  struct Gap {
    std::optional<Clock::time_point> since;
    double idle = 0;
  } gap_;

  // Shared.
  mutable std::mutex mutex_;
  EngineStats stats_;  // published
  RateWindow rates_;
  EngineHealth health_;
  bool stuck_ = false;                                // health is red for a step that may end yet
  std::vector<std::weak_ptr<RequestHandle>> active_;  // for the watchdog
  std::atomic<bool> stop_{false};
  std::atomic<Clock::rep> drain_deadline_{INT64_MAX};
  std::atomic<bool> draining_{false};

  Watchdog watchdog_;
  std::thread thread_;
};

}  // namespace thermocline
