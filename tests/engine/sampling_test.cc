// runtime/engine/sampling: every choice against a plain full sort, what the parameters promise, damaged rows.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <map>
#include <numeric>
#include <random>

#include "runtime/engine/sampling/sampler.h"
#include "runtime/hw/worker_pool.h"

namespace thermocline {
namespace {

using sampling::Weighting;

constexpr float kNan = NAN, kInf = INFINITY;

SamplingParams params(double temperature) {
  SamplingParams p;
  p.temperature = temperature;
  p.seed = 7;
  p.has_seed = true;
  return p;
}

int32_t sample(Sampler& sampler, const std::vector<float>& logits, const std::vector<int32_t>& banned = {}) {
  static SamplingScratch scratch;
  return sampler.sample(logits, {.top_logprobs = -1, .banned = banned}, scratch).value().id;
}

std::vector<int> histogram(const SamplingParams& p, const std::vector<float>& logits, int draws) {
  Sampler sampler(p, {});
  std::vector<int> counts(logits.size());
  for (int i = 0; i < draws; ++i) ++counts[static_cast<size_t>(sample(sampler, logits))];
  return counts;
}

enum class Shape { normal, wide, peaked, flat, tied, low };
constexpr Shape kShapes[] = {Shape::normal, Shape::wide, Shape::peaked, Shape::flat, Shape::tied, Shape::low};

std::vector<float> make_row(std::mt19937& random, Shape shape, int64_t vocab) {
  std::normal_distribution<float> normal;
  std::vector<float> row(static_cast<size_t>(vocab));
  for (float& x : row) {
    x = normal(random);
    if (shape == Shape::wide) x *= 12;
    if (shape == Shape::peaked && random() % 50 == 0) x += 14;
    if (shape == Shape::flat) x = -3.5f;
    if (shape == Shape::tied) x = std::floor(3 * x) / 2;
    if (shape == Shape::low) x = -1e30f * std::fabs(x);
  }
  return row;
}

/// The plain way: sort everything, then walk. Draws the same random numbers as a Sampler of these parameters.
class FullSort {
 public:
  explicit FullSort(const SamplingParams& p) : params_(p), random_(p.seed) {}

  std::vector<int32_t> kept(const std::vector<float>& row) {
    order_.resize(row.size());
    std::iota(order_.begin(), order_.end(), 0);
    const auto at = [&](int32_t id) { return row[static_cast<size_t>(id)]; };
    std::stable_sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) { return at(a) > at(b); });
    const Weighting weighting =
        Weighting::of(static_cast<int64_t>(row.size()), at(order_[0]), params_.temperature, params_.min_p);
    if (params_.top_k > 0 && order_.size() > static_cast<size_t>(params_.top_k))
      order_.resize(static_cast<size_t>(params_.top_k));
    std::erase_if(order_, [&](int32_t id) { return weighting(at(id)) == 0; });
    masses_.clear();
    double mass = 0;
    for (const int32_t id : order_) masses_.push_back(mass += static_cast<double>(weighting(at(id))));
    if (params_.top_p < 1) {
      size_t count = 0;
      while (masses_[count++] < params_.top_p * mass) {
      }
      order_.resize(count);
    }
    return order_;
  }
  int32_t sample(const std::vector<float>& row) {
    const std::vector<int32_t> ids = kept(row);
    const double target = static_cast<double>(random_() >> 11) * 0x1p-53 * masses_[ids.size() - 1];
    size_t i = 0;
    while (masses_[i] <= target) ++i;
    return ids[i];
  }

 private:
  const SamplingParams params_;
  std::mt19937_64 random_;
  std::vector<int32_t> order_;
  std::vector<double> masses_;
};

std::vector<SamplingParams> filters(std::mt19937& random, int64_t vocab) {
  std::vector<SamplingParams> out;
  for (const double temperature : {0.05, 1.0, 3.0})
    for (const double top_p : {1e-9, 0.3, 0.9, 0.999, 1.0})
      for (const int64_t top_k : {int64_t{0}, int64_t{1}, 1 + static_cast<int64_t>(random() % 200), vocab - 1, vocab})
        for (const double min_p : {0.0, 0.02, 1.0}) {
          SamplingParams p = params(temperature);
          p.top_p = top_p;
          p.top_k = top_k;
          p.min_p = min_p;
          p.seed = random();
          out.push_back(p);
        }
  return out;
}

