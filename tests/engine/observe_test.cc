// What an engine tells of itself: rates of the last seconds, and counts of its steps, experts and memory.
#include <numeric>
#include <thread>
#include "runtime/engine/rate_window.h"

#include "tests/support/answers.h"
#include "tests/support/devices.h"

namespace thermocline {
namespace {

using namespace std::chrono_literals;
using Clock = RateWindow::Clock;

const Clock::time_point kStart = Clock::time_point() + 1h;

TEST(RateWindow, SaysWhatGrewInTheLastTenSeconds) {
  RateWindow window;
  EXPECT_EQ(window.span(kStart).seconds, 0);
  for (int i = 0; i <= 300; ++i)  // ten tokens a second, for thirty seconds
    window.add(kStart + i * 100ms,
               {.answer_tokens = i, .read_bytes = 1000u * static_cast<unsigned>(i), .step_seconds = i * .05});
  const RateSpan span = window.span(kStart + 30s);
  EXPECT_NEAR(span.seconds, 10, .3);
  EXPECT_NEAR(span.per_second(static_cast<double>(span.counts.answer_tokens)), 10, 1e-9);
  EXPECT_NEAR(static_cast<double>(span.counts.read_bytes) / span.counts.step_seconds, 20000, 1e-6);
}

TEST(RateWindow, IdleTimeCountsToo) {
  RateWindow window;
  window.add(kStart, {});
  for (int i = 1; i <= 30; ++i) window.add(kStart + i * 1s, {.answer_tokens = 50});
  EXPECT_EQ(window.span(kStart + 30s).counts.answer_tokens, 0);
  EXPECT_EQ(window.span(kStart + 30s).per_second(0), 0);
}

TEST(RateWindow, LongStepsAreSeenAtAll) {
  RateWindow window;
  for (int i = 0; i <= 3; ++i) window.add(kStart + i * 20s, {.prompt_tokens = 500 * i});
  const RateSpan at_end = window.span(kStart + 60s);
  EXPECT_EQ(at_end.counts.prompt_tokens, 500);
  EXPECT_NEAR(at_end.per_second(500), 25, 1e-9);
  EXPECT_EQ(window.span(kStart + 79s).counts.prompt_tokens, 500) << "the next step is not over yet";
}

TEST(Buckets, AreClosedAbove) {
  constexpr std::array bounds = {1., 10.};
  Buckets<2> buckets;
  for (const double value : {0., 1., 1.5, 10., 11., 1e9}) buckets.add(bounds, value);
  EXPECT_EQ(buckets.counts, (std::array<uint64_t, 3>{2, 2, 2}));
  EXPECT_EQ(buckets.sum, 0 + 1 + 1.5 + 10 + 11 + 1e9);
}

TEST(MemoryTiers, HoldWhatThePlanHoldsButWhatLoadingNeeds) {
  sched::MemoryPlan plan;
  plan.set_capacity(sched::MemoryPlan::kHost, 10000, "a test");
  plan.add(sched::MemoryPlan::kHost, "weights", 1000);
  plan.add(sched::MemoryPlan::kHost, "weights on their way", 300);
  plan.add(sched::MemoryPlan::kHost, "KV pages", 70);
  plan.add(sched::MemoryPlan::kHost, "prefix checkpoints", 5);
  plan.add(0, "dense weights", 40);
  plan.add(0, "12 experts", 20);
  plan.add(0, "4 staged experts", 3);
  std::vector<MemoryTier> tiers = memory_tiers(plan, 900);
  ASSERT_EQ(tiers.size(), 2u);
  EXPECT_EQ(tiers[0].name, "gpu0");
  EXPECT_FALSE(tiers[0].capacity_bytes.has_value());
  EXPECT_EQ(tiers[0].part("experts").bytes, 20u);
  EXPECT_EQ(tiers[0].part("workspace").bytes, 3u);
  EXPECT_EQ(tiers[1].name, "ram");
  EXPECT_EQ(tiers[1].capacity_bytes, 10000u);
  EXPECT_EQ(tiers[1].part("weights").bytes, 100u);
  EXPECT_EQ(tiers[1].part("experts").bytes, 900u);
  EXPECT_EQ(tiers[1].part("kv").bytes, 70u);
  EXPECT_EQ(tiers[1].part("prefix").bytes, 5u);
}

int64_t sum(const ExpertPairs& pairs, size_t place, size_t phase) {
  const auto& groups = pairs.pairs[place][phase];
  return std::accumulate(groups.begin(), groups.end(), int64_t{0});
}

/// Counts of the demo model with some experts on a device, or without one, after two answers.
class Meters : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    test::ModelSetup setup;
    setup.prefix_cache_bytes = 64 << 20;
    if (GetParam()) setup.device = test::device_name();  // with 60 experts
    tokenizer_ = Tokenizer::load(setup.folder).value();
    engine_ = test::open_engine(setup);
    ASSERT_TRUE(engine_->start(*tokenizer_).ok());
  }
  EngineStats answered(int64_t choices) {
    EngineStats stats = engine_->stats();
    for (; stats.finished < choices || stats.running > 0; stats = engine_->stats()) std::this_thread::sleep_for(1ms);
    return stats;
  }
  void ask(const std::string& question) {
    const test::Answer answer = test::ask(*engine_, test::request_of(*tokenizer_, test::chat_prompt(question), 8));
    ASSERT_NE(answer.reason, FinishReason::error);
  }
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Engine> engine_;  // ends first
};

