// scheduler/batch: the fair queue and the planner on virtual time; scheduler/cost: the cost of a step.
#include "scheduler/batch/step_planner.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

namespace thermocline::sched {
namespace {

using Logits = StepPlan::Part::Logits;

WaitingRequest waiting(uint64_t id, int64_t tokens, const std::string& key = "", int priority = 0, int64_t at = 0) {
  WaitingRequest request;
  request.id = id;
  request.key = key;
  request.priority = priority;
  request.tokens = tokens;
  request.arrived_ns = at;
  return request;
}

std::vector<uint64_t> order_of(FairQueue& queue, int64_t now = 0) {
  std::vector<uint64_t> order;
  while (const WaitingRequest* next = queue.peek(now)) {
    order.push_back(next->id);
    queue.pop();
  }
  return order;
}

TEST(FairQueue, OneKeyIsServedInOrder) {
  FairQueue queue;
  for (uint64_t id = 1; id <= 5; ++id) queue.push(waiting(id, 100));
  EXPECT_EQ(order_of(queue), (std::vector<uint64_t>{1, 2, 3, 4, 5}));
  EXPECT_TRUE(queue.empty());
  EXPECT_EQ(queue.peek(0), nullptr);
}

TEST(FairQueue, AKeyWithManyRequestsTakesTurnsWithTheOthers) {
  FairQueue queue;
  for (uint64_t id = 1; id <= 50; ++id) queue.push(waiting(id, 2048, "greedy"));
  queue.push(waiting(100, 2048, "modest"));
  queue.push(waiting(101, 2048, "modest"));
  const std::vector<uint64_t> order = order_of(queue);
  const auto place = [&](uint64_t id) { return std::find(order.begin(), order.end(), id) - order.begin(); };
  EXPECT_LE(place(100), 1);
  EXPECT_LE(place(101), 3);
}

TEST(FairQueue, KeysGetTheSameTokensWhateverTheLengthOfTheirPrompts) {
  FairQueue queue;
  for (uint64_t id = 0; id < 40; ++id) queue.push(waiting(1000 + id, 16384, "long"));
  for (uint64_t id = 0; id < 640; ++id) queue.push(waiting(2000 + id, 1024, "short"));
  std::map<bool, int64_t> tokens;
  for (int64_t served = 0; served < 400'000;) {
    const WaitingRequest next = *queue.peek(0);
    queue.pop();
    tokens[next.key == "long"] += next.tokens;
    served += next.tokens;
  }
  EXPECT_NEAR(static_cast<double>(tokens[true]), static_cast<double>(tokens[false]), 2 * 16384.0);
}

TEST(FairQueue, PriorityGoesFirstAndWaitingRaisesIt) {
  FairQueue queue;
  queue.push(waiting(1, 10, "a", 0, 0));
  queue.push(waiting(2, 10, "a", 2, 0));
  queue.push(waiting(3, 10, "b", 1, 0));
  EXPECT_EQ(order_of(queue), (std::vector<uint64_t>{2, 3, 1}));
  queue.push(waiting(1, 10, "a", 0, 0));
  queue.push(waiting(2, 10, "b", 2, 3 * FairQueue::kAgeingNs));
  EXPECT_EQ(queue.peek(3 * FairQueue::kAgeingNs)->id, 1u) << "it waited for three levels";
}

TEST(FairQueue, NobodyStarvesUnderAStreamOfUrgentRequests) {
  FairQueue queue;
  queue.push(waiting(1, 10, "patient", 0, 0));
  uint64_t id = 2;
  for (int64_t second = 0; second < 1000; ++second) {
    const int64_t now = second * 1'000'000'000;
    queue.push(waiting(id++, 10, "urgent", 5, now));
    queue.push(waiting(id++, 10, "urgent", 5, now));
    const WaitingRequest* next = queue.peek(now);
    if (next->id == 1) return;
    queue.pop();
  }
  FAIL() << "it was never served";
}

TEST(FairQueue, PreemptedOnesComeFirstOldestFirst) {
  FairQueue queue;
  queue.push(waiting(9, 10, "", 100));
  queue.push_preempted(waiting(5, 10));
  queue.push_preempted(waiting(3, 10));
  EXPECT_EQ(order_of(queue), (std::vector<uint64_t>{3, 5, 9}));
}

TEST(FairQueue, WhatIsRemovedIsGone) {
  FairQueue queue;
  for (uint64_t id = 1; id <= 3; ++id) queue.push(waiting(id, 10, std::to_string(id)));
  queue.push_preempted(waiting(7, 10));
  EXPECT_TRUE(queue.remove(7));
  EXPECT_TRUE(queue.remove(2));
  EXPECT_FALSE(queue.remove(2));
  ASSERT_EQ(queue.peek(0)->id, 1u);
  EXPECT_TRUE(queue.remove(1)) << "also the one that was looked at";
  EXPECT_EQ(order_of(queue), (std::vector<uint64_t>{3}));
}

TEST(StepCost, LearnsAndNeverJudgesTheUnknownAsCheap) {
  StepCost cost;
  EXPECT_EQ(cost.ns(100), 0);
  cost.observe(1, 1000);
  cost.observe(32, 8000);
  EXPECT_DOUBLE_EQ(cost.ns(1), 1000);
  EXPECT_DOUBLE_EQ(cost.ns(32), 8000);
  EXPECT_DOUBLE_EQ(cost.ns(64), 16000) << "in proportion";
  EXPECT_EQ(cost.tokens_within(16000, 512), 64);
  EXPECT_EQ(cost.tokens_within(16000, 40), 40);
  EXPECT_EQ(cost.tokens_within(999, 512), 0);
  for (int i = 0; i < 50; ++i) cost.observe(512, 20000);
  EXPECT_NEAR(cost.ns(512), 20000, 1);
  EXPECT_GT(cost.tokens_within(16000, 512), 200) << "large steps turned out cheaper";
  for (int64_t n = 1; n < 1000; ++n) EXPECT_LE(cost.ns(n), cost.ns(n + 1)) << n;
  cost.observe(512, 1);  // one lucky step
  for (int64_t n = 1; n < 600; ++n) EXPECT_LE(cost.ns(n), cost.ns(n + 1) + 1e-6) << n;
}

/// A linear cost: 1 ms a token.
StepCost linear_cost() {
  StepCost cost;
  for (int64_t n = 1; n <= 4096; n *= 2) cost.observe(n, 1e6 * static_cast<double>(n));
  return cost;
}

RunningSequence decoding(uint64_t id, int64_t length, int64_t pages = 1) {
  RunningSequence s;
  s.id = id;
  s.length = length;
  s.remaining = 1;
  s.decoding = true;
  s.pages = pages;
  return s;
}

RunningSequence prefilling(uint64_t id, int64_t length, int64_t remaining, int64_t pages) {
  RunningSequence s;
  s.id = id;
  s.length = length;
  s.remaining = remaining;
  s.pages = pages;
  return s;
}

const KvPages kRoomy{256, 1000, 1000};

TEST(StepPlanner, ALonePromptGetsTheWholeStep) {
  const StepPlanner planner({.max_num_seqs = 4, .max_num_batched_tokens = 512, .max_logit_rows = 4});
  FairQueue queue;
  queue.push(waiting(1, 700));
  const StepPlan plan = planner.plan({}, queue, kRoomy, 0, linear_cost());
  EXPECT_EQ(plan.admit, std::vector<uint64_t>{1});
  EXPECT_EQ(plan.parts, (std::vector<StepPlan::Part>{{1, 512, Logits::none}}));
  EXPECT_DOUBLE_EQ(plan.predicted_ns, 512e6);
  const RunningSequence rest = prefilling(1, 512, 188, 2);
  EXPECT_EQ(planner.plan(std::span(&rest, 1), queue, kRoomy, 0, linear_cost()).parts,
            (std::vector<StepPlan::Part>{{1, 188, Logits::last}}));
}

TEST(StepPlanner, DecodesComeFirstAndTheBudgetCutsPromptsBesideThem) {
  const StepPlanner planner(
      {.max_num_seqs = 8, .max_num_batched_tokens = 512, .max_logit_rows = 8, .budget_ns = 100e6});
  FairQueue queue;
  queue.push(waiting(7, 1000));
  const std::vector<RunningSequence> running = {prefilling(1, 0, 30, 0), decoding(2, 10), decoding(3, 10)};
  const StepPlan plan = planner.plan(running, queue, kRoomy, 0, linear_cost());
  EXPECT_EQ(plan.parts, (std::vector<StepPlan::Part>{
                            {2, 1, Logits::last}, {3, 1, Logits::last}, {1, 30, Logits::last}, {7, 68, Logits::none}}));
  EXPECT_LE(plan.predicted_ns, 100e6);
}

TEST(StepPlanner, ABudgetThatNothingFitsStillMovesPromptsOn) {
  const StepPlanner planner({.max_num_seqs = 2, .max_num_batched_tokens = 64, .max_logit_rows = 2, .budget_ns = 1});
  FairQueue queue;
  const std::vector<RunningSequence> running = {decoding(1, 10), prefilling(2, 0, 30, 0)};
  EXPECT_EQ(planner.plan(running, queue, kRoomy, 0, linear_cost()).parts,
            (std::vector<StepPlan::Part>{{1, 1, Logits::last}, {2, 1, Logits::none}}));
}

TEST(StepPlanner, ABlockedClientGetsNoStep) {
  const StepPlanner planner({.max_num_seqs = 2, .max_num_batched_tokens = 64, .max_logit_rows = 2});
  FairQueue queue;
  std::vector<RunningSequence> running = {decoding(1, 10), prefilling(2, 0, 30, 0)};
  for (RunningSequence& s : running) s.blocked = true;
  EXPECT_TRUE(planner.plan(running, queue, kRoomy, 0, linear_cost()).parts.empty());
}

TEST(StepPlanner, AllLogitsAreCutToTheRowsThereAre) {
  const StepPlanner planner({.max_num_seqs = 2, .max_num_batched_tokens = 64, .max_logit_rows = 8});
  FairQueue queue;
  WaitingRequest scored = waiting(2, 30);
  scored.all_logits = true;
  queue.push(scored);
  const RunningSequence decode = decoding(1, 5);
  EXPECT_EQ(planner.plan(std::span(&decode, 1), queue, kRoomy, 0, linear_cost()).parts,
            (std::vector<StepPlan::Part>{{1, 1, Logits::last}, {2, 7, Logits::all}}));
}

TEST(StepPlanner, APromptIsAdmittedWhenItsPagesAreFree) {
  const StepPlanner planner({.max_num_seqs = 8, .max_num_batched_tokens = 512, .max_logit_rows = 8});
  FairQueue queue;
  queue.push(waiting(5, 600));
  queue.push(waiting(6, 10));
  const RunningSequence other = decoding(1, 100);
  EXPECT_TRUE(planner.plan(std::span(&other, 1), queue, {256, 3, 4}, 0, linear_cost()).admit.empty())
      << "three pages, and one ahead for who runs; the short one behind does not overtake";
  EXPECT_EQ(planner.plan(std::span(&other, 1), queue, {256, 4, 5}, 0, linear_cost()).admit.size(), 1u);
  FairQueue alone;
  alone.push(waiting(5, 600));
  EXPECT_EQ(planner.plan({}, alone, {256, 3, 3}, 0, linear_cost()).admit.size(), 1u);
}

TEST(StepPlanner, PagesPromisedToAdmittedPromptsAreNotGivenAway) {
  const StepPlanner planner({.max_num_seqs = 8, .max_num_batched_tokens = 256, .max_logit_rows = 8});
  FairQueue queue;
  queue.push(waiting(2, 200));
  const RunningSequence long_prompt = prefilling(1, 256, 1000, 1);  // takes four more
  EXPECT_TRUE(planner.plan(std::span(&long_prompt, 1), queue, {256, 5, 6}, 0, linear_cost()).admit.empty());
}

TEST(StepPlanner, TheYoungestGivesUpItsPages) {
  const StepPlanner planner({.max_num_seqs = 8, .max_num_batched_tokens = 512, .max_logit_rows = 8});
  FairQueue queue;
  queue.push(waiting(9, 10));
  const std::vector<RunningSequence> running = {decoding(1, 256), decoding(2, 100), decoding(3, 100)};
  const StepPlan plan = planner.plan(running, queue, {256, 0, 3}, 0, linear_cost());
  EXPECT_EQ(plan.preempt, std::vector<uint64_t>{3});
  EXPECT_EQ(plan.parts, (std::vector<StepPlan::Part>{{1, 1, Logits::last}, {2, 1, Logits::last}}));
  EXPECT_TRUE(plan.admit.empty());
}

// Pages that others have too are not free once the youngest goes: the next one goes as well.
TEST(StepPlanner, SharedPagesComeFromNobody) {
  const StepPlanner planner({.max_num_seqs = 8, .max_num_batched_tokens = 512, .max_logit_rows = 8});
  FairQueue queue;
  std::vector<RunningSequence> running = {decoding(1, 1024, 4), decoding(2, 1000, 4), decoding(3, 1000, 4)};
  for (RunningSequence& sequence : running) sequence.exclusive_pages = 0;
  running[1].exclusive_pages = 1;
  const StepPlan plan = planner.plan(running, queue, {256, 0, 6}, 0, linear_cost());
  EXPECT_EQ(plan.preempt, (std::vector<uint64_t>{3, 2}));
  EXPECT_EQ(plan.parts, (std::vector<StepPlan::Part>{{1, 1, Logits::last}}));
}

TEST(StepPlanner, AYoungerOneThatLacksAPageWaitsAgain) {
  const StepPlanner planner({.max_num_seqs = 8, .max_num_batched_tokens = 512, .max_logit_rows = 8});
  FairQueue queue;
  const std::vector<RunningSequence> running = {decoding(1, 100, 2), decoding(2, 256)};
  const StepPlan plan = planner.plan(running, queue, {256, 0, 3}, 0, linear_cost());
  EXPECT_EQ(plan.preempt, std::vector<uint64_t>{2});
  EXPECT_EQ(plan.parts, (std::vector<StepPlan::Part>{{1, 1, Logits::last}}));
}

/// A world of sequences driven by the planner alone: pages, limits and progress hold whatever comes.
TEST(StepPlanner, RandomLoadsEndWithinTheirLimits) {
  for (unsigned seed = 0; seed < 60; ++seed) {
    std::mt19937 random(seed);
    const int64_t total_pages = 2 + static_cast<int64_t>(random() % 12);
    PlannerLimits limits;
    limits.max_num_seqs = 1 + static_cast<int>(random() % 6);
    limits.max_num_batched_tokens = std::max<int64_t>(limits.max_num_seqs, 1 + random() % 300);
    limits.max_logit_rows = limits.max_num_seqs + static_cast<int64_t>(random() % 20);
    limits.budget_ns = 1e6 * static_cast<double>(1 + random() % 400);
    const StepPlanner planner(limits);
    StepCost cost = linear_cost();
    struct Sequence {
      int64_t total = 0, known = 0, length = 0, pages = 0;  // known: prompt and answer so far
      bool all_logits = false, answered = false;
    };
    std::map<uint64_t, Sequence> sequences;
    std::vector<uint64_t> running;
    FairQueue queue;
    uint64_t next = 1;
    int64_t free = total_pages, steps = 0, done = 0;
    const KvPages shape{256, 0, 0};
    while (done < 40) {
      ASSERT_LT(++steps, 200000) << "no progress, seed " << seed;
      if (next <= 40 && random() % 3 == 0) {
        Sequence s;
        s.known = 1 + static_cast<int64_t>(random()) % (total_pages * 256 - 1);
        s.total = std::min(total_pages * 256, s.known + 1 + static_cast<int64_t>(random() % 300));
        s.all_logits = random() % 5 == 0;
        WaitingRequest w = waiting(next, s.known, std::to_string(random() % 3), static_cast<int>(random() % 2), steps);
        w.all_logits = s.all_logits;
        queue.push(w);
        sequences[next++] = s;
      }
      std::vector<RunningSequence> view;
      for (const uint64_t id : running) {
        const Sequence& s = sequences[id];
        RunningSequence r;
        r.id = id;
        r.length = s.length;
        r.remaining = s.known - s.length;
        r.decoding = s.answered && r.remaining == 1;
        r.all_logits = s.all_logits && !s.answered;
        r.pages = s.pages;
        view.push_back(r);
      }
      const StepPlan plan = planner.plan(view, queue, {256, free, total_pages}, steps, cost);
      for (const uint64_t id : plan.preempt) {
        ASSERT_NE(id, running.front()) << "the oldest goes on";
        Sequence& s = sequences[id];
        free += s.pages;
        s.pages = s.length = 0;
        std::erase(running, id);
        queue.push_preempted(waiting(id, s.known));
      }
      running.insert(running.end(), plan.admit.begin(), plan.admit.end());
      ASSERT_LE(running.size(), static_cast<size_t>(limits.max_num_seqs));
      ASSERT_LE(plan.tokens(), limits.max_num_batched_tokens);
      int64_t rows = 0;
      for (const StepPlan::Part& part : plan.parts) {
        Sequence& s = sequences[part.id];
        ASSERT_GT(part.tokens, 0);
        ASSERT_LE(s.length + part.tokens, s.known);
        s.length += part.tokens;
        const int64_t pages = shape.of(s.length) - s.pages;
        s.pages += std::max<int64_t>(0, pages);
        free -= std::max<int64_t>(0, pages);
        rows += part.logits == Logits::all ? part.tokens : part.logits == Logits::last;
        if (s.length == s.known) {
          ASSERT_NE(part.logits, Logits::none);
          s.answered = true;
          if (++s.known > s.total) {
            ++done;
            free += s.pages;
            std::erase(running, part.id);
          }
        }
      }
      ASSERT_LE(rows, limits.max_logit_rows);
      ASSERT_GE(free, 0) << "never over-committed, seed " << seed;
      ASSERT_TRUE(running.empty() || !plan.parts.empty()) << "seed " << seed;
    }
    EXPECT_EQ(free, total_pages);
    EXPECT_TRUE(queue.empty());
  }
}

}  // namespace
}  // namespace thermocline::sched
