// What a device is measured with, on the SIMT interpreter: the fit of copies, copies, the hand-over to the CPU. Lower
// bounds of times are promises, upper ones are not.
#include <cmath>
#include <random>

#include "kernels_gpu/launch.h"
#include "kernels_gpu/open_device.h"
#include "runtime/engine/bus_rigs.h"
#include "tests/support/fixtures.h"

namespace thermocline {
namespace {

std::vector<CopyTime> made_up_times(double bytes_per_second, double fixed_ns, double noise) {
  std::mt19937 random(7);
  std::uniform_real_distribution<double> off(1 - noise, 1 + noise);
  std::vector<CopyTime> times;
  for (const double bytes : CopyRig::kBytes)
    times.push_back({bytes, (fixed_ns + 1e9 * bytes / bytes_per_second) * off(random)});
  return times;
}

TEST(FitCopies, RecoversARateAndWhatACopyCosts) {
  for (const double rate : {1e9, 25e9, 52e9, 400e9})
    for (const double fixed : {0.0, 2'000.0, 10'000.0, 1e6}) {
      const CopyCost exact = fit_copies(made_up_times(rate, fixed, 0));
      EXPECT_NEAR(exact.bytes_per_second / rate, 1, 1e-9);
      EXPECT_NEAR(exact.fixed_ns, fixed, 1e-3 + 1e-6 * 1e15 / rate);
    }
  const CopyCost noisy = fit_copies(made_up_times(52e9, 10'000, 0.01));
  EXPECT_NEAR(noisy.bytes_per_second / 52e9, 1, 0.02);
  EXPECT_NEAR(noisy.fixed_ns / 10'000, 1, 0.1);
}

TEST(FitCopies, OddTimesStillHaveARate) {
  std::vector<CopyTime> cheaper_than_nothing = made_up_times(10e9, 0, 0);
  for (CopyTime& time : cheaper_than_nothing) time.ns -= 20'000;
  std::vector<CopyTime> falling = {{1e6, 5e5}, {35e6, 4e5}};
  for (const std::vector<CopyTime>& times : {cheaper_than_nothing, falling}) {
    const CopyCost cost = fit_copies(times);
    EXPECT_EQ(cost.fixed_ns, 0);
    EXPECT_TRUE(std::isfinite(cost.bytes_per_second) && cost.bytes_per_second > 0) << cost.bytes_per_second;
  }
  EXPECT_NEAR(fit_copies(cheaper_than_nothing).bytes_per_second / 10e9, 1, 0.1);
}

class DeviceRigs : public ::testing::Test {
 protected:
  DeviceRigs()
      : device_(gpu::simt::make_device({.memory_bytes = size_t{256} << 20, .copy_gb_per_s = 20}).value()),
        rig_(DeviceRig::create(*device_, device_shapes("tiny").value()).value()) {}

  std::unique_ptr<gpu::Device> device_;
  DeviceRig rig_;
  const Topology topology_ = read_topology("node:1 core:2 pu:1").value();
  WorkerPool pool_{topology_};
};

TEST_F(DeviceRigs, ARunSaysWhatItDoes) {
  const DeviceShapes& s = rig_.shapes();
  const DeviceRig::Side sides[] = {{256, 128}, {128, 512}};
  const DeviceMatrices fp8 = rig_.matrices(cpu::WeightFormat::fp8, sides).value();
  DeviceRun gemm = rig_.gemm(fp8, 3).value();
  EXPECT_EQ(gemm.launches(), 2);
  EXPECT_EQ(gemm.work().flops, 2.0 * 3 * (256 * 128 + 128 * 512));
  EXPECT_EQ(gemm.work().bytes, (256 * 128 + 128 * 512) + 4.0 * (256 / 16 * 1 + 128 / 16 * 4)) << "a scale a tile row";
  DeviceRun moe = rig_.moe(rig_.experts().value(), 17).value();
  EXPECT_EQ(moe.work().flops, 6.0 * 17 * static_cast<double>(s.experts * s.dim * s.inter));
  EXPECT_EQ(moe.work().bytes, static_cast<double>(s.experts * 3 * s.dim * s.inter) * (0.5 + 1.0 / 32));
  EXPECT_EQ(rig_.attention(2).value().work().flops,
            4 * 4.0 * static_cast<double>(2 * s.heads * (s.window + s.topk) * s.head_dim));
  EXPECT_EQ(rig_.index(2, 128).value().work().flops,
            4 * 2.0 * static_cast<double>(2 * 128 * s.index_heads * s.index_dim));
  EXPECT_GT(gemm.seconds().value(), 0);
}

TEST_F(DeviceRigs, ACopyIsWaitedFor) {
  CopyRig copies = CopyRig::create(rig_, 40'000'000).value();
  for (int i = 0; i < 3; ++i)
    EXPECT_GE(copies.seconds(35e6).value(), 35e6 / 20e9);  // also where the memory starts again
  StreamRead read = StreamRead::create(pool_, 1 << 20).value();
  const double share = copies.read_share(read, 20e9).value();
  EXPECT_GT(share, 0);
  EXPECT_LE(share, 1);
}

TEST_F(DeviceRigs, EveryLayerIsHandedOverAndAnswered) {
  HandoverRig handover = HandoverRig::create(rig_, 5).value();
  std::vector<double> ns;
  for (int i = 0; i < 3; ++i) {
    const WorkerPool::StepScope scope(pool_);
    ASSERT_TRUE(handover.run(pool_, ns).ok());
  }
  ASSERT_TRUE(handover.run(pool_, ns).ok()) << "workers that sleep";
  EXPECT_EQ(ns.size(), 4u * (5 - 1));
  for (const double time : ns) EXPECT_GT(time, 0);
}

struct Planted {};
TC_KERNEL(32) planted_fault(const Planted) { gpu::dev::runner().fail("planted"); }

TEST_F(DeviceRigs, AFaultIsAnErrorAndNoHang) {
  HandoverRig handover = HandoverRig::create(rig_, 2).value();
  CopyRig copies = CopyRig::create(rig_, 0).value();
  gpu::launch(rig_.stream(), "planted_fault", planted_fault, {1}, 32, Planted());
  std::vector<double> ns;
  const Status status = handover.run(pool_, ns);
  ASSERT_FALSE(status.ok());
  EXPECT_NE(status.error().message.find("planted"), std::string::npos) << status.error().message;
  EXPECT_FALSE(copies.seconds(1e6));
}

}  // namespace
}  // namespace thermocline
