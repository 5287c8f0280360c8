// Where bytes and seconds of weights go: by worker and node as they are read, by kind as the calls say beforehand.
#include "kernels_cpu/gemm.h"
#include "tests/support/models.h"
#include "tests/support/packed.h"

namespace thermocline::cpu {
namespace {

const KindTraffic& of(const WeightTraffic& traffic, WeightKind kind) {
  return traffic.kinds()[static_cast<size_t>(kind)];
}

void wait_a_little() {
  const auto start = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - start < std::chrono::microseconds(200)) {
  }
}

TEST(WeightTraffic, ACallOfSeveralKindsSharesItsSecondsOutByBytes) {
  WeightTraffic traffic(1, 1);
  {
    WeightTraffic::Timer timer(&traffic);
    timer.reads(WeightKind::fp4, 300);
    timer.reads(WeightKind::fp8, 60);
    timer.reads(WeightKind::fp8, 40);
    wait_a_little();
  }
  const double mixed = traffic.seconds();
  EXPECT_GE(mixed, 200e-6);
  EXPECT_EQ(of(traffic, WeightKind::fp4).bytes, 300u);
  EXPECT_EQ(of(traffic, WeightKind::fp8).bytes, 100u);
  EXPECT_DOUBLE_EQ(of(traffic, WeightKind::fp4).seconds, 0.75 * mixed);
  EXPECT_DOUBLE_EQ(of(traffic, WeightKind::fp8).seconds, 0.25 * mixed);
  {
    WeightTraffic::Timer timer(&traffic);
    timer.reads(WeightKind::head, 5);
    wait_a_little();
  }
  EXPECT_DOUBLE_EQ(of(traffic, WeightKind::head).seconds, traffic.seconds() - mixed);
  EXPECT_DOUBLE_EQ(of(traffic, WeightKind::fp4).seconds, 0.75 * mixed) << "other calls are other kinds'";
  traffic.reset();
  EXPECT_EQ(of(traffic, WeightKind::fp4).bytes, 0u);
  EXPECT_EQ(of(traffic, WeightKind::head).seconds + traffic.seconds(), 0);
}

// What the driving thread says of a call is what the workers read in it, whatever their number.
TEST(WeightTraffic, KindsOfACallAreTheFormatsOfItsMatrices) {
  std::mt19937 random(3);
  const test::RandomMatrix fp4 = test::random_matrix(random, GemmKind::mxfp4_e8m0, 100, 96),
                           fp8 = test::random_matrix(random, GemmKind::fp8_f32, 48, 96),
                           bf16 = test::random_matrix(random, GemmKind::bf16, 33, 96);
  const KernelTable table = make_kernel_table(detect_cpu_features(), Isa::amx);
  for (const int threads : {1, 3, 4}) {
    WorkerPool pool(read_topology("node:2 core:2 pu:1").value(), threads);
    WeightTraffic traffic(threads, pool.nodes());
    const CpuContext cpu{pool, table, &traffic}, head{pool, table, &traffic, WeightKind::head};
    const std::vector<float> x = test::random_floats(random, 2 * 96);
    GemmInput input = GemmInput::allocate(2, 96).value();
    prepare(cpu, TensorView<const float, 2>(x.data(), {2, 96}), {table.activation}, input);
    std::vector<float> y(3 * 2 * 112);
    const auto job = [&](const PackedMatrix& w, size_t place) {
      return GemmJob{.w = &w, .x = &input, .rows = {0, 2}, .y = &y[place * 2 * 112], .y_stride = w.n};
    };
    GemmJob jobs[] = {job(fp4.matrix, 0), job(fp8.matrix, 1), job(bf16.matrix, 2)};
    jobs[0].first_group = 2;
    jobs[0].groups = 3;
    gemm(cpu, jobs);
    const auto bytes = [](const test::RandomMatrix& m) { return static_cast<uint64_t>(m.matrix.bytes()); };
    const auto three_groups = static_cast<uint64_t>(3 * fp4.matrix.group_bytes());
    EXPECT_EQ(of(traffic, WeightKind::fp4).bytes, three_groups);
    EXPECT_EQ(of(traffic, WeightKind::fp8).bytes, bytes(fp8));
    EXPECT_EQ(of(traffic, WeightKind::bf16).bytes, bytes(bf16));
    EXPECT_EQ(of(traffic, WeightKind::head).bytes, 0u);
    EXPECT_EQ(traffic.total_bytes(), three_groups + bytes(fp8) + bytes(bf16));
    gemm(head, bf16.matrix, input, y.data(), false);
    EXPECT_EQ(of(traffic, WeightKind::head).bytes, bytes(bf16)) << "a context's kind goes before the format";
    EXPECT_EQ(of(traffic, WeightKind::bf16).bytes, bytes(bf16));
    double seconds = 0;
    for (const KindTraffic& kind : traffic.kinds()) seconds += kind.seconds;
    EXPECT_NEAR(seconds, traffic.seconds(), 1e-9);
  }
}

}  // namespace
}  // namespace thermocline::cpu
