#include "scheduler/batch/step_planner.h"

#include <algorithm>

namespace thermocline::sched {

int64_t StepPlan::tokens() const {
  int64_t sum = 0;
  for (const Part& part : parts) sum += part.tokens;
  return sum;
}

/// What is left of the step while it is filled.
struct StepPlanner::Room {
  const KvPages kv;
  int64_t tokens = 0, rows = 0, pages = 0;
  std::vector<bool> preempted;  // by index in `running`

  // Pages that `sequence` still takes for its next tokens.
  int64_t needs(const RunningSequence& sequence, int64_t count) const {
    return std::max<int64_t>(0, kv.of(sequence.length + count) - sequence.pages);
  }
  // Preempts the youngest that is younger than `keep` and holds pages, until `wanted` are free.
  bool make_free(int64_t wanted, size_t keep, std::span<const RunningSequence> running, StepPlan& plan) {
    for (size_t i = running.size(); pages < wanted && i-- > keep + 1;) {
      if (preempted[i] || running[i].pages == 0) continue;
      preempted[i] = true;
      pages += running[i].freed_pages();
      plan.preempt.push_back(running[i].id);
    }
    return pages >= wanted;
  }
};

StepPlan StepPlanner::plan(std::span<const RunningSequence> running, FairQueue& queue, const KvPages& kv,
                           int64_t now_ns, const StepCost& cost) const {
  StepPlan plan;
  Room room{kv, limits_.max_num_batched_tokens, limits_.max_logit_rows, kv.free, {}};
  room.preempted.resize(running.size());
  add_decodes(running, room, plan);
  const int64_t decodes = plan.tokens();
  // Somebody waits for this step's token: what it may take beside them follows from the budget, one token at least, as
  // else a prompt would never be computed while others decode.
  if (decodes > 0)
    room.tokens =
        std::min(room.tokens,
                 std::max<int64_t>(1, cost.tokens_within(limits_.budget_ns, limits_.max_num_batched_tokens) - decodes));
  add_chunks(running, room, plan);
  if (plan.preempt.empty()) admit(running, queue, now_ns, room, plan);
  plan.predicted_ns = cost.ns(plan.tokens());
  return plan;
}

// From the oldest on: a page that is missing is taken from the youngest.
void StepPlanner::add_decodes(std::span<const RunningSequence> running, Room& room, StepPlan& plan) const {
  for (size_t i = 0; i < running.size(); ++i) {
    const RunningSequence& sequence = running[i];
    if (!sequence.decoding || sequence.blocked || room.preempted[i] || room.tokens == 0 || room.rows == 0) continue;
    const int64_t pages = room.needs(sequence, 1);
    if (!room.make_free(pages, i, running, plan)) {
      // Older ones hold everything: it waits again rather than keep what they may need.
      if (i > 0 && sequence.pages > 0) {
        room.preempted[i] = true;
        room.pages += sequence.freed_pages();
        plan.preempt.push_back(sequence.id);
      }
      continue;
    }
    room.pages -= pages;
    --room.tokens;
    --room.rows;
    plan.parts.push_back({sequence.id, 1, StepPlan::Part::Logits::last});
  }
}

void StepPlanner::add_chunks(std::span<const RunningSequence> running, Room& room, StepPlan& plan) const {
  for (size_t i = 0; i < running.size(); ++i)
    if (!running[i].decoding && !running[i].blocked && !room.preempted[i]) {
      // A prompt whose pages went to older sequences since it was admitted takes them from younger ones.
      room.make_free(std::min<int64_t>(1, room.needs(running[i], 1)), i, running, plan);
      add_chunk(running[i], room, plan);
    }
}

void StepPlanner::add_chunk(const RunningSequence& sequence, Room& room, StepPlan& plan) const {
  int64_t count = std::min(sequence.remaining, room.tokens);
  if (room.kv.page_tokens > 0)
    count = std::min(count, (sequence.pages + room.pages) * room.kv.page_tokens - sequence.length);
  if (sequence.all_logits) count = std::min(count, room.rows);
  const bool last = count == sequence.remaining;
  if (last && room.rows == 0) --count;
  if (count <= 0) return;
  using Logits = StepPlan::Part::Logits;
  const Logits logits = sequence.all_logits ? Logits::all : count == sequence.remaining ? Logits::last : Logits::none;
  room.pages -= room.needs(sequence, count);
  room.tokens -= count;
  room.rows -= logits == Logits::all ? count : logits == Logits::last ? 1 : 0;
  plan.parts.push_back({sequence.id, count, logits});
}

// In the queue's order, without overtaking: the first that does not fit is waited for.
void StepPlanner::admit(std::span<const RunningSequence> running, FairQueue& queue, int64_t now_ns, Room& room,
                        StepPlan& plan) const {
  // Pages that admitted prompts have not taken yet are promised to them; each that runs gets one more page ahead, so
  // that an admission is not followed by a preemption at once.
  int64_t promised = 0;
  for (const RunningSequence& sequence : running) promised += room.needs(sequence, sequence.remaining + 1);
  for (const StepPlan::Part& part : plan.parts) {
    const auto it = std::find_if(running.begin(), running.end(), [&](const auto& s) { return s.id == part.id; });
    promised -= room.needs(*it, part.tokens);
  }
  int64_t free = room.pages - std::max<int64_t>(0, promised);
  int64_t seqs = static_cast<int64_t>(running.size());
  while (seqs < limits_.max_num_seqs && room.tokens > 0) {
    const WaitingRequest* const next = queue.peek(now_ns);
    if (!next) return;
    const RunningSequence sequence{.id = next->id,
                                   .length = next->length,
                                   .remaining = next->tokens,
                                   .all_logits = next->all_logits,
                                   .pages = next->pages};
    const int64_t pages = room.needs(sequence, sequence.remaining + 1), ahead = room.kv.page_tokens > 0 ? seqs : 0;
    if (seqs > 0 && pages + ahead > free) return;
    queue.pop();
    plan.admit.push_back(sequence.id);
    add_chunk(sequence, room, plan);
    free -= pages;
    ++seqs;
  }
}

}  // namespace thermocline::sched