TEST_P(Meters, CountEveryTokenOfEveryStep) {
  const ExpertMap before = engine_->experts();
  EXPECT_EQ(std::accumulate(before.tokens.begin(), before.tokens.end(), uint64_t{0}), 0u)
      << "the loop's own first steps";
  ask("What is the capital of Norway?");
  ask("What is 3 + 4?");
  const EngineStats stats = answered(2);
  const StepMeasures& m = stats.measures;
  const ModelGeometry& g = engine_->geometry();
  const auto steps = std::accumulate(m.seconds.counts.begin(), m.seconds.counts.end(), uint64_t{0});
  EXPECT_EQ(steps, static_cast<uint64_t>(stats.steps));
  EXPECT_GT(m.seconds.sum, 0);
  EXPECT_LE(m.seconds.sum, stats.step_seconds * 1.01 + 1e-3);

  // A token of each answer is chosen and never fed.
  const int64_t tokens = stats.prompt_tokens + stats.answer_tokens - 2,
                pairs = tokens * g.n_activated_experts * g.n_layers;
  EXPECT_EQ(m.tokens.sum, static_cast<double>(tokens));
  EXPECT_EQ(sum(m.experts, 0, 0) + sum(m.experts, 1, 0) + sum(m.experts, 0, 1) + sum(m.experts, 1, 1), pairs);
  EXPECT_EQ(sum(m.experts, 0, 1) + sum(m.experts, 1, 1),
            (stats.answer_tokens - 2) * g.n_activated_experts * g.n_layers);
  const ExpertMap map = engine_->experts();
  ASSERT_EQ(map.tokens.size(), static_cast<size_t>(g.n_layers * g.n_routed_experts));
  EXPECT_EQ(std::accumulate(map.tokens.begin(), map.tokens.end(), uint64_t{0}), static_cast<uint64_t>(pairs));
  for (size_t i = 0; i < map.tokens.size(); ++i) EXPECT_EQ(map.tokens[i] > 0, map.recent[i] > 0) << i;

  EXPECT_GT(m.weight_bytes, 0u);
  EXPECT_EQ(std::accumulate(m.node_bytes.begin(), m.node_bytes.end(), uint64_t{0}), m.weight_bytes);
  const auto gaps = std::accumulate(stats.token_gaps.counts.begin(), stats.token_gaps.counts.end(), uint64_t{0});
  EXPECT_EQ(gaps, static_cast<uint64_t>(stats.answer_tokens - 2));
  EXPECT_GT(stats.recent.counts.answer_tokens, 0);
}

TEST_P(Meters, SayWhereExpertsAre) {
  ask("What is the capital of Norway?");
  const EngineStats stats = answered(1);
  const StepMeasures& m = stats.measures;
  const ExpertMap map = engine_->experts();
  const int64_t on_device = std::count(map.on_device.begin(), map.on_device.end(), 1);
  EXPECT_EQ(on_device, GetParam() ? 60 : 0);
  EXPECT_EQ(m.resident_experts, on_device);
  EXPECT_EQ(m.kv_on_host, !GetParam());
  EXPECT_EQ(m.kv_bytes > 0, !GetParam());
  const int64_t on_gpu = sum(m.experts, 0, 0) + sum(m.experts, 0, 1);
  EXPECT_EQ(on_gpu > 0, GetParam());

  std::vector<MemoryTier> tiers = engine_->memory_tiers(stats);
  ASSERT_EQ(tiers.size(), GetParam() ? 2u : 1u);
  EXPECT_EQ(tiers.back().name, "ram");
  EXPECT_GT(tiers.back().part("experts").bytes, tiers.back().part("weights").bytes / 4);
  MemoryTier& kv = tiers.front();  // the device keeps it, where there is one
  EXPECT_GT(kv.part("kv").bytes, 0u);
  EXPECT_LE(kv.part("kv").used_bytes.value(), kv.part("kv").bytes);
  EXPECT_LE(kv.part("kv").bytes, kv.capacity_bytes.value());
  if (GetParam()) {
    EXPECT_EQ(kv.part("experts").used_bytes, kv.part("experts").bytes) << "every slot is taken";
  }
}

TEST_P(Meters, TellCachedPromptsApart) {
  ask("What is the capital of Norway?");
  ask("What is the capital of Norway?");
  const EngineStats stats = answered(2);
  EXPECT_EQ(stats.fetched_tokens, 0);
  EXPECT_EQ(stats.kept_tokens, stats.admitted_tokens / 2 - 1) << "all but the last token of the second prompt";
  EXPECT_EQ(stats.prompt_tokens + stats.kept_tokens, stats.admitted_tokens);
}

std::vector<bool> with_a_device() {
#ifdef TC_SANITIZED  // minutes; gpu_step_test has the interpreted device there
  return {false};
#else
  return {false, true};
#endif
}

INSTANTIATE_TEST_SUITE_P(Engine, Meters, testing::ValuesIn(with_a_device()),
                         [](const auto& instance) { return instance.param ? "device" : "cpu"; });

}  // namespace
}  // namespace thermocline
