// What is read ahead, counted; and when, by the clock.
#include "runtime/exec/expert_prefetch.h"

#include <gtest/gtest.h>

#include "tests/support/models.h"

namespace thermocline {
namespace {

using Mode = ExpertPrefetch::Mode;

TEST(ExpertPrefetch, IsOnForFewTokensOnly) {
  ExpertPrefetch off({.mode = Mode::off}, 8), on({.mode = Mode::on}, 8);
  EXPECT_FALSE(off.on(1));
  EXPECT_TRUE(on.on(8));
  EXPECT_FALSE(on.on(9)) << "the CPU has no time to spare";
  EXPECT_EQ(ExpertPrefetch::parse("auto").value(), Mode::automatic);
  EXPECT_NE(ExpertPrefetch::parse("perhaps").error().message.find("use off, auto or on"), std::string::npos);
}

TEST(ExpertPrefetch, TheClockDecides) {
  for (const double gain : {0.2, -0.2}) {
    ExpertPrefetch prefetch({.mode = Mode::automatic}, 8);
    int with = 0, steps = 0;
    for (; prefetch.verdict() == sched::Referee::State::testing && steps < 100'000; ++steps) {
      with += prefetch.on(1);
      // Windows differ a little: equal ones would have no spread to judge by.
      prefetch.stepped(1, (1e6 + steps / 128 % 7 * 1e3) * (prefetch.on(1) ? 1 - gain : 1), steps);
      prefetch.stepped(64, 1e9, steps);  // long steps are none of its business
    }
    EXPECT_NEAR(2.0 * with / steps, 1, 0.1) << "windows take turns";
    EXPECT_EQ(prefetch.verdict(), gain > 0 ? sched::Referee::State::on : sched::Referee::State::off);
    EXPECT_EQ(prefetch.on(1), gain > 0);
  }
}

// Of the guesses those that are missing, once each, as many as the caches hold.
TEST(ExpertPrefetch, CountsWhatItReadAndWhatWasNeeded) {
  const std::unique_ptr<Engine> engine = test::open_engine({.context = 64});
  const std::vector<cpu::ExpertWeights>& experts = engine->weights().layers[0].experts;
  const cpu::CpuContext cpu{engine->pool(), engine->kernels()};
  const auto bytes = static_cast<int64_t>(experts[0].bytes());
  const auto never = [] { return false; };
  const std::vector<int32_t> guesses = {7, -1, 3, 7, 999, 5, 2};
  const auto missing = [](int32_t e) { return e != 5; };
  ExpertPrefetch prefetch({.mode = Mode::on, .worker_bytes = 4 * bytes}, static_cast<int>(experts.size()));
  prefetch.stage(cpu, experts, guesses, missing, never);
  EXPECT_EQ(prefetch.staged(), 3) << "7, 3 and 2";
  EXPECT_EQ(prefetch.staged_whole(), 3);
  const std::vector<int32_t> asked = {-1, 3, 6, 3};
  prefetch.missed(asked);
  EXPECT_EQ(prefetch.right(), 1) << "however many tokens ask for it";
  prefetch.missed(asked);
  EXPECT_EQ(prefetch.right(), 1) << "that layer is over";
  ExpertPrefetch small({.mode = Mode::on, .worker_bytes = bytes}, static_cast<int>(experts.size()));
  small.stage(cpu, experts, guesses, missing, never);
  EXPECT_EQ(small.staged(), 2) << "one a worker; the likeliest";
  small.missed(guesses);
  EXPECT_EQ(small.right(), 2);
}

}  // namespace
}  // namespace thermocline
