// Predictors, what their claims are worth, and the clock that decides.
#include "scheduler/predict/predictor.h"

#include <gtest/gtest.h>

#include <random>

#include "scheduler/predict/referee.h"
#include "scheduler/predict/reliability.h"
#include "scheduler/trace/synthetic.h"

namespace thermocline::sched {
namespace {

PredictorScore score_of(std::string_view name, const Trace& trace, int guesses) {
  for (const PredictorInfo& info : predictors())
    if (info.name == name) return score(*info.make(trace.header().layers, trace.header().experts), trace, guesses);
  ADD_FAILURE() << name;
  return {};
}

TEST(Predictors, FindWhatIsThereToFind) {
  const SyntheticOptions o{.layers = 4, .experts = 64, .top_k = 4, .hash_layers = 0};
  const Trace one = synthesize_trace(o, Workload::one, 1, 600), luck = synthesize_trace(o, Workload::uniform, 1, 600);
  for (const PredictorInfo& info : predictors()) {
    SCOPED_TRACE(info.name);
    EXPECT_GT(score_of(info.name, one, 4).recall, 2 * 4.0 / 64);
    EXPECT_NEAR(score_of(info.name, luck, 4).recall, 4.0 / 64, 0.03) << "there is nothing to know";
    EXPECT_GE(score_of(info.name, one, 16).recall, score_of(info.name, one, 4).recall);
  }
}

// The next layer's experts follow from this one's: popularity sees nothing of it.
TEST(Predictors, CoactivationSeesWhatFollows) {
  Trace trace({.model = "pairs", .layers = 2, .experts = 64, .top_k = 2});
  std::mt19937 random(3);
  for (uint32_t t = 0; t < 2000; ++t) {
    const auto a = static_cast<uint16_t>(random() % 32), b = static_cast<uint16_t>(32 + random() % 32);
    const TracePick picks[] = {{a, 0},
                               {b, 0},
                               {static_cast<uint16_t>((a * 7 + 5) % 32), 0},
                               {static_cast<uint16_t>(32 + (b * 5 + 1) % 32), 0}};
    trace.add({.step = t, .position = t}, picks);
  }
  EXPECT_GT(score_of("coactivation", trace, 2).recall, 0.45) << "all of layer 1, luck in layer 0";
  EXPECT_LT(score_of("popularity", trace, 2).recall, 0.15);
}

TEST(Predictors, RoutersAskedAheadKnowMoreThanCounts) {
  const SyntheticOptions o{.layers = 4, .experts = 64, .top_k = 4, .hash_layers = 0, .guesses = 8};
  const Trace trace = synthesize_trace(o, Workload::one, 1, 600);
  EXPECT_GT(score_of("router", trace, 4).recall, score_of("router-2", trace, 4).recall + 0.05);
  EXPECT_GT(score_of("router-2", trace, 4).recall, score_of("popularity", trace, 4).recall + 0.05);
}

// What a rank is worth is learned; without an answer popularity speaks.
TEST(Predictors, TheRouterLearnsWhatItsRanksAreWorth) {
  const auto predictor = make_router_predictor(1, 8);
  const TracePick said[] = {{2, 0}, {5, 0}, {TracePick::kNobody, 0}}, chosen[] = {{2, 0}};
  Known known;
  known.asked[0] = said;
  std::vector<Guess> out;
  for (int i = 0; i < 200; ++i) predictor->observe(0, known, chosen);
  predictor->guess(0, known, 8, out);
  ASSERT_EQ(out.size(), 2u) << "nobody is no expert";
  EXPECT_EQ(out[0].expert, 2);
  EXPECT_GT(out[0].p, 0.95f);
  EXPECT_EQ(out[1].expert, 5);
  EXPECT_LT(out[1].p, 0.05f);
  predictor->guess(0, {}, 1, out);
  ASSERT_EQ(out.size(), 1u);
  EXPECT_EQ(out[0].expert, 2) << "used most";
}

TEST(Predictors, HashLayersAreKnown) {
  const std::vector<int32_t> table = {1, 2, 3, 4, 5, 6};  // one layer, three tokens, two experts each
  const auto predictor = make_hash_predictor(table, 1, 3, 2);
  std::vector<Guess> out;
  predictor->guess(0, {.request = 0, .token_id = 1}, 8, out);
  ASSERT_EQ(out.size(), 2u);
  EXPECT_EQ(out[0].expert, 3);
  EXPECT_EQ(out[0].p, 1);
  predictor->guess(1, {.request = 0, .token_id = 1}, 8, out);
  EXPECT_TRUE(out.empty()) << "a layer that its router decides";
  predictor->guess(0, {.request = 0, .token_id = 3}, 8, out);
  EXPECT_TRUE(out.empty());
}

TEST(Reliability, LearnsWhatAClaimIsWorth) {
  Reliability reliability;
  EXPECT_NEAR(reliability.measured(0.9f), 0.9f, 1e-6);
  for (int i = 0; i < 2000; ++i) reliability.observe(0.9f, i % 4 == 0);
  EXPECT_NEAR(reliability.measured(0.9f), 0.25f, 0.02f);
  EXPECT_NEAR(reliability.measured(0.1f), 0.1f, 1e-6) << "other claims are their own";
}

// A box whose steps take 10 ms, `gain` less with speculation, and noise.
Referee::State verdict(double gain, double noise, uint32_t seed) {
  Referee referee;
  std::mt19937 random(seed);
  std::normal_distribution<double> luck(0, noise);
  for (int64_t step = 0; referee.state() == Referee::State::testing && step < 100'000; ++step)
    referee.step(1, 1e7 * (1 - (referee.on() ? gain : 0)) * std::exp(luck(random)), step);
  return referee.state();
}

TEST(Referee, KeepsWhatPaysAndNothingElse) {
  int on = 0;
  for (uint32_t seed = 0; seed < 20; ++seed) {
    EXPECT_EQ(verdict(0.1, 0.1, seed), Referee::State::on) << seed;
    EXPECT_EQ(verdict(-0.1, 0.1, seed), Referee::State::off) << seed;
    on += verdict(0, 0.2, seed) == Referee::State::on;
  }
  EXPECT_LE(on, 4) << "nothing gained: off, but for one in ten by luck";
}

TEST(Referee, AsksAgainAfterAnHour) {
  Referee referee;
  int64_t now = 0;
  while (referee.state() == Referee::State::testing) referee.step(128, referee.on() ? 2e9 : 1e9, now);
  EXPECT_EQ(referee.state(), Referee::State::off);
  EXPECT_FALSE(referee.on());
  referee.step(128, 1e9, now + Referee::kRetestNs - 1);
  EXPECT_EQ(referee.state(), Referee::State::off);
  referee.step(128, 1e9, now + Referee::kRetestNs);
  EXPECT_EQ(referee.state(), Referee::State::testing);
}

}  // namespace
}  // namespace thermocline::sched