// Every vocabulary size around blocks and lanes, every shape and filter: token for token what the full sort gives.
TEST(Sampler, DrawsWhatAFullSortDraws) {
  std::mt19937 random(31);
  for (const int64_t vocab : {1, 2, 3, 4, 5, 63, 64, 65, 127, 129, 1000, 4097})
    for (const Shape shape : kShapes) {
      const std::vector<float> row = make_row(random, shape, vocab);
      for (const SamplingParams& p : filters(random, vocab)) {
        if (vocab > 200 && random() % 8 != 0) continue;  // the full sort is what takes the time
        Sampler sampler(p, {});
        FullSort reference(p);
        for (int draw = 0; draw < 3; ++draw)
          ASSERT_EQ(sample(sampler, row), reference.sample(row))
              << "vocab " << vocab << " shape " << static_cast<int>(shape) << " T " << p.temperature << " top_p "
              << p.top_p << " top_k " << p.top_k << " min_p " << p.min_p << " draw " << draw;
      }
    }
}

TEST(Sampler, DrawsWhatAFullSortDrawsOverAWholeVocabulary) {
  std::mt19937 random(32);
  for (const int64_t vocab : {129280, 131072, 131073})
    for (const Shape shape : kShapes) {
      const std::vector<float> row = make_row(random, shape, vocab);
      std::vector<SamplingParams> some = filters(random, vocab);
      std::shuffle(some.begin(), some.end(), random);
      some.resize(4);
      for (const SamplingParams& p : some) {
        Sampler sampler(p, {});
        FullSort reference(p);
        for (int draw = 0; draw < 2; ++draw) ASSERT_EQ(sample(sampler, row), reference.sample(row));
      }
    }
}

// The two ends of the kept set, by the mass in front of them rather than by luck of the draw.
TEST(SelectMass, TheCutKeepsWhatAFullSortKeeps) {
  std::mt19937 random(33);
  SamplingScratch scratch;
  for (const int64_t vocab : {1, 65, 1000, 20000})
    for (const Shape shape : kShapes)
      for (const double top_p : {0.1, 0.5, 0.95, 0.9999}) {
        const std::vector<float> row = make_row(random, shape, vocab);
        scratch.fit(row.size());
        const sampling::RowScan scan = sampling::scan_row(row, scratch.block_max);
        const Weighting weighting = Weighting::of(vocab, scan.best, 0.7, 0);
        scratch.histogram.fill(row, weighting);
        const double total = scratch.histogram.total();
        EXPECT_EQ(total, sampling::total_weight(row, weighting));  // exact sums: the order does not matter
        SamplingParams p = params(0.7);
        p.top_p = top_p;
        const std::vector<int32_t> kept = FullSort(p).kept(row);
        const auto find = [&](double mass) {
          return scratch.histogram.find(row, scratch.block_max, weighting, mass, scratch.candidates);
        };
        const sampling::Cut last = find(std::nextafter(top_p * total, 0.0));
        double mass = 0;
        for (const int32_t id : kept) mass += static_cast<double>(weighting(row[static_cast<size_t>(id)]));
        EXPECT_EQ(last.id, kept.back());
        EXPECT_EQ(last.mass, mass);
        EXPECT_EQ(find(0).id, kept.front());
      }
}

TEST(SelectFirst, TakesTheFirstOfAFullSort) {
  std::mt19937 random(34);
  SamplingScratch scratch;
  for (const int64_t vocab : {1, 64, 65, 700, 5000})
    for (const Shape shape : kShapes)
      for (const int64_t n :
           {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{20}, vocab / 2, vocab - 1, vocab, vocab + 1}) {
        std::vector<float> row = make_row(random, shape, vocab);
        if (vocab > 64) row[3] = row.back() = -kInf;  // never among the first
        scratch.fit(row.size());
        sampling::scan_row(row, scratch.block_max);
        const auto got = sampling::select_first(row, scratch.block_max, n, scratch.spare_max, scratch.candidates);
        std::vector<int32_t> order(row.size()), ids;
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
          return row[static_cast<size_t>(a)] > row[static_cast<size_t>(b)];
        });
        std::erase_if(order, [&](int32_t id) { return row[static_cast<size_t>(id)] == -kInf; });
        order.resize(std::min<size_t>(order.size(), static_cast<size_t>(n)));
        for (const sampling::Candidate& c : got) ids.push_back(c.id);
        std::sort(ids.begin(), ids.end());
        std::sort(order.begin(), order.end());
        ASSERT_EQ(ids, order) << "vocab " << vocab << " shape " << static_cast<int>(shape) << " n " << n;
      }
}

