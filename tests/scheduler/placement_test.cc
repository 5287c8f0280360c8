// Expert policies and the cost model: pure functions, so the tests are traces and numbers.
#include "scheduler/placement/expert_policy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <set>

#include "scheduler/cost/expert_cost.h"
#include "scheduler/stats/slack.h"

namespace thermocline::sched {
namespace {

/// Slots kept by the rules of Residency: what a pool does with a policy's decisions.
class Slots {
 public:
  Slots(int layers, int experts, int slots)
      : layers_(layers), experts_(experts), slots_(slots), table_(static_cast<size_t>(layers * experts), -1) {
    for (int i = slots; i-- > 0;) free_.push_back(i);
  }
  Residency residency() const {
    const auto free = static_cast<int>(free_.size());
    return {table_, layers_, experts_, free, slots_ - free};
  }
  bool resident(const ExpertId& id) const { return residency().resident(id); }
  void apply(const std::vector<Admission>& plan) {
    std::set<std::pair<int, int>> filled, victims;
    for (const Admission& a : plan) {
      if (a.evicts()) {
        ASSERT_TRUE(resident(a.victim));
        ASSERT_TRUE(victims.insert({a.victim.layer, a.victim.expert}).second) << "a victim named twice";
        free_.push_back(slot(a.victim));
        slot(a.victim) = -1;
      }
      ASSERT_FALSE(resident(a.fill));
      ASSERT_TRUE(filled.insert({a.fill.layer, a.fill.expert}).second) << "filled twice";
      ASSERT_FALSE(free_.empty()) << "no slot for what the policy brings in";
      slot(a.fill) = free_.back();
      free_.pop_back();
    }
  }

