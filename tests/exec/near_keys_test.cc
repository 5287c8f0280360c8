// Who scans which index keys, on simulated machines with several nodes.
#include "runtime/exec/near_keys.h"

#include <set>

#include "kernels_cpu/indexer.h"
#include "runtime/kv/kv_store.h"
#include "runtime/model/deepseek_v4/config.h"
#include "tests/support/fixtures.h"

namespace thermocline {
namespace {

/// Two sequences of six pages: of `interleaved` ones each has every other page of the store.
struct TwoSequences {
  TwoSequences(const ModelGeometry& g, int nodes, bool interleaved) {
    KvOptions options{.max_tokens = 12 * kPageTokens, .max_sequences = 2};
    options.nodes.assign(static_cast<size_t>(nodes), -1);
    store = KvStore::create(g, options).value();
    for (auto* kv : {&a, &b}) *kv = store->new_sequence().value();
    for (int i = 0; i < 12; ++i) {
      SequenceKv& kv = (interleaved ? i % 2 : i / 6) == 0 ? *a : *b;
      TC_CHECK(kv.reserve(kPageTokens).ok());
      kv.commit(kPageTokens);
    }
  }
  std::unique_ptr<KvStore> store;
  std::unique_ptr<SequenceKv> a, b;
};

constexpr int kLayer = 2;  // a CSA layer of the demo model

TEST(NearKeys, EveryGroupIsScannedOnceByItsOwnNode) {
  const ModelGeometry g = deepseek_v4::read_config(test::demo_model()).value();
  ASSERT_EQ(g.kind(kLayer), LayerKind::csa);
  for (const auto& [threads, topology] : {std::pair(2, "node:2 core:1 pu:1"), std::pair(5, "node:2 core:3 pu:1"),
                                          std::pair(3, "node:2 core:2 pu:1"), std::pair(9, "node:3 core:4 pu:1")}) {
    WorkerPool pool(read_topology(topology).value(), threads);
    const TwoSequences two(g, pool.nodes(), false);
    const int64_t per_page = two.store->layout().rows_per_page(kLayer) / cpu::kKeyGroup;
    for (const SequenceKv* kv : {two.a.get(), two.b.get()})
      for (int64_t groups = 1; groups <= 6 * per_page; ++groups) {
        const NearKeys near(*kv, kLayer, groups);
        std::set<int64_t> scanned;
        for (int worker = 0; worker < threads; ++worker) {
          const WorkerPool::Team& team = pool.team(worker);
          const NearKeys::Share share = near.share(team);
          EXPECT_LE(share.end - share.begin, near.count(team.node) / team.size + 1);
          for (int64_t i = share.begin; i < share.end; ++i) {
            const int64_t group = near.group(team.node, i);
            const int32_t page = kv->compressed_pages()[static_cast<size_t>(group / per_page)];
            ASSERT_EQ(page % pool.nodes(), team.node) << "a key of another node";
            ASSERT_TRUE(scanned.insert(group).second) << "scanned twice";
          }
        }
        ASSERT_EQ(static_cast<int64_t>(scanned.size()), groups);
        ASSERT_EQ(*scanned.rbegin(), groups - 1) << "beyond what the token sees";
      }
  }
}

TEST(NearKeys, TeamsKeepToTheirNodesWhereNoneHasFarTooMuch) {
  const ModelGeometry g = deepseek_v4::read_config(test::demo_model()).value();
  const auto fair = [](const SequenceKv& kv, const WorkerPool& pool) {
    return NearKeys(kv, kLayer, 24).fair(pool);  // all six pages
  };
  const TwoSequences even(g, 2, false), odd(g, 2, true), one(g, 1, false);
  WorkerPool pool(read_topology("node:2 core:4 pu:1").value(), 8);
  EXPECT_TRUE(fair(*even.a, pool));
  EXPECT_FALSE(fair(*odd.a, pool)) << "all of them lie on node 0";
  EXPECT_FALSE(fair(*odd.b, pool)) << "all of them lie on node 1";
  EXPECT_FALSE(fair(*one.a, pool)) << "a store of one buffer";
  EXPECT_FALSE(NearKeys(*even.a, kLayer, 4).fair(pool)) << "one page";
  EXPECT_TRUE(NearKeys(*even.a, kLayer, 12).fair(pool)) << "two pages to one";
  EXPECT_TRUE(fair(*even.a, WorkerPool(read_topology("node:2 core:2 pu:1").value(), 3))) << "two workers to one";
  EXPECT_FALSE(fair(*even.a, WorkerPool(read_topology("node:1 core:2 pu:1").value(), 2))) << "one node";
  EXPECT_FALSE(fair(*even.a, WorkerPool(read_topology("node:4 core:1 pu:1").value(), 4))) << "of other nodes";
}

}  // namespace
}  // namespace thermocline
