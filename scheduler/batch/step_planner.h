// StepPlanner: what the next step computes, for whom. Pure: running sequences, the queue, the KV pages and a cost in, a
// plan out. One token of everybody who decodes, and beside them chunks of prompts, cut so that nobody who decodes waits
// longer than the budget.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "scheduler/batch/fair_queue.h"
#include "scheduler/cost/step_cost.h"

namespace thermocline::sched {

struct PlannerLimits {
  int max_num_seqs = 1;
  int64_t max_num_batched_tokens = 512;
  int64_t max_logit_rows = 1;  // tokens of a step whose logits can be asked for; at least max_num_seqs
  double budget_ns = 250e6;    // of a step that decodes for somebody
};

struct RunningSequence {
  uint64_t id = 0;
  int64_t length = 0;                   // tokens whose rows are stored
  int64_t remaining = 0;                // tokens to feed, at least 1
  bool decoding = false;                // remaining is 1 and the prompt is done
  bool all_logits = false;              // of every token it feeds, not of the last one alone
  bool blocked = false;                 // its client takes nothing at present
  int64_t pages = 0;                    // KV pages it holds
  int64_t exclusive_pages = INT64_MAX;  // those among them that are free once it is preempted; others share the rest
  int64_t freed_pages() const { return pages < exclusive_pages ? pages : exclusive_pages; }
};

/// Pages of compressed rows, all of one size. A model without any has page_tokens 0, and nothing runs out.
struct KvPages {
  int64_t page_tokens = 256, free = 0, total = 0;
  int64_t of(int64_t tokens) const { return page_tokens == 0 ? 0 : (tokens + page_tokens - 1) / page_tokens; }
};

struct StepPlan {
  struct Part {
    uint64_t id = 0;
    int64_t tokens = 0;  // the next ones of the sequence
    enum class Logits { none, last, all } logits = Logits::none;
    bool operator==(const Part&) const = default;
  };
  std::vector<uint64_t> preempt;  // they give back their pages first, and wait again
  std::vector<uint64_t> admit;    // taken out of the queue; their parts follow those that ran already
  std::vector<Part> parts;        // in the order of the batch
  double predicted_ns = 0;
  int64_t tokens() const;
};

class StepPlanner {
 public:
  explicit StepPlanner(const PlannerLimits& limits) : limits_(limits) {}

  /// `running` in the order they were admitted, oldest first. Who is admitted is popped from the queue; who is
  /// preempted is the caller's to push back (push_preempted). Never more pages than are free, rows or tokens than the
  /// limits allow; who decodes and is not blocked gets its token in every step; the oldest that runs is never
  /// preempted.
  StepPlan plan(std::span<const RunningSequence> running, FairQueue& queue, const KvPages& kv, int64_t now_ns,
                const StepCost& cost) const;

  const PlannerLimits& limits() const { return limits_; }

 private:
  struct Room;
  void add_decodes(std::span<const RunningSequence> running, Room& room, StepPlan& plan) const;
  void add_chunks(std::span<const RunningSequence> running, Room& room, StepPlan& plan) const;
  void admit(std::span<const RunningSequence> running, FairQueue& queue, int64_t now_ns, Room& room,
             StepPlan& plan) const;
  void add_chunk(const RunningSequence& sequence, Room& room, StepPlan& plan) const;

  const PlannerLimits limits_;
};

}  // namespace thermocline::sched
