// Where CSA rows belong, on the example that the rule comes with: V4-Flash on an RTX 5090 and a CPU that reads 490
// GB/s.
#include "scheduler/kv/residency.h"

#include <gtest/gtest.h>

#include "scheduler/cost/hardware_presets.h"

namespace thermocline::sched {
namespace {

ModelCosts flash() {
  ModelCosts m;
  m.experts = 256;
  m.experts_per_token = 6;
  m.expert_bytes = 13.37e6;
  m.layers.resize(43);
  for (int i = 0; i < 21; ++i) {
    m.layers[static_cast<size_t>(i)].topk = 512;
    m.layers[static_cast<size_t>(i)].row_bytes = 592;
  }
  return m;
}

MachineProfile server(double cpu_bytes_per_second = 490e9, const char* card = "5090") {
  MachineProfile box;
  box.cpu = cpu_profile({.cores = 64, .read_bytes_per_second = cpu_bytes_per_second});
  box.gpus.push_back(gpu_profile(*find_gpu_sheet(card), box.cpu.read_bytes_per_second));
  return box;
}

RowOffload rows(int sequences, double tokens_each, double resident = 0.12) {
  return {.freed_bytes = sequences * tokens_each / 4 * 592 * 21,
          .sequences = static_cast<double>(sequences),
          .resident = resident};
}

RowPrice price(const RowOffload& offload, const MachineProfile& machine = server()) {
  const ModelCosts m = flash();
  return price_of_rows({m, machine}, offload);
}

// Spec 2.11: 0.07 against 0.22 ms, and 1.7 against 0.4.
TEST(Residency, OneLongRequestStaysOnTheCardAndEightDoNot) {
  const RowPrice one = price(rows(1, 350'000)), eight = price(rows(8, 131'072));
  EXPECT_FALSE(one.host_pays());
  EXPECT_NEAR(one.saved_ns, 0.07e6, 0.015e6);
  EXPECT_NEAR(one.spent_ns, 0.22e6, 0.01e6);
  EXPECT_TRUE(eight.host_pays());
  EXPECT_NEAR(eight.saved_ns, 1.7e6, 0.2e6);
  EXPECT_NEAR(eight.spent_ns, 0.4e6, 0.1e6);
}

// A GiB more is worth most to a card that has few experts, and nothing where all are there.
TEST(Residency, TheNextByteIsWorthWhatTheHitCurveSays) {
  double before = 1e30;
  for (const double resident : {0.02, 0.08, 0.16, 0.25}) {
    const double saved = price(rows(8, 32'768, resident)).saved_ns;
    EXPECT_LT(saved, before) << resident;
    EXPECT_GT(saved, 0) << resident;
    before = saved;
  }
  EXPECT_LT(price(rows(8, 32'768, 0.4)).saved_ns, 0) << "steps wait for the card by now";
  EXPECT_EQ(price(rows(8, 32'768, 1)).saved_ns, 0);
}

// The device is what steps wait for: experts there make them longer, and rows may stay.
TEST(Residency, ExpertsThatNobodyWaitsForAreWorthNothing) {
  const MachineProfile slow_card = server(1500e9, "a6000");
  EXPECT_LT(price(rows(8, 131'072, 0.3), slow_card).saved_ns, 0);
  EXPECT_FALSE(price(rows(8, 131'072, 0.3), slow_card).host_pays());
}

TEST(Residency, EveryNumberPullsItsOwnWay) {
  const RowPrice base = price(rows(4, 65'536));
  EXPECT_GT(price(rows(4, 131'072)).saved_ns, 1.9 * base.saved_ns);
  EXPECT_EQ(price(rows(4, 131'072)).spent_ns, base.spent_ns);
  EXPECT_GT(price(rows(4, 65'536), server(245e9)).saved_ns, 1.7 * base.saved_ns);
  EXPECT_GT(price(rows(4, 65'536), server(490e9, "4090")).spent_ns, 1.1 * base.spent_ns) << "half the bus";
  RowOffload o = rows(4, 65'536);
  o.miss_rate = 1;
  EXPECT_GT(price(o).spent_ns, 1.5 * base.spent_ns);
  o = rows(4, 65'536);
  o.gather_ns *= 2;
  EXPECT_GT(price(o).spent_ns, 1.5 * base.spent_ns);
  ModelCosts dense = flash();
  dense.experts = 0;
  const MachineProfile machine = server();
  EXPECT_EQ(price_of_rows({dense, machine}, rows(4, 65'536)).saved_ns, 0) << "nobody else wants the bytes";
}

TEST(Residency, SaysWhatItIsWorth) {
  const RowPrice price{.freed_bytes = 2.0 * (1 << 30), .saved_ns = 1.5e6, .spent_ns = 0.25e6};
  EXPECT_EQ(to_string(price, true), "2.0 GiB for experts save 1.50 ms of a step, copying rows takes 0.25 ms");
  EXPECT_EQ(to_string(price, false),
            "2.0 GiB for experts would save 1.50 ms of a step, copying rows would take 0.25 ms");
}

}  // namespace
}  // namespace thermocline::sched