TEST(Weights, AreExpWithinTheirErrorAndExactInSums) {
  const Weighting weighting = Weighting::of(129280, 5, 1, 0);
  double worst = 0;
  for (int i = 0; i <= 260000; ++i) {
    const float logit = 5 - static_cast<float>(i) * 1e-4f;
    const double expected = std::exp(static_cast<double>(logit) - 5), got = static_cast<double>(weighting(logit));
    worst = std::max(worst, std::fabs(got - expected) / (3e-7 * expected + 0x1p-37));
    ASSERT_EQ(std::ldexp(got, 36), std::floor(std::ldexp(got, 36))) << logit;
    ASSERT_LE(got, 1);
  }
  EXPECT_LT(worst, 1);
  EXPECT_EQ(weighting(5), 1);
  EXPECT_EQ(weighting(-kInf), 0);
  EXPECT_EQ(weighting(-FLT_MAX), 0);
  for (const double x : {1.0, 1.0000001, 2.0, 3.7, 129280.0, 3e7})
    EXPECT_NEAR(sampling::log_of(x), std::log(x), 1e-15 * (1 + std::log(x))) << x;
}

// The bits of weights and sums on one machine, written down: another instruction set must give the same.
TEST(Weights, HaveTheBitsOfEveryMachine) {
  const Weighting weighting = Weighting::of(129280, 0, 0.7, 0);
  uint64_t hash = 14695981039346656037u;
  for (int i = 0; i < 20000; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(weighting(-static_cast<float>(i) / 1024));
    hash = (hash ^ bits) * 1099511628211u;
  }
  EXPECT_EQ(hash, 4410761468623651754u);
}

TEST(Sampler, ZeroTemperatureTakesTheBestAndTheLowerIdAmongEquals) {
  Sampler sampler(params(0), {});
  EXPECT_EQ(sample(sampler, {1, 3, 3, 2}), 1);
  EXPECT_EQ(sample(sampler, {-0.0f, 0.0f}), 0);
  std::mt19937 random(35);
  for (const int64_t vocab : {1, 5, 64, 65, 129, 1000})
    for (const Shape shape : kShapes) {
      const std::vector<float> row = make_row(random, shape, vocab);
      EXPECT_EQ(sample(sampler, row), std::max_element(row.begin(), row.end()) - row.begin());
    }
}

TEST(Sampler, DrawsFollowTheDistribution) {
  const std::vector<float> logits = {0, std::log(2.0f), std::log(5.0f)};
  const std::vector<int> counts = histogram(params(1), logits, 40000);
  EXPECT_NEAR(counts[0], 5000, 400);
  EXPECT_NEAR(counts[1], 10000, 500);
  const std::vector<int> hot = histogram(params(100), logits, 30000);
  EXPECT_NEAR(hot[0], 10000, 500);
  EXPECT_EQ(histogram(params(1e-300), logits, 100)[2], 100);
}

TEST(Sampler, FiltersKeepWhatTheySay) {
  const std::vector<float> logits = {0, std::log(2.0f), std::log(5.0f)};  // 1/8, 2/8, 5/8
  SamplingParams top_k = params(1);
  top_k.top_k = 2;
  EXPECT_EQ(histogram(top_k, logits, 2000)[0], 0);
  EXPECT_GT(histogram(top_k, logits, 2000)[1], 0);
  SamplingParams top_p = params(1);
  top_p.top_p = 0.6;
  EXPECT_EQ(histogram(top_p, logits, 2000)[2], 2000);
  top_p.top_p = 0.7;
  EXPECT_GT(histogram(top_p, logits, 2000)[1], 0);
  EXPECT_EQ(histogram(top_p, logits, 2000)[0], 0);
  SamplingParams min_p = params(1);
  min_p.min_p = 0.3;
  EXPECT_EQ(histogram(min_p, logits, 2000)[0], 0);
  EXPECT_GT(histogram(min_p, logits, 2000)[1], 0);
}

