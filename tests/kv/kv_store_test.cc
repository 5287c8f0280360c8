#include "runtime/kv/kv_store.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <set>

#include "runtime/hw/host_memory.h"
#include "runtime/hw/topology.h"
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

/// Compressed pages of a sequence that its lists of pages by node name, and on the node where they lie.
void expect_listed(const SequenceKv& kv, int nodes, const std::string& when) {
  std::set<int32_t> listed;
  for (int node = 0; node < nodes; ++node) {
    const auto pages = kv.pages_on(node);
    EXPECT_TRUE(std::is_sorted(pages.begin(), pages.end())) << when;
    for (const int32_t page : pages) {
      ASSERT_LT(static_cast<size_t>(page), kv.compressed_pages().size()) << when;
      EXPECT_EQ(kv.compressed_pages()[static_cast<size_t>(page)] % nodes, node) << when;
      EXPECT_TRUE(listed.insert(page).second) << when;
    }
  }
  EXPECT_EQ(listed.size(), kv.compressed_pages().size()) << when;
}

TEST(KvStore, CompressedPagesLieRoundRobinOverTheNodes) {
  const ModelGeometry g = demo();
  for (const int nodes : {1, 2, 3, 5}) {
    KvOptions options{.max_tokens = 11 * kPageTokens, .max_sequences = 2};  // 13 pages: no whole rounds
    options.nodes.assign(static_cast<size_t>(nodes), -1);
    const uint64_t planned = KvStore::bytes(g, options);
    const HostMemoryLedger ledger;
    auto store = KvStore::create(g, options).value();
    EXPECT_EQ(ledger.bytes(), planned);
    KvMemory& memory = store->memory();
    const int64_t bytes = store->layout().compressed_page_bytes();
    std::vector<std::byte> image(static_cast<size_t>(bytes));
    for (int32_t page = 0; page < 13; ++page) {
      const std::byte* before = page < nodes ? nullptr : memory.place(KvPool::compressed, page - nodes) + bytes;
      EXPECT_TRUE(!before || memory.place(KvPool::compressed, page) == before) << page;
      std::fill(image.begin(), image.end(), static_cast<std::byte>(page + 1));
      ASSERT_TRUE(memory.write(KvPool::compressed, page, image.data()).ok());
    }
    ASSERT_TRUE(memory.copy(KvPool::compressed, 3, 12).ok());
    for (int32_t page = 0; page < 13; ++page) {  // none lies on another
      ASSERT_TRUE(memory.read(KvPool::compressed, page, image.data()).ok());
      const auto expected = static_cast<std::byte>(page == 12 ? 4 : page + 1);
      EXPECT_TRUE(std::all_of(image.begin(), image.end(), [&](std::byte b) { return b == expected; })) << page;
    }
  }
}

TEST(KvStore, ASequenceKnowsItsPagesByNode) {
  const ModelGeometry g = demo();
  for (const int nodes : {2, 3}) {
    KvOptions options{.max_tokens = 20 * kPageTokens, .max_sequences = 3};
    options.nodes.assign(static_cast<size_t>(nodes), -1);
    auto store = KvStore::create(g, options).value();
    auto a = store->new_sequence().value(), other = store->new_sequence().value();
    EXPECT_EQ(a->nodes(), nodes);
    const auto grow = [](SequenceKv& kv, int64_t count) {
      ASSERT_TRUE(kv.reserve(count).ok());
      kv.commit(count);
    };
    for (int i = 0; i < 4; ++i) {
      grow(*a, 300);
      grow(*other, 300);
    }
    expect_listed(*a, nodes, "reserved");
    auto fork = store->fork(*a).value();
    expect_listed(*fork, nodes, "restored");
    grow(*fork, 1);
    EXPECT_NE(fork->compressed_pages(), a->compressed_pages());
    expect_listed(*fork, nodes, "its last page copied");
    ASSERT_TRUE(fork->reserve(500).ok());
    fork->rollback(fork->length() - 1);
    EXPECT_EQ(fork->compressed_pages().size(), a->compressed_pages().size());
    expect_listed(*fork, nodes, "rolled back");
    other.reset();
    a.reset();
    grow(*fork, 512);
    grow(*fork, 512);
    expect_listed(*fork, nodes, "over pages that came back");
  }
}

TEST(KvStore, CompressedPagesAreBoundToTheirNode) {
  const int node = read_topology().value().nodes[0].os_node;
  if (!NumaBuffer::allocate(4096, node).value().bound()) GTEST_SKIP() << "binding is refused";
  const auto store = KvStore::create(demo(), {.max_tokens = 2048, .nodes = {-1, node}}).value();
  const auto policy = [&](KvPool pool, int32_t page) {
    int mode = -1;
    EXPECT_EQ(syscall(SYS_get_mempolicy, &mode, nullptr, 0, store->memory().place(pool, page), MPOL_F_ADDR), 0);
    return mode;
  };
  EXPECT_EQ(policy(KvPool::compressed, 1), MPOL_BIND);
  EXPECT_EQ(policy(KvPool::compressed, 3), MPOL_BIND);
  EXPECT_EQ(policy(KvPool::compressed, 2), MPOL_DEFAULT);
  EXPECT_EQ(policy(KvPool::window, 1), MPOL_DEFAULT);
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
