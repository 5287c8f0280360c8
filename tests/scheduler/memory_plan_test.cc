// MemoryPlan: sums, what is left, and a refusal that names row, bytes and remedy.
#include "scheduler/plan/memory_plan.h"

#include <gtest/gtest.h>

#include <limits>

namespace thermocline::sched {
namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;

MemoryPlan plan_of(uint64_t host, uint64_t device) {
  MemoryPlan plan;
  plan.set_capacity(MemoryPlan::kHost, host, "what the machine has free");
  plan.add(MemoryPlan::kHost, "weights", 8 * kGiB);
  plan.add(MemoryPlan::kHost, "KV pages", 2 * kGiB, "lower --max-model-len");
  plan.add(MemoryPlan::kHost, "step buffers", kGiB / 2, "lower --chunk");
  plan.set_capacity(0, device, "Tiny GPU");
  plan.add(0, "dense weights", kGiB);
  plan.add(0, "KV pages", 3 * kGiB, "lower --max-model-len");
  return plan;
}

TEST(MemoryPlan, TiersAreAddedUpApart) {
  const MemoryPlan plan = plan_of(12 * kGiB, 4 * kGiB);
  EXPECT_TRUE(plan.check().ok());
  EXPECT_EQ(plan.planned_bytes(MemoryPlan::kHost), 10 * kGiB + kGiB / 2);
  EXPECT_EQ(plan.room(MemoryPlan::kHost), kGiB + kGiB / 2);
  EXPECT_EQ(plan.planned_bytes(0), 4 * kGiB);
  EXPECT_EQ(plan.room(0), 0u) << "to the byte";
  EXPECT_EQ(plan.planned_bytes(1), 0u);
  EXPECT_EQ(plan.owner_bytes("KV pages"), 5 * kGiB) << "of both";
  EXPECT_EQ(plan.owner_bytes("KV"), 0u);
}

TEST(MemoryPlan, ATierWithoutACapacityHoldsAnything) {
  MemoryPlan plan;
  plan.add(3, "slots", std::numeric_limits<uint64_t>::max() / 2);
  EXPECT_TRUE(plan.check().ok());
  EXPECT_EQ(plan.room(3), std::numeric_limits<uint64_t>::max());
}

TEST(MemoryPlan, OneByteTooManyIsRefusedWithTheTable) {
  const Status status = plan_of(10 * kGiB + kGiB / 2 - 1, 4 * kGiB).check();
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().code, ErrorCode::out_of_memory);
  EXPECT_EQ(status.error().message,
            "not enough memory on the host: 10.50 GiB needed, 10.50 GiB there; what does not fit: step buffers\n"
            "host: 10.50 GiB, what the machine has free\n"
            "  weights            8.00 GiB      8.00 GiB\n"
            "  KV pages           2.00 GiB     10.00 GiB\n"
            "  step buffers      512.0 MiB     10.50 GiB  <- does not fit\n"
            "device 0: 4.00 GiB, Tiny GPU\n"
            "  dense weights      1.00 GiB      1.00 GiB\n"
            "  KV pages           3.00 GiB      4.00 GiB\n"
            "lower --max-model-len; or lower --chunk");
}

TEST(MemoryPlan, TheFirstRowThatDoesNotFitIsTheOneNamed) {
  const Status host = plan_of(9 * kGiB, 4 * kGiB).check();
  EXPECT_NE(host.error().message.find("what does not fit: KV pages"), std::string::npos) << host.error().message;
  const Status device = plan_of(12 * kGiB, kGiB / 2).check();
  EXPECT_NE(
      device.error().message.find("on device 0: 4.00 GiB needed, 512.0 MiB there; what does not fit: dense weights"),
      std::string::npos)
      << device.error().message;
}

}  // namespace
}  // namespace thermocline::sched