TEST(Sampler, PenaltiesPushDownWhatWasSeen) {
  SamplingParams p = params(0);
  p.repetition_penalty = 2;
  const std::vector<int32_t> prompt = {1, 99, -1};  // ids outside the row are passed over
  Sampler repetition(p, prompt);
  EXPECT_EQ(sample(repetition, {2.0f, 3.0f}), 0);
  Sampler negative(p, prompt);
  EXPECT_EQ(sample(negative, {-3.0f, -2.0f}), 0);  // -2 times 2 is below -3
  p = params(0);
  p.presence_penalty = 1;
  Sampler presence(p, prompt);  // the prompt does not count
  EXPECT_EQ(sample(presence, {2.5f, 3.0f}), 1);
  EXPECT_EQ(sample(presence, {2.5f, 3.0f}), 0);
  p = params(0);
  p.frequency_penalty = 0.3;
  Sampler frequency(p, {});
  EXPECT_EQ(sample(frequency, {2.5f, 3.0f}), 1);
  EXPECT_EQ(sample(frequency, {2.5f, 3.0f}), 1);
  EXPECT_EQ(sample(frequency, {2.5f, 3.0f}), 0);
  Sampler accepted(p, {});
  accepted.accept(1);
  accepted.accept(1);
  EXPECT_EQ(sample(accepted, {2.5f, 3.0f}), 0);
}

TEST(Sampler, PenaltiesNeverOverflow) {
  SamplingParams p = params(0);
  p.repetition_penalty = 1e-3;
  const std::vector<int32_t> prompt = {0, 1};
  Sampler sampler(p, prompt);
  EXPECT_EQ(sample(sampler, {2e38f, 3e38f, 1}), 0);  // both are the largest float: the lower id
  p.repetition_penalty = 100;
  p.temperature = 1;
  Sampler low(p, prompt);
  EXPECT_EQ(sample(low, {-3e38f, -3e38f, -3.1e38f}), 2);
}

// SMP-03: bias is honoured, ids outside the vocabulary are refused by name and never written to.
TEST(Sampler, BiasIsHonouredAndBadOnesAreNamed) {
  const std::vector<float> logits = {9, 1, 2, 3};
  SamplingParams p = params(0);
  p.logit_bias = {{1, 100}};
  EXPECT_FALSE(p.greedy());
  EXPECT_TRUE(p.check(4).ok());
  Sampler up(p, {});
  EXPECT_EQ(sample(up, logits), 1);
  p.logit_bias = {{0, -100}};
  Sampler down(p, {});
  EXPECT_EQ(sample(down, logits), 3);
  p.logit_bias = {{0, -100}, {1, -100}, {2, -100}, {3, -100}};  // all biased away: as if none were
  Sampler away(p, {});
  EXPECT_EQ(sample(away, logits), 0);
  for (const int32_t id : {129280, 99999999, INT32_MAX, -1, INT32_MIN}) {
    p.logit_bias = {{1, 5}, {id, 5}};
    const Status status = p.check(129280);
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().code, ErrorCode::invalid_argument);
    EXPECT_EQ(status.error().field, "logit_bias[" + std::to_string(id) + "]");
    Sampler sampler(p, {});
    EXPECT_EQ(sample(sampler, logits), 0);  // even unchecked it reaches no other memory
  }
  for (const float bias : {1000.0f, -100.5f, kInf, kNan}) {
    p.logit_bias = {{1, bias}};
    EXPECT_EQ(p.check(4).error().field, "logit_bias[1]");
  }
  p.logit_bias = {{129279, -100}};
  EXPECT_TRUE(p.check(129280).ok());
}

// SMP-04: a seed is 64 bits and means the same whoever samples beside it, on whichever thread and scratch.
TEST(Sampler, ASeedRepeatsInAnyCompany) {
  std::mt19937 random(36);
  constexpr int64_t kVocab = 5000, kRows = 64, kSteps = 5;
  const std::vector<float> row = make_row(random, Shape::normal, kVocab);
  std::map<uint64_t, std::vector<int32_t>> alone;
  const auto seed_of = [](int64_t i) { return (uint64_t{42} << (i % 3 * 16)) + static_cast<uint64_t>(i % 2) * 7; };
  const auto make = [&](uint64_t seed) {
    SamplingParams p = params(1);
    p.seed = seed;
    p.frequency_penalty = 0.1;
    return Sampler(p, {});
  };
  for (int64_t i = 0; i < 6; ++i) {
    Sampler sampler = make(seed_of(i));
    for (int64_t step = 0; step < kSteps; ++step) alone[seed_of(i)].push_back(sample(sampler, row));
  }
  WorkerPool pool(read_topology("node:1 core:3 pu:1").value(), 3);
  std::vector<SamplingScratch> scratch(3);
  std::vector<Sampler> samplers;
  for (int64_t i = 0; i < kRows; ++i) samplers.push_back(make(seed_of(i)));
  std::vector<std::vector<int32_t>> together(kRows);
  for (int64_t step = 0; step < kSteps; ++step)
    pool.split(kRows, [&](int64_t begin, int64_t end, int worker) {
      for (int64_t i = begin; i < end; ++i)
        together[static_cast<size_t>(i)].push_back(
            samplers[static_cast<size_t>(i)].sample(row, {3, {}}, scratch[static_cast<size_t>(worker)]).value().id);
    });
  for (int64_t i = 0; i < kRows; ++i) EXPECT_EQ(together[static_cast<size_t>(i)], alone[seed_of(i)]) << i;
}