 private:
  int32_t& slot(const ExpertId& id) { return table_[static_cast<size_t>(id.layer * experts_ + id.expert)]; }
  int layers_, experts_, slots_;
  std::vector<int32_t> table_;
  std::vector<int32_t> free_;
};

std::unique_ptr<ExpertPolicy> make(std::string_view name, PolicyOptions options) {
  return find_policy(name).value()->make(options);
}

/// A step of one token in one layer.
void use(ExpertPolicy& policy, Slots& slots, std::vector<int> experts, int max_fills = 16) {
  std::vector<ExpertUse> uses;
  for (const int e : experts) uses.push_back({{0, e}, 1});
  policy.observe({uses});
  slots.apply(policy.plan(slots.residency(), max_fills));
}

TEST(StaticPolicy, FillsEveryLayerEvenlyBeforeItHasSeenAnything) {
  Slots slots(3, 8, 7);
  auto policy = make("static", {.layers = 3, .experts = 8, .slots = 7});
  slots.apply(policy->plan(slots.residency(), 100));
  for (int layer = 0; layer < 3; ++layer)
    for (int expert = 0; expert < 2; ++expert) EXPECT_TRUE(slots.resident({layer, expert}));
  EXPECT_TRUE(slots.resident({0, 2}));
  EXPECT_FALSE(slots.resident({1, 2}));
}

TEST(StaticPolicy, FillsByTheProfileAndEvictsNothing) {
  Slots slots(2, 8, 3);
  std::vector<float> profile(16);
  profile[5] = 1;
  profile[8 + 2] = 9;
  profile[8 + 6] = 3;
  auto policy = make("static", {.layers = 2, .experts = 8, .slots = 3, .profile = profile});
  slots.apply(policy->plan(slots.residency(), 2));
  EXPECT_TRUE(slots.resident({1, 2}));
  EXPECT_TRUE(slots.resident({1, 6}));
  slots.apply(policy->plan(slots.residency(), 2));
  EXPECT_TRUE(slots.resident({0, 5}));
  policy->observe({std::vector<ExpertUse>{{{0, 0}, 1000}}});
  EXPECT_TRUE(policy->plan(slots.residency(), 2).empty());
}

TEST(LruPolicy, BringsInMissesForWhatWasUsedLongestAgo) {
  Slots slots(1, 6, 2);
  auto policy = make("lru", {.layers = 1, .experts = 6, .slots = 2});
  for (const int e : {0, 1, 0}) use(*policy, slots, {e});
  use(*policy, slots, {2});  // for 1
  EXPECT_TRUE(slots.resident({0, 0}));
  EXPECT_TRUE(slots.resident({0, 2}));
  use(*policy, slots, {3, 4, 5});  // two slots, three misses; neither 0 nor 2 is of this step
  EXPECT_FALSE(slots.resident({0, 0}) || slots.resident({0, 2}));
  const std::vector<int> here = [&] {
    std::vector<int> found;
    for (int e = 0; e < 6; ++e)
      if (slots.resident({0, e})) found.push_back(e);
    return found;
  }();
  ASSERT_EQ(here.size(), 2u);
  use(*policy, slots, {3, 4, 5});  // what the step itself used is no victim: the third waits
  for (const int e : here) EXPECT_TRUE(slots.resident({0, e}));
}

TEST(LruLayerPolicy, KeepsLayersApart) {
  Slots slots(2, 4, 4);
  auto policy = make("lru-layer", {.layers = 2, .experts = 4, .slots = 4});
  const auto step = [&](std::vector<ExpertUse> uses) {
    policy->observe({uses});
    slots.apply(policy->plan(slots.residency(), 16));
  };
  step({{{0, 0}, 1}, {{0, 1}, 1}, {{1, 0}, 1}, {{1, 1}, 1}});
  for (int i = 0; i < 3; ++i) step({{{0, 2}, 1}, {{0, 3}, 1}});
  EXPECT_TRUE(slots.resident({1, 0}) && slots.resident({1, 1})) << "layer 0 has slots of its own";
  EXPECT_TRUE(slots.resident({0, 2}) && slots.resident({0, 3}));
}

TEST(LfuPolicy, KeepsWhatWasUsedMost) {
  Slots slots(1, 4, 1);
  auto policy = make("lfu", {.layers = 1, .experts = 4, .slots = 1});
  for (int i = 0; i < 3; ++i) use(*policy, slots, {0});
  for (int i = 0; i < 3; ++i) use(*policy, slots, {1});
  EXPECT_TRUE(slots.resident({0, 0}));
  use(*policy, slots, {1});
  EXPECT_TRUE(slots.resident({0, 1}));
}

TEST(FreetokenPolicy, AdmitsWhatTheStepFetched) {
  Slots slots(1, 4, 1);
  auto policy = make("freetoken", {.layers = 1, .experts = 4, .slots = 1, .demand_share = 0.25});
  EXPECT_EQ(policy->demand_share(), 0.25);
  const std::vector<ExpertUse> uses = {{{0, 1}, 1}, {{0, 2}, 1}};
  policy->observe({uses});
  EXPECT_TRUE(policy->plan(slots.residency(), 16).empty());
  const std::vector<ExpertId> fetched = {{0, 2}};
  policy->observe({uses, 1, false, fetched});
  slots.apply(policy->plan(slots.residency(), 16));
  EXPECT_TRUE(slots.resident({0, 2}));
}

TEST(PrefillPolicy, ChoosesWhenAPromptEnds) {
  Slots slots(1, 4, 2);
  auto policy = make("prefill", {.layers = 1, .experts = 4, .slots = 2});
  const auto prompt = [&](std::vector<ExpertUse> uses) {
    policy->observe({uses, 10, true});
    slots.apply(policy->plan(slots.residency(), 16));
  };
  prompt({{{0, 0}, 9}, {{0, 1}, 5}, {{0, 2}, 1}});
  EXPECT_TRUE(slots.resident({0, 0}) && slots.resident({0, 1}));
  for (int i = 0; i < 5; ++i) use(*policy, slots, {2, 3});
  EXPECT_TRUE(slots.resident({0, 0}) && slots.resident({0, 1})) << "answers change nothing";
  prompt({{{0, 2}, 9}, {{0, 3}, 5}});
  EXPECT_TRUE(slots.resident({0, 2}) && slots.resident({0, 3}));
}

TEST(ValuePolicy, WantsASecondUseAndALeadBeforeItEvicts) {
  Slots slots(1, 6, 2);
  auto policy = make("eager", {.layers = 1, .experts = 6, .slots = 2});
  for (int i = 0; i < 8; ++i) use(*policy, slots, {0, 1});
  ASSERT_TRUE(slots.resident({0, 0}) && slots.resident({0, 1}));
  use(*policy, slots, {2});
  EXPECT_FALSE(slots.resident({0, 2})) << "once is no habit";
  for (int i = 0; i < 60; ++i) use(*policy, slots, {2, 3});
  EXPECT_TRUE(slots.resident({0, 2}) && slots.resident({0, 3})) << "what was used long ago goes";
}

TEST(ValuePolicy, EvictsNoMoreThanItsAllowance) {
  constexpr int kExperts = 64;
  Slots slots(1, kExperts, 8);
  auto policy = make("value", {.layers = 1, .experts = kExperts, .slots = 8, .demand_share = 0.1});
  std::mt19937 random(5);
  int64_t missed = 0, evicted = 0;
  for (int step = 0; step < 2000; ++step) {
    std::vector<ExpertUse> uses;
    const int base = step / 50 * 8 % kExperts;  // what is used moves on
    for (int e = base; e < base + 8; ++e)
      if (random() % 2 == 0) uses.push_back({{0, e}, 1});
    for (const ExpertUse& use : uses) missed += !slots.resident(use.id);
    policy->observe({uses});
    const std::vector<Admission> plan = policy->plan(slots.residency(), 16);
    for (const Admission& a : plan) evicted += a.evicts();
    slots.apply(plan);
  }
  EXPECT_GT(evicted, 0);
  EXPECT_LE(static_cast<double>(evicted), 0.25 * 0.1 * static_cast<double>(missed) + 1);
}

// Steps that may fill nothing go by; then the one resident that is used no more is the victim all the same.
TEST(ValuePolicy, LosesNobodyWhereNothingMayBeFilled) {
  Slots slots(1, 4, 2);
  auto policy = make("eager", {.layers = 1, .experts = 4, .slots = 2});
  for (int i = 0; i < 10; ++i) use(*policy, slots, {0, 1});
  for (int i = 0; i < 300; ++i) use(*policy, slots, {0, 1, 2}, 0);
  for (int i = 0; i < 300; ++i) use(*policy, slots, {2, 3});
  EXPECT_TRUE(slots.resident({0, 2}) && slots.resident({0, 3}));
}

// The owner of the slots does not do as planned: what is resident stays known.
TEST(Policies, SeeWhatWasNotDone) {
  for (const std::string name : {"lru", "eager"}) {
    Slots slots(1, 4, 2);
    auto policy = make(name, {.layers = 1, .experts = 4, .slots = 2});
    for (int i = 0; i < 10; ++i) use(*policy, slots, {0, 1});
    for (int i = 0; i < 40; ++i) {  // plans to swap, in vain
      policy->observe({std::vector<ExpertUse>{{{0, 2}, 1}, {{0, 3}, 1}}});
      (void)policy->plan(slots.residency(), 16);
    }
    use(*policy, slots, {2, 3});
    EXPECT_TRUE(slots.resident({0, 2}) && slots.resident({0, 3})) << name;
  }
}

TEST(Policies, KeepTheRulesOnRandomTracesAndReplayToTheSameDecisions) {
  for (const PolicyInfo& info : policies()) {
    SCOPED_TRACE(info.name);
    std::vector<std::vector<Admission>> decisions[2];
    for (auto& run : decisions) {
      std::mt19937 random(11);
      Slots slots(4, 16, 21);
      auto policy = info.make({.layers = 4, .experts = 16, .slots = 21});
      for (int step = 0; step < 400; ++step) {
        std::vector<ExpertUse> uses;
        std::vector<ExpertId> fetched;
        for (int layer = 0; layer < 4; ++layer)
          for (int expert = 0; expert < 16; ++expert)
            if (random() % 5 == 0) {
              uses.push_back({{layer, expert}, 1 + static_cast<int>(random() % 3)});
              if (random() % 4 == 0 && !slots.resident({layer, expert})) fetched.push_back({layer, expert});
            }
        policy->observe({uses, 3, step % 50 == 0, fetched});
        const int most = static_cast<int>(random() % 6);
        const std::vector<Admission> plan = policy->plan(slots.residency(), most);
        ASSERT_LE(plan.size(), static_cast<size_t>(most));
        slots.apply(plan);
        run.push_back(plan);
      }
    }
    EXPECT_EQ(decisions[0], decisions[1]);
  }
}

TEST(Policies, AreNamed) {
  EXPECT_EQ(find_policy("lru").value()->name, "lru");
  const auto none = find_policy("clock");
  ASSERT_FALSE(none);
  EXPECT_EQ(none.error().code, ErrorCode::invalid_argument);
  EXPECT_NE(none.error().message.find("value"), std::string::npos) << none.error().message;
}

// --- costs ---

ExpertCosts costs(double cpu_ns_a_token, double gpu_ns, double h2d_ns) {
  std::array<double, 5> cpu{}, gpu{};
  for (size_t i = 0; i < 5; ++i) {
    cpu[i] = cpu_ns_a_token * ExpertTime::kTokens[i];
    gpu[i] = gpu_ns;
  }
  return {ExpertTime(cpu), ExpertTime(gpu), h2d_ns, 0};
}

TEST(ExpertCost, TimesAreMeasuredAtPointsAndLogLinearBetween) {
  const ExpertTime time({100, 200, 800, 1600, 6400});
  EXPECT_NEAR(time.ns(1), 100, 1e-9);
  EXPECT_NEAR(time.ns(8), 200, 1e-6);
  EXPECT_NEAR(time.ns(16), 400, 1e-6);
  EXPECT_NEAR(time.ns(1024), 12800, 1e-6);
  EXPECT_LT(time.ns(3), time.ns(4));
}

TEST(ExpertCost, TheCrossoverIsWhereACopyBeatsTheCpu) {
  EXPECT_NEAR(static_cast<double>(costs(100, 500, 20000).crossover()), 205, 15);  // 100 n > 20,500
  EXPECT_EQ(costs(1e-9, 500, 20000).crossover(), 0);
}

TEST(ExpertCost, StreamsNothingWhereTheCpuIsFasterAndTheHeaviestFirstElsewhere) {
  const std::vector<int64_t> missing = {10, 400, 30, 400, 5}, resident = {50, 50};
  EXPECT_TRUE(choose_streamed(missing, resident, costs(1, 500, 1e6)).empty());
  const std::vector<int> streamed = choose_streamed(missing, resident, costs(100, 500, 20000));
  ASSERT_FALSE(streamed.empty());
  EXPECT_EQ(streamed[0], 1) << "a tie goes to the lower index";
  for (size_t i = 1; i < streamed.size(); ++i)
    EXPECT_GE(missing[static_cast<size_t>(streamed[i - 1])], missing[static_cast<size_t>(streamed[i])]);
  EXPECT_EQ(choose_streamed(missing, resident, costs(1e6, 1, 1)).size(), missing.size()) << "a slow CPU gets nothing";
  EXPECT_TRUE(choose_streamed({}, resident, costs(100, 500, 20000)).empty());
}

// The prefix is what an exhaustive search over prefixes finds, up to where adding one more stops paying.
TEST(ExpertCost, APrefixNeverMakesTheLayerSlower) {
  std::mt19937 random(3);
  for (int trial = 0; trial < 200; ++trial) {
    std::vector<int64_t> missing(1 + random() % 20), resident(random() % 10);
    for (int64_t& n : missing) n = 1 + static_cast<int64_t>(random() % 300);
    for (int64_t& n : resident) n = 1 + static_cast<int64_t>(random() % 300);
    const ExpertCosts c = costs(20 + random() % 200, 100 + random() % 2000, 1000 + random() % 30000);
    const auto makespan = [&](const std::vector<int>& streamed) {
      double device = 0, cpu = 0, copies = 0, last = 0;
      for (const int64_t n : resident) device += c.gpu.ns(n);
      std::vector<bool> moved(missing.size());
      for (const int i : streamed) {
        moved[static_cast<size_t>(i)] = true;
        copies += c.h2d_ns;
        device += c.gpu.ns(missing[static_cast<size_t>(i)]);
        last = copies + c.gpu.ns(missing[static_cast<size_t>(i)]);
      }
      for (size_t i = 0; i < missing.size(); ++i) cpu += moved[i] ? 0 : c.cpu.ns(missing[i]);
      return std::max({device, cpu, last});
    };
    EXPECT_LE(makespan(choose_streamed(missing, resident, c)), makespan({}) * (1 + 1e-9));
  }
}

// --- slack ---

// 100 ns of the CPU and 30 of the device an expert, 50 for the handover.
ExpertCosts flat_costs() {
  ExpertCosts c;
  c.cpu = ExpertTime({100, 100, 100, 100, 100});
  c.gpu = ExpertTime({30, 30, 30, 30, 30});
  c.sync_ns = 50;
  return c;
}

LayerBranches branches(int missing, int resident, const ExpertCosts& costs) {
  LayerBranches step;
  for (int i = 0; i < missing; ++i) step.add(false, 1, costs);
  for (int i = 0; i < resident; ++i) step.add(true, 1, costs);
  return step;
}

TEST(LayerSlack, IsTheArithmeticOfItsSteps) {
  const ExpertCosts c = flat_costs();
  LayerSlack slack;
  EXPECT_EQ(slack.mean_ns(), 0);
  EXPECT_EQ(slack.cpu_critical(), 0);
  for (int i = 0; i < 2000; ++i) slack.observe(branches(i % 4 == 0 ? 0 : i % 4 == 1 ? 1 : 3, 2, c), c);
  // -60, 90, 290, 290: newer steps count for a little more.
  EXPECT_NEAR(slack.mean_ns(), 152.5, 3);
  EXPECT_NEAR(slack.cpu_critical(), 0.75, 0.01);
  EXPECT_NEAR(slack.missing(0), 0.25, 0.01);
  EXPECT_NEAR(slack.missing(1), 0.25, 0.01);
  EXPECT_NEAR(slack.missing(3), 0.5, 0.01);
  EXPECT_NEAR(slack.only_miss(), 0.25, 0.01);
  EXPECT_NEAR(slack.saved_ns(c), 0.75 * 100 + 0.25 * 50 - 0.25 * 30, 1.5);
  slack.observe(branches(50, 0, c), c);
  EXPECT_GT(slack.missing(LayerSlack::kBins - 1), 0) << "that many and more";
  LayerSlack busy;
  busy.observe(branches(1, 6, c), c);
  EXPECT_EQ(busy.missing(1), 1);
  EXPECT_EQ(busy.only_miss(), 0) << "the device is not done before the CPU is";
  EXPECT_NEAR(busy.saved_ns(c), -30, 1e-9);
}

TEST(LayerSlack, ForgetsByHalfLives) {
  const ExpertCosts c = flat_costs();
  LayerSlack slack;
  for (int i = 0; i < 2000; ++i) slack.observe(branches(4, 0, c), c);
  EXPECT_NEAR(slack.cpu_critical(), 1, 1e-9);
  for (int i = 0; i < static_cast<int>(LayerSlack::kHalfLife); ++i) slack.observe(branches(0, 4, c), c);
  EXPECT_NEAR(slack.cpu_critical(), 0.5, 1e-3);
  for (int i = 0; i < 2000; ++i) slack.observe(branches(0, 4, c), c);
  EXPECT_NEAR(slack.saved_ns(c), -30, 1e-6) << "steps wait for the device";
}

// Twelve residents and one miss keep the device busy for longer than the CPU; twelve misses and one resident do not.
TEST(ValuePolicy, FillsNothingWhileStepsWaitForTheDevice) {
  constexpr int kResident = 12;
  const ExpertCosts c = flat_costs();
  for (const std::string name : {"value", "eager"})
    for (const ExpertCosts* known : {&c, static_cast<const ExpertCosts*>(nullptr)}) {
      Slots slots(1, 48, kResident);
      auto policy = make(name, {.layers = 1, .experts = 48, .slots = kResident, .demand_share = 1, .costs = known});
      std::vector<int> residents(kResident), others(kResident);
      std::iota(residents.begin(), residents.end(), 0);
      std::iota(others.begin(), others.end(), 24);
      for (int i = 0; i < 200; ++i) use(*policy, slots, residents);
      // They are used less and less, a newcomer in every step: it should get a place.
      std::vector<int> mixed = residents;
      mixed.push_back(20);
      for (int i = 0; i < 200; ++i) use(*policy, slots, mixed);
      residents.pop_back();
      mixed = residents;
      mixed.push_back(20);
      for (int i = 0; i < 200; ++i) use(*policy, slots, mixed);
      EXPECT_EQ(slots.resident({0, 20}), known == nullptr) << name;
      for (int i = 0; i < 400; ++i) use(*policy, slots, others);
      EXPECT_TRUE(slots.resident({0, 24})) << name << ": the CPU is what steps wait for now";
    }
}

}  // namespace
}  // namespace thermocline::sched
