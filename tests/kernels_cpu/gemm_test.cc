// Packed tiles and GEMMs: every format on every instruction set, over ragged shapes, any number of tokens and threads.
#include "kernels_cpu/gemm.h"

#include "kernels_cpu/ref/ops.h"
#include "tests/support/models.h"
#include "tests/support/packed.h"

namespace thermocline::cpu {
namespace {

constexpr GemmKind kKinds[] = {GemmKind::mxfp4_e8m0, GemmKind::mxfp4_f32, GemmKind::fp8_f32,
                               GemmKind::bf16,       GemmKind::int8_f32,  GemmKind::int4_f32};

TEST(PackedMatrix, EveryElementComesBack) {
  std::mt19937 random(1);
  for (const GemmKind kind : kKinds)
    for (const auto& [n, k] :
         {std::pair(1, 32), std::pair(15, 64), std::pair(16, 96), std::pair(17, 160), std::pair(40, 32)}) {
      const test::RandomMatrix r = test::random_matrix(random, kind, n, k);
      for (int64_t row = 0; row < n; ++row)
        for (int64_t col = 0; col < k; ++col)
          ASSERT_EQ(packed_element(r.matrix, row, col), r.values[static_cast<size_t>(row * k + col)])
              << row << " " << col;
    }
}

// The layout is a contract with kernels not yet written: a few bytes by hand, from architecture.md section 4.
TEST(PackedMatrix, TheTileIsTheDocumentedOne) {
  PackedShape shape;
  shape.format = WeightFormat::mxfp4;
  shape.n = 16;
  shape.k = 32;
  std::vector<std::byte> rows(16 * 16);
  const int64_t r = 5, column = 8 * 2 + 2 * 3 + 1;                   // line 2, s = 3, p = 1
  rows[static_cast<size_t>(r * 16 + column / 2)] = std::byte{0x70};  // an odd column is the high nibble
  std::vector<uint8_t> tile(256);
  pack_row_group(shape, rows.data(), 16, 16, tile.data());
  uint16_t word;
  std::memcpy(&word, &tile[2 * 64 + 2 * (2 * r + 1)], 2);
  EXPECT_EQ(word, 0x7000);
  EXPECT_EQ(std::count(tile.begin(), tile.end(), 0), 255);
}

class GemmTest : public ::testing::TestWithParam<Isa> {
 protected:
  const KernelTable table_ = make_kernel_table(detect_cpu_features(), GetParam());
};

std::vector<float> run_gemm(const KernelTable& table, int threads, const PackedMatrix& w, const std::vector<float>& x,
                            int64_t m, const InputFormat& format) {
  WorkerPool pool(read_topology("node:2 core:2 pu:1").value(), threads);
  const CpuContext cpu{pool, table};
  GemmInput input = GemmInput::allocate(m, w.k).value();
  prepare(cpu, TensorView<const float, 2>(x.data(), {m, w.k}), format, input);
  std::vector<float> y(static_cast<size_t>(m * w.n));
  gemm(cpu, w, input, y.data(), false);
  return y;
}

std::vector<float> run_gemm(const KernelTable& table, int threads, const PackedMatrix& w, const std::vector<float>& x,
                            int64_t m) {
  return run_gemm(table, threads, w, x, m, {table.activation});
}

// Within the error of K fused or unfused float32 additions of exact products: K * 2^-24 of the sum of magnitudes.
TEST_P(GemmTest, MatchesTheReferenceOnRaggedShapes) {
  std::mt19937 random(2);
  for (const GemmKind kind : kKinds)
    for (const int64_t n : {1, 15, 16, 17, 48})
      for (const int64_t k : {32, 64, 160, 288})
        for (const int64_t m : {1, 2, 3, 7, 8, 9, 13, 16, 21}) {
          const test::RandomMatrix r = test::random_matrix(random, kind, n, k);
          std::vector<float> x = test::random_floats(random, m * k);
          ref::round_to_bf16(x.data(), m * k);
          const std::vector<float> y = run_gemm(table_, 2, r.matrix, x, m);
          for (int64_t i = 0; i < m; ++i)
            for (int64_t row = 0; row < n; ++row) {
              double sum = 0, size = 0;
              for (int64_t col = 0; col < k; ++col) {
                const double product = static_cast<double>(r.values[static_cast<size_t>(row * k + col)]) *
                                       x[static_cast<size_t>(i * k + col)];
                sum += product;
                size += std::fabs(product);
              }
              ASSERT_NEAR(y[static_cast<size_t>(i * n + row)], sum, size * static_cast<double>(k) * 0x1p-24 + 1e-30)
                  << "kind " << static_cast<int>(kind) << " n " << n << " k " << k << " m " << m;
            }
        }
}

TEST_P(GemmTest, ATokensBitsDependOnNeitherItsNeighboursNorTheThreads) {
  std::mt19937 random(3);
  for (const GemmKind kind : kKinds) {
    const int64_t n = 80, k = 256, m = 70;
    const test::RandomMatrix r = test::random_matrix(random, kind, n, k);
    const std::vector<float> x = test::random_floats(random, m * k);
    const std::vector<float> together = run_gemm(table_, 3, r.matrix, x, m);
    for (int64_t i = 0; i < m; ++i) {
      const std::vector<float> alone =
          run_gemm(table_, 1, r.matrix, std::vector<float>(x.begin() + i * k, x.begin() + (i + 1) * k), 1);
      ASSERT_EQ(alone, std::vector<float>(together.begin() + i * n, together.begin() + (i + 1) * n))
          << static_cast<int>(kind) << " token " << i;
    }
  }
}

TEST_P(GemmTest, ExtremeScalesAreExact) {
  std::mt19937 random(4);
  test::RandomMatrix r = test::random_matrix(random, GemmKind::mxfp4_e8m0, 16, 32);
  for (const uint8_t byte : {uint8_t{0}, uint8_t{1}, uint8_t{120}, uint8_t{200}}) {
    std::fill(r.scales.begin(), r.scales.end(), byte);
    std::vector<float> x(32, 0.0f);
    x[3] = byte < 2 ? 0x1p100f : 1.0f;
    const std::vector<float> y = run_gemm(table_, 1, r.matrix, x, 1);
    for (int64_t row = 0; row < 16; ++row)
      EXPECT_EQ(y[static_cast<size_t>(row)], packed_element(r.matrix, row, 3) * x[3]) << static_cast<int>(byte);
  }
}

TEST_P(GemmTest, QuantisedInputsAreRoundedAsPublished) {
  std::mt19937 random(5);
  const int64_t k = 200;
  const test::RandomMatrix r = test::random_matrix(random, GemmKind::bf16, 16, k);
  std::vector<float> x = test::random_floats(random, k), rounded = x;
  ref::fake_fp8(rounded.data(), k, 128);
  EXPECT_EQ(run_gemm(table_, 1, r.matrix, x, 1, {table_.activation, true}), run_gemm(table_, 1, r.matrix, rounded, 1));
}

// INT8 activations: the integer sums are exact, so what is left is the rounding of x (half a unit of its block each)
// and float32 additions of one product a tile.
TEST_P(GemmTest, Int8ActivationsAreWithinTheRoundingOfX) {
  std::mt19937 random(6);
  for (const GemmKind kind : kKinds) {
    if (table_.gemm_int8[static_cast<int>(kind)] == nullptr) continue;
    for (const int block : {32, 128})
      for (const auto& [n, k] : {std::pair(16, 32), std::pair(33, 160), std::pair(48, 512)})
        for (const int64_t m : {1, 2, 9, 10, 11, 16, 17, 33}) {
          const test::RandomMatrix r = test::random_matrix(random, kind, n, k);
          const std::vector<float> x = test::random_floats(random, m * k);
          const std::vector<float> y = run_gemm(table_, 2, r.matrix, x, m, {Activation::int8, false, block});
          for (int64_t i = 0; i < m; ++i)
            for (int64_t row = 0; row < n; ++row) {
              double exact = 0, rounded = 0, lost = 0, size = 0;
              for (int64_t begin = 0; begin < k; begin += block) {
                float amax = 0;
                for (int64_t c = begin; c < std::min<int64_t>(k, begin + block); ++c)
                  amax = std::max(amax, std::fabs(x[static_cast<size_t>(i * k + c)]));
                const float unit = amax / 127;
                for (int64_t c = begin; c < std::min<int64_t>(k, begin + block); ++c) {
                  const double w = r.values[static_cast<size_t>(row * k + c)],
                               value = x[static_cast<size_t>(i * k + c)];
                  exact += w * value;
                  rounded += w * std::nearbyint(value / unit) * unit;
                  lost += std::fabs(w) * unit / 2;
                  size += std::fabs(w * value);
                }
              }
              const double got = y[static_cast<size_t>(i * n + row)];
              ASSERT_NEAR(got, exact, lost + 1e-5 * size) << "kind " << static_cast<int>(kind) << " k " << k;
              // A value within float32 noise of halfway may round either way: one unit of one weight.
              ASSERT_NEAR(got, rounded, 2e-6 * size + 2 * lost / static_cast<double>(k))
                  << "kind " << static_cast<int>(kind);
            }
        }
  }
}

TEST_P(GemmTest, Int8BitsDependOnNeitherNeighboursNorThreads) {
  std::mt19937 random(8);
  for (const GemmKind kind : kKinds) {
    if (table_.gemm_int8[static_cast<int>(kind)] == nullptr) continue;
    const int64_t n = 48, k = 256, m = 37;
    const test::RandomMatrix r = test::random_matrix(random, kind, n, k);
    const std::vector<float> x = test::random_floats(random, m * k);
    const InputFormat format{Activation::int8};
    const std::vector<float> together = run_gemm(table_, 3, r.matrix, x, m, format);
    for (int64_t i = 0; i < m; ++i)
      ASSERT_EQ(
          run_gemm(table_, 1, r.matrix, std::vector<float>(x.begin() + i * k, x.begin() + (i + 1) * k), 1, format),
          std::vector<float>(together.begin() + i * n, together.begin() + (i + 1) * n));
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, GemmTest, ::testing::ValuesIn(test::isas()),
                         [](const auto& test) { return test::isa_test_name(test.param); });

}  // namespace
}  // namespace thermocline::cpu