TEST(Sampler, AllBitsOfASeedCountAndNoSeedIsRandom) {
  std::mt19937 random(37);
  const std::vector<float> row = make_row(random, Shape::normal, 5000);
  std::map<std::vector<int32_t>, uint64_t> answers;
  const auto answer = [&](const SamplingParams& p) {
    Sampler sampler(p, {});
    std::vector<int32_t> ids;
    for (int i = 0; i < 24; ++i) ids.push_back(sample(sampler, row));
    return ids;
  };
  const std::vector<uint64_t> seeds = {42,
                                       0,
                                       static_cast<uint64_t>(-1),
                                       static_cast<uint64_t>(INT64_MIN),
                                       2147483648,
                                       4294967296,
                                       4294967338,
                                       9007199254740993,
                                       9007199254740992,
                                       INT64_MAX};
  SamplingParams p = params(1);
  for (const uint64_t seed : seeds) {
    p.seed = seed;
    answers[answer(p)] = seed;
    EXPECT_EQ(answers[answer(p)], seed);
  }
  EXPECT_EQ(answers.size(), seeds.size());
  p.has_seed = false;
  EXPECT_NE(answer(p), answer(p));
}

TEST(Sampler, RangesAreNamed) {
  SamplingParams bad;
  bad.top_p = 1.5;
  EXPECT_EQ(bad.check().error().field, "top_p");
  bad = {};
  bad.temperature = std::nan("");
  EXPECT_EQ(bad.check().error().field, "temperature");
  EXPECT_TRUE(SamplingParams{}.check().ok());
}

TEST(Sampler, BannedTokensAreNotChosenAndTheRowIsNotTouched) {
  const std::vector<float> logits = {1, 3, 9, 2};
  for (const double temperature : {0.0, 1.0, 100.0}) {
    Sampler sampler(params(temperature), {});
    for (int i = 0; i < 200; ++i) {
      const int32_t id = sample(sampler, logits, {2, 1, 70, -5});
      EXPECT_TRUE(id == 0 || id == 3);
      EXPECT_TRUE(temperature > 0 || id == 3);
    }
  }
  EXPECT_EQ(logits, (std::vector<float>{1, 3, 9, 2}));
  Sampler greedy(params(0), {});
  EXPECT_EQ(sample(greedy, logits, {0, 1, 2, 3}), 2);  // all banned: the bans are void
  SamplingParams p = params(1);
  p.top_k = 1;
  Sampler one(p, {});
  EXPECT_EQ(sample(one, logits, {0, 1, 2, 3}), 2);
  EXPECT_EQ(sample(greedy, {-kInf, 1}, {0}), 1);  // a banned token may be -inf already
}

// A finite norm.weight of 3e38 makes rows like these; the old sampler read past their end.
TEST(Sampler, DamagedRowsAreAnErrorThatNamesTheToken) {
  SamplingScratch scratch;
  std::mt19937 random(38);
  const std::vector<int32_t> banned = {0};
  for (const int64_t vocab : {1, 3, 64, 70, 1000})
    for (const float bad : {kNan, -kNan, kInf, -kInf})
      for (const int64_t at : {int64_t{0}, vocab / 2, vocab - 1})
        for (SamplingParams p : {params(0), params(1), params(0.5), params(1), params(0)}) {
          p.top_k = static_cast<int64_t>(random() % 3) * 5;
          p.top_p = random() % 2 ? 1 : 0.9;
          if (random() % 2) p.repetition_penalty = 1.5;
          std::vector<float> row = make_row(random, Shape::normal, vocab);
          row[static_cast<size_t>(at)] = bad;
          Sampler sampler(p, banned);
          const auto result = sampler.sample(row, {2, {}}, scratch);
          ASSERT_FALSE(result);
          EXPECT_EQ(result.error().code, ErrorCode::internal);
          EXPECT_NE(result.error().message.find("token " + std::to_string(at) + ":"), std::string::npos)
              << result.error().message;
          const bool excused = bad == -kInf && at == 0 && vocab > 1;
          EXPECT_EQ(sampler.sample(row, {2, banned}, scratch).has_value(), excused);
          EXPECT_FALSE(logprobs_of(row, 0, 1, scratch));
        }
  for (const float all : {kNan, kInf, -kInf})
    for (const double temperature : {0.0, 1.0}) {
      Sampler sampler(params(temperature), {});
      EXPECT_FALSE(sampler.sample(std::vector<float>(300, all), {}, scratch));
    }
  std::vector<float> mixed = {-kInf, kNan, 1};
  Sampler sampler(params(0), {});
  EXPECT_NE(sampler.sample(mixed, {-1, banned}, scratch).error().message.find("token 1:"), std::string::npos);
}

