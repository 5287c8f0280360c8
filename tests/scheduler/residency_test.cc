// Where CSA rows belong, on the example that the rule comes with: V4-Flash on a card with 1,520 GB/s, a CPU that reads
// 490 GB/s and a bus of 52.
#include "scheduler/kv/residency.h"

#include <gtest/gtest.h>

namespace thermocline::sched {
namespace {

RowOffload flash(int64_t sequences, int64_t tokens_each) {
  return {.freed_bytes = sequences * tokens_each / 4 * 592 * 21,
          .sequences = sequences,
          .csa_layers = 21,
          .topk = 512,
          .row_bytes = 592,
          .routed_experts = 256,
          .active_experts = 6,
          .cpu_bytes_per_ns = 490,
          .pcie_bytes_per_ns = 52,
          .gather_ns = 10'000,
          .miss_rate = 0.1};
}

TEST(Residency, OneLongRequestStaysOnTheCardAndEightDoNot) {
  const RowOffload one = flash(1, 350'000), eight = flash(8, 131'072);
  EXPECT_FALSE(offload_pays(one));
  EXPECT_NEAR(saved_by_experts_ns(one), 0.05e6, 0.01e6);  // a GB at 0.05 ms
  EXPECT_NEAR(spent_on_rows_ns(one), 0.22e6, 0.01e6);
  EXPECT_TRUE(offload_pays(eight));
  EXPECT_NEAR(saved_by_experts_ns(eight), 1.15e6, 0.1e6);
  EXPECT_NEAR(spent_on_rows_ns(eight), 0.31e6, 0.02e6);
}

TEST(Residency, EveryNumberPullsItsOwnWay) {
  const RowOffload base = flash(4, 65'536);
  const auto saved = [&](auto change) {
    RowOffload o = base;
    change(o);
    return saved_by_experts_ns(o) / saved_by_experts_ns(base);
  };
  const auto spent = [&](auto change) {
    RowOffload o = base;
    change(o);
    return spent_on_rows_ns(o) / spent_on_rows_ns(base);
  };
  EXPECT_DOUBLE_EQ(saved([](RowOffload& o) { o.freed_bytes *= 2; }), 2);
  EXPECT_DOUBLE_EQ(saved([](RowOffload& o) { o.cpu_bytes_per_ns *= 2; }), 0.5);
  EXPECT_GT(saved([](RowOffload& o) { o.active_experts *= 2; }), 1.5);
  EXPECT_GT(spent([](RowOffload& o) { o.miss_rate = 1; }), 1.5);
  EXPECT_GT(spent([](RowOffload& o) { o.pcie_bytes_per_ns /= 8; }), 1.5);
  EXPECT_GT(spent([](RowOffload& o) { o.gather_ns *= 2; }), 1.5);
  RowOffload dense = base;
  dense.routed_experts = dense.active_experts = 0;
  EXPECT_FALSE(offload_pays(dense)) << "nobody else wants the bytes";
}

}  // namespace
}  // namespace thermocline::sched
