#include "runtime/base/number_formats.h"

#include <cmath>

#include "tests/support/fixtures.h"

namespace thermocline {
namespace {

TEST(NumberFormats, E4m3DecodesLikeThePublishedTable) {
  const std::vector<float> expected = test::TensorFile(test::golden("ops/ops.safetensors")).floats("e4m3.values");
  ASSERT_EQ(expected.size(), 256u);
  for (int code = 0; code < 256; ++code) {
    const float value = e4m3_to_float(static_cast<uint8_t>(code));
    if (std::isnan(expected[code]))
      EXPECT_TRUE(std::isnan(value)) << code;
    else
      EXPECT_EQ(value, expected[code]) << code;
  }
}

TEST(NumberFormats, E2m1DecodesLikeThePublishedTable) {
  const std::vector<float> expected = test::TensorFile(test::golden("ops/ops.safetensors")).floats("e2m1.values");
  for (size_t code = 0; code < expected.size(); ++code) EXPECT_EQ(kE2m1[code], expected[code]) << code;
}

// The nearest code by looking at all of them; a tie goes to the code with an even mantissa.
uint8_t nearest_e4m3(float x) {
  int best = 0;
  for (int code = 0; code < 256; ++code) {
    if ((code & 0x7f) == 0x7f) continue;
    const double now = std::fabs(static_cast<double>(e4m3_to_float(static_cast<uint8_t>(code))) - x);
    const double then = std::fabs(static_cast<double>(e4m3_to_float(static_cast<uint8_t>(best))) - x);
    const bool same_sign = std::signbit(e4m3_to_float(static_cast<uint8_t>(code))) == std::signbit(x);
    if (now < then || (now == then && same_sign &&
                       ((code & 1) == 0 || std::signbit(e4m3_to_float(static_cast<uint8_t>(best))) != std::signbit(x))))
      best = code;
  }
  return static_cast<uint8_t>(best);
}

TEST(NumberFormats, E4m3EncodesToTheNearestTiesToEven) {
  std::mt19937 random(1);
  std::vector<float> inputs = test::random_floats(random, 2000, 100);
  for (float& x : inputs) x = std::clamp(x, -448.0f, 448.0f);
  for (const float tiny : test::random_floats(random, 2000, 0.02f)) inputs.push_back(tiny);
  for (int code = 0; code < 126; ++code)
    inputs.push_back((e4m3_to_float(static_cast<uint8_t>(code)) + e4m3_to_float(static_cast<uint8_t>(code + 1))) / 2);
  for (const float x : inputs) EXPECT_EQ(e4m3_to_float(float_to_e4m3(x)), e4m3_to_float(nearest_e4m3(x))) << x;
  EXPECT_EQ(e4m3_to_float(float_to_e4m3(1e9f)), 448.0f);
}

TEST(NumberFormats, E2m1TiesGoToTheEvenCode) {
  const std::pair<float, float> ties[] = {{0.25f, 0}, {0.75f, 1}, {1.25f, 1}, {1.75f, 2},
                                          {2.5f, 2},  {3.5f, 4},  {5, 4},     {7, 6}};
  for (const auto& [x, expected] : ties) {
    EXPECT_EQ(kE2m1[float_to_e2m1(x)], expected) << x;
    EXPECT_EQ(kE2m1[float_to_e2m1(-x)], -expected) << -x;
  }
}

TEST(NumberFormats, Bf16RoundsToNearestEven) {
  EXPECT_EQ(bf16_to_float(float_to_bf16(1.0f + 0x1p-8f)), 1.0f);                // tie, even below
  EXPECT_EQ(bf16_to_float(float_to_bf16(1.0f + 3 * 0x1p-8f)), 1.0f + 0x1p-6f);  // tie, even above
  EXPECT_EQ(round_bf16(1.0f + 0x1p-8f + 0x1p-20f), 1.0f + 0x1p-7f);
  EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(NAN))));
}

TEST(NumberFormats, ScalesAreExactPowersOfTwo) {
  EXPECT_EQ(e8m0_to_float(127), 1.0f);
  EXPECT_EQ(e8m0_to_float(0), 0x1p-127f);
  EXPECT_TRUE(std::isnan(e8m0_to_float(255)));
  EXPECT_EQ(pow2_ceil(1.0f), 1.0f);
  EXPECT_EQ(pow2_ceil(1.0001f), 2.0f);
  EXPECT_EQ(pow2_ceil(0.75f), 1.0f);
}

TEST(NumberFormats, F16WidensExactly) {
  EXPECT_EQ(f16_to_float(0x3c00), 1.0f);
  EXPECT_EQ(f16_to_float(0x0001), 0x1p-24f);
  EXPECT_EQ(f16_to_float(0xfbff), -65504.0f);
  EXPECT_TRUE(std::isinf(f16_to_float(0x7c00)));
}

}  // namespace
}  // namespace thermocline
