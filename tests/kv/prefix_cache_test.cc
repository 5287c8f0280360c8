// The prefix cache by its numbers: what is found, for whom, and what goes first. No model runs: rows are whatever lies
// there. tests/kv/resume_test.cc has the bits.
#include "runtime/kv/prefix_cache.h"

#include <gtest/gtest.h>

#include <numeric>

#include "runtime/model/deepseek_v4/config.h"
#include "tests/support/fixtures.h"

namespace thermocline {
namespace {

struct Cache {
  explicit Cache(int64_t tokens = 16 * 1024, int64_t checkpoints = 1000)
      : store(KvStore::create(g, {.max_tokens = tokens, .max_sequences = 4, .max_chunk = 8192}).value()),
        cache(*store, {.bytes = checkpoints * one(), .model = "demo"}) {}
  int64_t one() const {
    const KvLayout& layout = store->layout();
    return 9 * layout.window_page_bytes() + layout.ring_bytes();
  }
  std::unique_ptr<SequenceKv> sequence(int64_t length) {
    auto s = store->new_sequence().value();
    TC_CHECK(s->reserve(length).ok());
    s->commit(length);
    return s;
  }
  void keep(const std::vector<int32_t>& ids, int64_t now = 0, const std::string& salt = "") {
    const auto s = sequence(static_cast<int64_t>(ids.size()));
    PrefixKeys keys = cache.keys(salt);
    ASSERT_TRUE(cache.keep(keys, ids, *s, s->length(), now).ok());
  }
  int64_t find(const std::vector<int32_t>& ids, const std::string& salt = "") const {
    PrefixKeys keys = cache.keys(salt);
    return cache.find(keys, ids);
  }