TEST(Sampler, AnErrorDrawsAndCountsNothing) {
  std::mt19937 random(39);
  SamplingScratch scratch;
  const std::vector<float> row = make_row(random, Shape::normal, 1000), damaged(1000, kNan);
  SamplingParams p = params(1);
  p.presence_penalty = 2;
  Sampler a(p, {}), b(p, {});
  for (int i = 0; i < 20; ++i) {
    EXPECT_FALSE(a.sample(damaged, {}, scratch));
    EXPECT_EQ(sample(a, row), sample(b, row));
  }
}

TEST(Logprobs, AreTheLogSoftmaxOfTheModelsOwnRow) {
  std::mt19937 random(40);
  SamplingScratch scratch;
  for (const int64_t vocab : {1, 2, 65, 1000, 129280})
    for (const Shape shape : kShapes) {
      const std::vector<float> row = make_row(random, shape, vocab);
      const double best = *std::max_element(row.begin(), row.end());
      double sum = 0;
      for (const float x : row) sum += std::exp(static_cast<double>(x) - best);
      SamplingParams p = params(0.3);
      p.logit_bias = {{0, 3}};
      p.top_k = 4;
      Sampler sampler(p, {});
      const SampledToken token = sampler.sample(row, {20, {}}, scratch).value();
      const double expected = static_cast<double>(row[static_cast<size_t>(token.id)]) - best - std::log(sum);
      EXPECT_NEAR(token.logprob, expected, 3e-6 + 1e-7 * std::fabs(expected));
      ASSERT_EQ(token.top.size(), std::min<size_t>(20, row.size()));
      double mass = 0;
      for (size_t i = 0; i < token.top.size(); ++i) {
        const TokenLogprob& t = token.top[i];
        mass += std::exp(static_cast<double>(t.logprob));
        EXPECT_TRUE(std::isfinite(t.logprob) && t.logprob <= 0);
        // The same bits wherever a token's number comes from: lm-eval compares them by equality.
        EXPECT_EQ(logprobs_of(row, t.id, 0, scratch).value().logprob, t.logprob);
        if (i == 0) continue;
        EXPECT_TRUE(sampling::before({row[static_cast<size_t>(token.top[i - 1].id)], token.top[i - 1].id, 0},
                                     {row[static_cast<size_t>(t.id)], t.id, 0}));
      }
      EXPECT_LE(mass, 1 + 1e-5);
      EXPECT_EQ(token.top[0].id, std::max_element(row.begin(), row.end()) - row.begin());
    }
}

TEST(Logprobs, TheFirstIsTheGreedyTokenAndNoneAreMadeUnasked) {
  std::mt19937 random(41);
  SamplingScratch scratch;
  for (const Shape shape : kShapes) {
    const std::vector<float> row = make_row(random, shape, 3000);
    Sampler sampler(params(0), {});
    const SampledToken token = sampler.sample(row, {5, {}}, scratch).value();
    EXPECT_EQ(token.top[0].id, token.id);
    EXPECT_EQ(token.top[0].logprob, token.logprob);
    const SampledToken only = sampler.sample(row, {0, {}}, scratch).value();
    EXPECT_EQ(only.logprob, token.logprob);
    EXPECT_TRUE(only.top.empty());
    EXPECT_EQ(sampler.sample(row, {}, scratch).value().logprob, 0);
  }
  const std::vector<int32_t> banned = {1};
  Sampler sampler(params(0), {});
  const SampledToken token = sampler.sample(std::vector<float>{1, -kInf, 2}, {20, banned}, scratch).value();
  EXPECT_EQ(token.top.size(), 2u);  // -inf has no place in a list of numbers
}

}  // namespace
}  // namespace thermocline
