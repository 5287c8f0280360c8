// What moves between steps: the routers' ids counted, the policy asked, fills within the time that copies have.
#include "scheduler/placement/slot_scheduler.h"

#include <gtest/gtest.h>

namespace thermocline::sched {
namespace {

/// Keeps what it is told, and fills whatever it may.
class Spy final : public ExpertPolicy {
 public:
  explicit Spy(std::vector<ExpertUse>& uses, int& most) : uses_(uses), most_(most) {}
  void observe(const StepUses& step) override { uses_.assign(step.uses.begin(), step.uses.end()); }
  std::vector<Admission> plan(const Residency&, int max_fills) override {
    most_ = max_fills;
    return {};
  }

 private:
  std::vector<ExpertUse>& uses_;
  int& most_;
};

struct Watched {
  std::vector<ExpertUse> uses;
  int most = -1;
  std::unique_ptr<SlotScheduler> scheduler;
  explicit Watched(const SlotScheduler::Options& o) : scheduler(SlotScheduler::create(o).value()) {
    scheduler->set_policy(std::make_unique<Spy>(uses, most));
  }
};

const SlotScheduler::Options kTwoLayers{.of = {.layers = 2, .experts = 8, .slots = 4}, .max_fills = 16};

TEST(SlotScheduler, CountsWhatTheRoutersChose) {
  Watched w(kTwoLayers);
  const int32_t first[] = {3, 1, 3, 7}, second[] = {0, 2, 5, 4};
  const int32_t* const ids[] = {first, second};
  for (int round = 0; round < 2; ++round) {  // nothing is left of the step before
    w.scheduler->observe(ids, 2, 2, false);
    ASSERT_EQ(w.uses.size(), 7u);
    EXPECT_EQ(w.uses[0].id, (ExpertId{0, 1}));
    EXPECT_EQ(w.uses[1].id, (ExpertId{0, 3}));
    EXPECT_EQ(w.uses[1].tokens, 2);
    EXPECT_EQ(w.uses[2].id, (ExpertId{0, 7}));
    EXPECT_EQ(w.uses[3].id, (ExpertId{1, 0})) << "in rising order, layer after layer";
    EXPECT_EQ(w.uses[6].id, (ExpertId{1, 5}));
  }
}

TEST(SlotScheduler, FillsHaveTheTimeThatCopiesLeave) {
  const std::vector<int32_t> table(16, -1);
  const Residency residency{table, 2, 8, 4, 0};
  SlotScheduler::Options o = kTwoLayers;
  Watched unknown(o);
  (void)unknown.scheduler->plan(residency, 0);
  EXPECT_EQ(unknown.most, 16) << "nothing is known of the bus";
  o.fill_ns = 100;
  Watched known(o);
  (void)known.scheduler->plan(residency, 1000);
  EXPECT_EQ(known.most, 7) << "0.7 of ten";
  (void)known.scheduler->plan(residency, 1e9);
  EXPECT_EQ(known.most, 16);
  (void)known.scheduler->plan(residency, 0);
  EXPECT_EQ(known.most, 0);
  (void)known.scheduler->plan(residency, 0, 3);
  EXPECT_EQ(known.most, 3) << "what the step fetched is there already";
}

TEST(SlotScheduler, BeginsWithWhatTheProfileUsesMost) {
  SlotScheduler::Options o = kTwoLayers;
  o.policy = "value";
  o.of.profile.assign(16, 1);
  o.of.profile[5] = 9;
  o.of.profile[8 + 2] = 7;
  const std::vector<int32_t> table(16, -1);
  const auto scheduler = SlotScheduler::create(o).value();
  const std::vector<Admission> first = scheduler->first({table, 2, 8, 4, 0});
  ASSERT_EQ(first.size(), 4u);
  EXPECT_EQ(first[0].fill, (ExpertId{0, 5}));
  EXPECT_EQ(first[1].fill, (ExpertId{1, 2}));
  EXPECT_TRUE(scheduler->moves());
  EXPECT_FALSE(SlotScheduler::create(kTwoLayers).value()->moves()) << "static";
}

TEST(SlotScheduler, RefusesWhatThereIsNot) {
  SlotScheduler::Options o = kTwoLayers;
  o.policy = "lucky";
  EXPECT_NE(SlotScheduler::create(o).error().message.find("unknown expert policy 'lucky'"), std::string::npos);
  o.policy = "belady";
  EXPECT_NE(SlotScheduler::create(o).error().message.find("needs a trace"), std::string::npos);
}

TEST(IdleCopies, AreOfTheBucket) {
  const IdleCopies idle{.fill_ns = 1, .idle_ns = {1, 2, 3, 4, 5}};
  const std::pair<int64_t, double> expected[] = {{1, 1}, {2, 2}, {3, 3},  {4, 3},  {5, 4},
                                                 {8, 4}, {9, 5}, {16, 5}, {512, 5}};
  for (const auto& [tokens, ns] : expected) EXPECT_EQ(idle.idle(tokens), ns) << tokens;
}

TEST(PrefillExperts, StreamTakesTheHeaviestFirst) {
  const std::vector<int64_t> tokens = {4, 0, 9, 4, 7};
  const std::vector<bool> on_device = {false, false, false, false, true};
  EXPECT_EQ(split_layer(PrefillExperts::stream, tokens, on_device, {}).streamed, (std::vector<int>{2, 0, 3}));
  EXPECT_TRUE(split_layer(PrefillExperts::cpu, tokens, on_device, {}).streamed.empty());
  ExpertCosts costs{ExpertTime({100, 800, 3200, 12800, 51200}), ExpertTime({1, 1, 1, 1, 1}), 500, 0};
  EXPECT_EQ(split_layer(PrefillExperts::hybrid, tokens, on_device, costs).streamed, (std::vector<int>{2}))
      << "the copy of the heaviest hides behind the others";
}

// A device that would end last gives its lightest residents back; one that waits for the CPU anyway keeps them.
TEST(PrefillExperts, LightResidentsGoBackToAnIdleCpu) {
  const std::vector<int64_t> tokens = {40, 2, 3, 0, 1};
  const std::vector<bool> all(5, true);
  const auto flat = [](double ns) { return ExpertTime({ns, ns, ns, ns, ns}); };
  const LayerSplit slow_device = split_layer(PrefillExperts::hybrid, tokens, all, {flat(50), flat(100), 1000, 20});
  EXPECT_EQ(slow_device.returned, (std::vector<int>{4, 1, 2}))
      << "400 and 0; 300 and 70; 200 and 120; 100 and 170; no more: 0 and 220";
  EXPECT_TRUE(slow_device.streamed.empty());
  EXPECT_TRUE(split_layer(PrefillExperts::hybrid, tokens, all, {flat(1000), flat(100), 1000, 20}).returned.empty());
  EXPECT_TRUE(split_layer(PrefillExperts::stream, tokens, all, {flat(50), flat(100), 1000, 20}).returned.empty());
}

}  // namespace
}  // namespace thermocline::sched
