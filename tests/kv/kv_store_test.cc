#include "runtime/kv/kv_store.h"

#include <set>

#include "runtime/model/deepseek_v4/config.h"
#include "runtime/model/deepseek_v4/synthesize.h"
#include "tests/support/fixtures.h"

namespace thermocline {
namespace {

ModelGeometry demo() { return deepseek_v4::read_config(test::demo_model()).value(); }

TEST(KvStore, NoRowHasTwoOwners) {
  const ModelGeometry g = demo();
  auto cache =
      KvStore::create(g, {.bf16_rows = true, .max_tokens = 2048, .max_sequences = 2, .max_chunk = 512}).value();
  auto a = cache->new_sequence().value(), b = cache->new_sequence().value();
  std::set<const std::byte*> rows;
  size_t count = 0;
  for (SequenceKv* kv : {a.get(), b.get()}) {
    ASSERT_TRUE(kv->reserve(256).ok());
    for (int layer = 0; layer < g.n_layers; ++layer) {
      for (int64_t pos = 0; pos < 256; ++pos) rows.insert(kv->raw_row(layer, pos)), ++count;
      if (g.kind(layer) == LayerKind::swa) continue;
      for (int64_t r = 0; r < 256 / g.compress_ratios[static_cast<size_t>(layer)]; ++r) {
        rows.insert(kv->compressed_row(layer, r)), ++count;
        if (g.kind(layer) == LayerKind::csa && r % 16 == 0) rows.insert(kv->index_group(layer, r / 16)), ++count;
      }
    }
  }
  EXPECT_EQ(rows.size(), count);
}

TEST(KvStore, WindowPagesComeBackAndCompressedOnesStay) {
  const ModelGeometry g = demo();
  auto cache = KvStore::create(g, {.max_tokens = 4096, .max_sequences = 1, .max_chunk = 128}).value();
  auto kv = cache->new_sequence().value();
  const std::byte* first_row = nullptr;
  for (int step = 0; step < 32; ++step) {  // 4096 tokens through a window of three pages or so
    ASSERT_TRUE(kv->reserve(128).ok()) << "step " << step;
    if (step == 0) first_row = kv->compressed_row(2, 0);
    kv->commit(128);
    EXPECT_EQ(kv->compressed_row(2, 0), first_row);
  }
  EXPECT_EQ(kv->length(), 4096);
  const Status full = kv->reserve(1000);
  ASSERT_FALSE(full.ok());
  EXPECT_EQ(full.error().code, ErrorCode::out_of_memory);
  EXPECT_NE(kv->compressed_row(2, 1023), nullptr);
}

TEST(KvStore, SequencesAreLimitedAndComeBack) {
  auto cache = KvStore::create(demo(), {.max_tokens = 512, .max_sequences = 2, .max_chunk = 512}).value();
  auto a = cache->new_sequence().value(), b = cache->new_sequence().value();
  EXPECT_NE(a->ring_slot(2, 0), b->ring_slot(2, 0));
  const auto third = cache->new_sequence();
  ASSERT_FALSE(third);
  EXPECT_EQ(third.error().code, ErrorCode::out_of_memory);
  a.reset();
  EXPECT_TRUE(cache->new_sequence());
}

TEST(KvStore, ASequenceGivesItsPagesBack) {
  const ModelGeometry g = demo();
  auto cache = KvStore::create(g, {.max_tokens = 512, .max_sequences = 1, .max_chunk = 512}).value();
  for (int i = 0; i < 10; ++i) {
    auto kv = cache->new_sequence().value();
    ASSERT_TRUE(kv->reserve(512).ok()) << i;
    kv->commit(512);
  }
}

// Spec 4.3 counts 3,514 bytes a token with rows of 584 bytes; ours are whole 16.
TEST(KvLayout, ATokenOfV4FlashTakes3514Bytes) {
  const ModelGeometry g = deepseek_v4::published_geometry("v4-flash", 0).value();
  const KvLayout fp8(g, {.fp8_rows = true}), bf16(g, {});
  EXPECT_EQ(fp8.row_bytes(), 592);
  EXPECT_NEAR(static_cast<double>(fp8.compressed_page_bytes()) / kPageTokens, 3514, 0.03 * 3514);
  EXPECT_NEAR(static_cast<double>(bf16.compressed_page_bytes()) / kPageTokens, 5900, 0.03 * 5900);
}

// Ratios that do not divide a page: a row is always on a page its sequence has.
TEST(KvStore, OddRatiosStayInsideTheirPages) {
  ModelGeometry g = demo();
  for (const int ratio : {3, 7, 96, 200, 300}) {
    g.compress_ratios[3] = ratio;
    auto cache = KvStore::create(g, {.max_tokens = 1024, .max_sequences = 1, .max_chunk = 1024}).value();
    auto kv = cache->new_sequence().value();
    ASSERT_TRUE(kv->reserve(1000).ok());
    std::set<const std::byte*> rows;
    for (int64_t r = 0; r < 1000 / ratio; ++r) rows.insert(kv->compressed_row(3, r));
    EXPECT_EQ(rows.size(), static_cast<size_t>(1000 / ratio)) << ratio;
    EXPECT_FALSE(cache->layout().shares_pages()) << ratio;
  }
}

}  // namespace
}  // namespace thermocline
