// Rollback, fork and checkpoints on the demo model: whatever a sequence went through, its logits are those of a fresh
// one, bit for bit.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "runtime/kv/synthetic_rows.h"
#include "tests/support/long_demo.h"
#include "tests/support/models.h"

namespace thermocline {
namespace {

using test::ModelSetup;

/// A loaded model, and what a fresh sequence of it says.
struct Model {
  explicit Model(ModelSetup setup) : engine(test::open_engine(setup)), driver(engine->driver()), kv(driver.kv()) {}

  std::vector<int32_t> tokens(int64_t count, uint32_t seed) const {
    std::mt19937 random(seed);
    std::vector<int32_t> ids(static_cast<size_t>(count));
    for (int32_t& id : ids) id = static_cast<int32_t>(random() % static_cast<uint32_t>(engine->geometry().vocab_size));
    return ids;
  }
  void feed(SequenceKv& sequence, std::span<const int32_t> ids) {
    const Status fed = driver.prefill(sequence, ids);
    TC_CHECK(fed.ok(), fed.ok() ? "" : fed.error().message);
  }
  std::vector<float> logits() const { return {driver.logits().begin(), driver.logits().end()}; }
  std::vector<float> cold(std::span<const int32_t> ids) {
    const auto sequence = driver.new_sequence().value();
    feed(*sequence, ids);
    return logits();
  }

