// The kernels of Intel's cores against those of others, on a CPU that runs both: the same bits by other instructions.
#include "kernels_cpu/attention.h"
#include "kernels_cpu/gemm.h"
#include "tests/support/packed.h"

namespace thermocline::cpu {
namespace {

class IntelKernels : public ::testing::Test {
 protected:
  void SetUp() override {
    CpuFeatures cpu = detect_cpu_features();
    if (!cpu.avx512_bf16) GTEST_SKIP() << "this CPU has no vdpbf16ps";
    cpu.intel = false;
    dots_ = make_kernel_table(cpu, Isa::avx512);
    cpu.intel = true;
    intel_ = make_kernel_table(cpu, Isa::avx512);
    ASSERT_NE(dots_.gemm[0], intel_.gemm[0]);
    ASSERT_NE(dots_.attention_dots, intel_.attention_dots);
  }

  static std::vector<float> run(const KernelTable& table, const PackedMatrix& w, const std::vector<float>& x, int64_t m,
                                const InputFormat& format) {
    WorkerPool pool(read_topology("node:1 core:1 pu:1").value(), 1);
    const CpuContext cpu{pool, table};
    GemmInput input = GemmInput::allocate(m, w.k).value();
    prepare(cpu, TensorView<const float, 2>(x.data(), {m, w.k}), format, input);
    std::vector<float> y(static_cast<size_t>(m * w.n));
    gemm(cpu, w, input, y.data(), false);
    return y;
  }

  KernelTable dots_, intel_;
};

// x is no bf16: both round it.
TEST_F(IntelKernels, EveryFormatAndNumberOfTokensGivesTheSameBits) {
  std::mt19937 random(1);
  for (int kind = 0; kind < kGemmKinds; ++kind)
    for (const auto& [n, k] : {std::pair(16, 32), std::pair(40, 160), std::pair(80, 1024)})
      for (int64_t m = 1; m <= 9; ++m) {
        const test::RandomMatrix r = test::random_matrix(random, static_cast<GemmKind>(kind), n, k);
        const std::vector<float> x = test::random_floats(random, m * k);
        EXPECT_EQ(run(dots_, r.matrix, x, m, {dots_.activation}), run(intel_, r.matrix, x, m, {intel_.activation}))
            << "kind " << kind << " k " << k << " m " << m;
        if (dots_.gemm_int8[kind]) {
          EXPECT_EQ(run(dots_, r.matrix, x, m, {Activation::int8}), run(intel_, r.matrix, x, m, {Activation::int8}))
              << "int8, kind " << kind << " k " << k << " m " << m;
        }
      }
}

TEST_F(IntelKernels, AttentionGivesTheSameBits) {
  std::mt19937 random(2);
  for (const int heads : {1, 3, 8, 14})
    for (const int64_t n : {1, 2, 5, 16, 33, 130}) {
      const int64_t c = 96;
      const std::vector<float> q = test::random_floats(random, heads * c), sinks = test::random_floats(random, heads);
      std::vector<bf16> values(static_cast<size_t>(n * c));
      for (bf16& v : values) v = float_to_bf16(std::normal_distribution<float>(0, 1)(random));
      std::vector<const void*> rows;
      for (int64_t i = 0; i < n; ++i) rows.push_back(&values[static_cast<size_t>(i * c)]);
      const auto attend = [&](const KernelTable& table) {
        std::vector<float> scores(static_cast<size_t>(heads * n)), partial(static_cast<size_t>(heads * c)),
            out(static_cast<size_t>(heads * c));
        attention(table, {q.data(), heads, rows.data(), n, c, true, 0.1f, true}, sinks.data(), scores.data(),
                  partial.data(), out.data());
        return out;
      };
      EXPECT_EQ(attend(dots_), attend(intel_)) << heads << " heads, " << n << " rows";
    }
}

// What decodes weights where there is AMX, on emulated tiles, against plain decoders on the same tiles.
TEST_F(IntelKernels, DecodersForTilesGiveTheBitsOfPlainOnes) {
  const KernelTable plain = make_kernel_table(detect_cpu_features(), Isa::amx_emulated);
  KernelTable tiles = plain;
  amx_emulated_avx512::fill(tiles);
  ASSERT_NE(plain.gemm[0], tiles.gemm[0]);
  std::mt19937 random(3);
  for (int kind = 0; kind < kGemmKinds; ++kind)
    for (const bool far_scales : {false, true})  // beyond what folds into bf16
      for (const int64_t m : {1, 7, 16, 17, 40, 64}) {
        test::RandomMatrix r = test::random_matrix(random, static_cast<GemmKind>(kind), 40, 416);
        if (far_scales && r.matrix.scale == ScaleFormat::e8m0_rows)
          for (uint8_t& scale : r.scales) scale = static_cast<uint8_t>(random() % 200);
        const std::vector<float> x = test::random_floats(random, m * 416);
        EXPECT_EQ(run(plain, r.matrix, x, m, {Activation::bf16}), run(tiles, r.matrix, x, m, {Activation::bf16}))
            << "kind " << kind << " m " << m;
        if (plain.gemm_int8[kind]) {
          EXPECT_EQ(run(plain, r.matrix, x, m, {Activation::int8}), run(tiles, r.matrix, x, m, {Activation::int8}))
              << "int8, kind " << kind << " m " << m;
        }
      }
}

}  // namespace
}  // namespace thermocline::cpu