  const ModelGeometry g = deepseek_v4::read_config(test::demo_model()).value();
  std::unique_ptr<KvStore> store;
  PrefixCache cache;
};

std::vector<int32_t> text(int64_t tokens, int32_t first = 0) {
  std::vector<int32_t> ids(static_cast<size_t>(tokens));
  std::iota(ids.begin(), ids.end(), first);
  return ids;
}

TEST(PrefixCache, FindsTheLongestPrefixThatIsKept) {
  Cache c;
  for (const int64_t length : {3, 4, 127, 128, 255, 256, 257, 511, 5000}) c.keep(text(length));
  const std::pair<int64_t, int64_t> cases[] = {
      {0, 0},     {2, 0},     {3, 3},     {4, 4},     {126, 4},   {127, 127},  {254, 128},   {255, 255},
      {256, 256}, {257, 257}, {510, 257}, {511, 511}, {600, 511}, {4999, 511}, {5000, 5000}, {6000, 5000}};
  for (const auto& [length, found] : cases) EXPECT_EQ(c.find(text(length)), found) << length;
}

TEST(PrefixCache, OneOtherTokenAnywhereEndsThePrefix) {
  Cache c;
  for (const int64_t length : {100, 256, 700}) c.keep(text(length));
  const std::pair<int64_t, int64_t> cases[] = {{0, 0},     {99, 0},    {100, 100}, {255, 100},
                                               {256, 256}, {600, 256}, {700, 700}};
  for (const auto& [at, found] : cases) {
    std::vector<int32_t> ids = text(800);
    ids[static_cast<size_t>(at)] = 7;
    EXPECT_EQ(c.find(ids), at == 7 ? 700 : found) << "token " << at;
  }
}

TEST(PrefixCache, IsPrivateToItsSalt) {
  Cache c;
  c.keep(text(300), 0, "alice");
  EXPECT_EQ(c.find(text(300), "alice"), 300);
  EXPECT_EQ(c.find(text(300), "bob"), 0);
  EXPECT_EQ(c.find(text(300)), 0);
  // Names of other secrets and other models are other names.
  Cache d;
  EXPECT_NE(c.cache.keys("a").of({}, 0), d.cache.keys("a").of({}, 0));
  const PrefixSecret secret;
  EXPECT_NE(secret.root("a", "bc"), secret.root("ab", "c"));
}

TEST(PrefixCache, ResumedSequencesShareTheirPages) {
  Cache c;
  c.keep(text(600));
  EXPECT_EQ(c.store->cached_pages(), 3);
  const int64_t available = c.store->available_pages();
  EXPECT_EQ(available, c.store->compressed_pages()) << "what only the cache has can be taken";
  {
    PrefixKeys keys = c.cache.keys("");
    auto a = c.cache.resume(keys, text(700), 0).value(), b = c.cache.resume(keys, text(700), 0).value();
    EXPECT_EQ(a->length(), 600);
    EXPECT_EQ(a->compressed_pages(), b->compressed_pages());
    EXPECT_EQ(c.store->available_pages(), available - 3);
    EXPECT_EQ(a->own_pages(), 2) << "the third is written next, and the other has it too";
    ASSERT_TRUE(a->reserve(1).ok());
    EXPECT_NE(a->compressed_pages()[2], b->compressed_pages()[2]) << "its writer took a copy";
    EXPECT_EQ(a->compressed_pages()[1], b->compressed_pages()[1]);
  }
  EXPECT_EQ(c.store->available_pages(), available);
  const PrefixCacheStats stats = c.cache.stats();
  EXPECT_EQ(stats.hits, 2);
  EXPECT_EQ(stats.saved_tokens, 1200);
}

TEST(PrefixCache, ClearingLeavesSequencesTheirPages) {
  Cache c;
  c.keep(text(600));
  c.keep(text(400, 5000));
  PrefixKeys keys = c.cache.keys("");
  const auto running = c.cache.resume(keys, text(700), 0).value();
  const int64_t bytes = c.cache.stats().checkpoint_bytes;
  const PrefixCacheFlush flushed = c.cache.clear();
  EXPECT_EQ(flushed.checkpoints, 2);
  EXPECT_EQ(flushed.checkpoint_bytes, bytes);
  EXPECT_EQ(flushed.pages, 2) << "three more are the sequence's";
  EXPECT_EQ(flushed.page_bytes, 2 * c.store->layout().compressed_page_bytes());
  EXPECT_EQ(c.cache.stats().checkpoints, 0);
  EXPECT_EQ(c.cache.stats().checkpoint_bytes, 0);
  EXPECT_EQ(c.find(text(700)), 0);
  EXPECT_EQ(running->length(), 600);
  EXPECT_EQ(c.store->available_pages(), c.store->compressed_pages() - 3);
  EXPECT_EQ(c.cache.clear().checkpoints, 0);
}

// A pool that checkpoints fill is a sequence's all the same, to its last page, and the tail they share with it too.
TEST(PrefixCache, GivesWayToWhoeverNeedsThePages) {
  Cache c(2048);
  const int64_t pages = c.store->compressed_pages();
  for (int32_t i = 0; i < 4; ++i) c.keep(text(400, 1000 * i));
  EXPECT_EQ(c.store->cached_pages(), 8);
  auto sequence = c.sequence((pages - 4) * kPageTokens);
  EXPECT_LE(c.cache.stats().checkpoints, 2);
  auto other = c.sequence(3 * kPageTokens + 100);
  EXPECT_EQ(c.cache.stats().checkpoints, 0);
  PrefixKeys keys = c.cache.keys("");
  ASSERT_TRUE(c.cache.keep(keys, text(3 * kPageTokens + 100), *other, other->length(), 0).ok());
  EXPECT_EQ(c.store->available_pages(), 0);
  EXPECT_EQ(other->own_pages(), 4);
  ASSERT_TRUE(other->reserve(10).ok()) << "the checkpoint lets go of the page";
  EXPECT_EQ(c.cache.stats().checkpoints, 0);
  EXPECT_EQ(sequence->reserve(kPageTokens).error().code, ErrorCode::out_of_memory);
}

TEST(PrefixCache, SmallSideRequestsDoNotEvictALongConversation) {
  Cache c(64 * 1024, 8);
  std::vector<int32_t> conversation = text(3000);
  c.keep(conversation, 0);
  for (int32_t i = 0; i < 200; ++i) c.keep(text(60 + i % 50, 10000 + 100 * i), i);
  EXPECT_EQ(c.find(conversation), 3000);
  EXPECT_LE(c.cache.stats().checkpoint_bytes, 8 * c.one());
  // Its next turn takes the place of the one before.
  const std::vector<int32_t> longer = text(3500);
  c.keep(longer, 300);
  for (int32_t i = 0; i < 200; ++i) c.keep(text(600 + i % 50, 50000 + 1000 * i), 400 + i);
  EXPECT_EQ(c.find(longer), 3500);
}

TEST(PrefixCache, WhatIsOldGoesFirst) {
  Cache c(64 * 1024, 4);
  const int64_t hour = int64_t{3600} * 1'000'000'000;
  c.keep(text(1000), 0);
  for (int32_t i = 1; i <= 20; ++i) c.keep(text(900, 5000 * i), 24 * hour + i);
  EXPECT_EQ(c.find(text(1000)), 0);
  EXPECT_EQ(c.find(text(900, 100000)), 900);
}

TEST(PrefixCache, HasNothingWhenItIsOff) {
  Cache c(4096, 0);
  c.keep(text(500));
  EXPECT_EQ(c.find(text(500)), 0);
  EXPECT_EQ(c.store->cached_pages(), 0);
  PrefixKeys keys = c.cache.keys("");
  EXPECT_EQ(c.cache.resume(keys, text(500), 0).value(), nullptr);
}

}  // namespace
}  // namespace thermocline