  std::unique_ptr<Engine> engine;
  StepDriver& driver;
  KvStore& kv;
};

struct Where {
  std::string name;
  ModelSetup setup;
  std::vector<int64_t> lengths = {1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 600};
};
// A million tokens of synthetic rows: the choice among 262,144 keys and the attention of one token, by one worker and
// by five on two nodes, from the first time and from a checkpoint.
TEST(LongContext, AMillionTokensGiveTheSameBitsByManyWorkers) {
#ifdef TC_SANITIZED
  constexpr int64_t kContext = 40'000;
#else
  constexpr int64_t kContext = 1 << 20;
#endif
  constexpr int64_t kTokens = kContext - 8;
  std::vector<float> expected;
  for (const auto& [threads, topology] : {std::pair(1, ""), std::pair(5, "node:2 core:3 pu:1")}) {
    Model m({.folder = test::long_demo(),
             .threads = threads,
             .sequences = 2,
             .topology = topology,
             .context = kContext,
             .kv_tokens = kContext});
    auto sequence = synthetic_sequence(m.kv, m.engine->geometry(), m.engine->pool(), kTokens).value();
    const KvCheckpoint checkpoint = m.kv.checkpoint(*sequence, kTokens).value();
    const std::vector<int32_t> ids = m.tokens(8, 3);
    std::vector<float> logits;
    for (const int32_t id : ids) {
      m.feed(*sequence, std::span(&id, 1));
      const std::vector<float> now = m.logits();
      logits.insert(logits.end(), now.begin(), now.end());
    }
    for (const float value : logits) ASSERT_TRUE(std::isfinite(value));
    if (threads == 1)
      expected = logits;
    else
      EXPECT_EQ(logits, expected);
    auto resumed = m.kv.restore(checkpoint).value();
    m.feed(*resumed, ids);
    EXPECT_EQ(m.logits(),
              std::vector<float>(logits.end() - static_cast<std::ptrdiff_t>(m.logits().size()), logits.end()));
    EXPECT_EQ(sequence->length(), kContext);
    EXPECT_FALSE(m.driver.decode(*sequence, ids[0]).ok()) << "beyond the context";
  }
}

std::vector<Where> places() {
  ModelSetup setup{.sequences = 3, .context = 1024};
#ifdef TC_SANITIZED  // ten times slower
  std::vector<Where> list = {{"published", setup, {1, 4, 5, 128, 129, 257}}};
#else
  std::vector<Where> list = {{"published", setup}};
#endif
  setup.device = "simt";
  setup.chunk = 128;
#ifndef TC_SANITIZED
  list.push_back({"simt", setup, {6, 131}});  // a second for 30 tokens
  setup.device = "none";
  setup.chunk = 512;
  setup.numerics = Numerics::fp32;
  list.push_back({"fp32", setup});
#endif
  return list;
}

class Resume : public testing::TestWithParam<Where> {};

TEST_P(Resume, RollbacksAndBranchesLeaveNoTrace) {
  Model m(GetParam().setup);
  std::mt19937 random(11);
  for (int round = 0; round < (GetParam().name == "published" ? 6 : 1); ++round) {
    auto sequence = m.driver.new_sequence().value();
    std::vector<int32_t> ids;
    for (int step = 0; step < 24; ++step) {
      const int64_t count = random() % 4 == 0 ? 1 + random() % 60 : 1 + random() % 5;
      const std::vector<int32_t> more = m.tokens(count, random());
      m.feed(*sequence, more);
      ids.insert(ids.end(), more.begin(), more.end());
      const int64_t back = std::min<int64_t>(random() % 9, sequence->length() - sequence->rollback_floor());
      if (random() % 2) continue;
      sequence->rollback(sequence->length() - back);
      ids.resize(static_cast<size_t>(sequence->length()));
      if (random() % 3) continue;
      auto branch = m.kv.fork(*sequence).value();  // its twin goes its own way over the same pages
      m.feed(*branch, m.tokens(1 + random() % 20, random()));
    }
    const std::vector<int32_t> last = m.tokens(1, random());
    m.feed(*sequence, last);
    ids.push_back(last[0]);
    const std::vector<float> got = m.logits();
    sequence.reset();
    EXPECT_EQ(got, m.cold(ids)) << "round " << round << ", " << ids.size() << " tokens";
  }
}

TEST_P(Resume, ACheckpointGoesOnLikeTheFirstTime) {
  Model m(GetParam().setup);
  const std::vector<int32_t> ids = m.tokens(700, 5);
  for (const int64_t length : GetParam().lengths) {
    const int64_t end = length + 9;
    const std::span<const int32_t> all = std::span(ids).first(static_cast<size_t>(end));
    for (const int64_t later : {0, 1, 7}) {  // taken when the sequence had gone on already
      auto sequence = m.driver.new_sequence().value();
      m.feed(*sequence, all.first(static_cast<size_t>(length)));
      for (int64_t i = 0; i < later; ++i) m.feed(*sequence, all.subspan(static_cast<size_t>(length + i), 1));
      const KvCheckpoint checkpoint = m.kv.checkpoint(*sequence, length).value();
      // The first one goes on over the shared page, and what comes after it writes everywhere.
      m.feed(*sequence, m.tokens(12, 77));
      sequence.reset();
      auto other = m.driver.new_sequence().value();
      m.feed(*other, m.tokens(length / 2 + 10, 78));
      auto resumed = m.kv.restore(checkpoint).value();
      EXPECT_EQ(resumed->length(), length);
      m.feed(*resumed, all.subspan(static_cast<size_t>(length)));
      EXPECT_EQ(m.logits(), m.cold(all)) << length << " tokens, taken " << later << " later";
      if (GetParam().name != "published") break;
    }
  }
}

TEST_P(Resume, EverythingGoesBack) {
  Model m(GetParam().setup);
  const int64_t free = m.kv.available_pages();
  {
    auto sequence = m.driver.new_sequence().value();
    m.feed(*sequence, m.tokens(40, 1));
    const KvCheckpoint checkpoint = m.kv.checkpoint(*sequence, 40).value();
    auto fork = m.kv.fork(*sequence).value();
    auto third = m.kv.restore(checkpoint).value();
    EXPECT_FALSE(m.kv.fork(*sequence)) << "three sequences are in use";
    m.feed(*fork, m.tokens(20, 2));
  }
  EXPECT_EQ(m.kv.available_pages(), free);
}

INSTANTIATE_TEST_SUITE_P(Places, Resume, testing::ValuesIn(places()),
                         [](const auto& place) { return place.param.name; });

}  // namespace
}  // namespace thermocline
