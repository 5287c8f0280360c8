// The emulated tile instructions against the pseudo-code of Intel's manual, in arithmetic of its own: exact sums in 113
// bits, rounded once. Bits must agree, subnormals, zeros' signs, infinities and ragged shapes included.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels_cpu/amx/tile.h"
#include "runtime/base/number_formats.h"
#include "runtime/hw/cpu_features.h"

namespace thermocline::cpu {
namespace {

__extension__ typedef __float128 Exact;

constexpr float kSmallestNormal = 0x1p-126f;

float flush(float x) { return std::fabs(x) < kSmallestNormal ? std::copysign(0.0f, x) : x; }

// a b + c with subnormals as zero before and after, rounded to nearest even once; tininess is judged after rounding.
float fused(float a, float b, float c) {
  a = flush(a);
  b = flush(b);
  c = flush(c);
  if (!std::isfinite(a) || !std::isfinite(b) || !std::isfinite(c)) return std::fma(a, b, c);
  const Exact product = static_cast<Exact>(a) * b, exact = product + c;
  if (exact == 0) {
    const bool both_negative = (std::signbit(a) != std::signbit(b)) && std::signbit(c);
    return a * b == 0 && c == 0 && both_negative ? -0.0f : 0.0f;
  }
  int exponent = 0;
  std::frexp(static_cast<long double>(exact), &exponent);
  const Exact scale = std::ldexp(1.0L, -exponent);
  const float digits = static_cast<float>(exact * scale);  // 24 bits, whatever the exponent
  const long double rounded = std::ldexp(static_cast<long double>(digits), exponent);
  if (std::fabs(rounded) < kSmallestNormal) return std::copysign(0.0f, digits);
  return static_cast<float>(rounded);  // exact, or infinite
}

struct Shape {
  int m, n, k_pairs;
};

// c in tile 0, a in 1, b in 2; rows of 64 bytes in memory.
void load_operands(const Shape& s, const void* a, const void* b, const void* c) {
  tile::Config config;
  config.set(0, s.m, 4 * s.n);
  config.set(1, s.m, 4 * s.k_pairs);
  config.set(2, s.k_pairs, 4 * s.n);
  tile::load_config(config);
  tile::load<0>(c, 64);
  tile::load<1>(a, 64);
  tile::load<2>(b, 64);
}

std::vector<float> pseudo_code(const Shape& s, const std::vector<uint16_t>& a, const std::vector<uint16_t>& b,
                               std::vector<float> c) {
  for (int m = 0; m < s.m; ++m)
    for (int n = 0; n < s.n; ++n) {
      float temp[2] = {0, 0};
      for (int k = 0; k < s.k_pairs; ++k)
        for (int i = 0; i < 2; ++i)
          temp[i] = fused(bf16_to_float(a[static_cast<size_t>(m * 32 + 2 * k + i)]),
                          bf16_to_float(b[static_cast<size_t>(k * 32 + 2 * n + i)]), temp[i]);
      float& out = c[static_cast<size_t>(m * 16 + n)];
      out = fused(1, out, fused(1, temp[0], temp[1]));
    }
  return c;
}

void expect_same_bits(const Shape& s, const std::vector<float>& got, const std::vector<float>& expected) {
  for (int m = 0; m < s.m; ++m)
    for (int n = 0; n < s.n; ++n) {
      const float g = got[static_cast<size_t>(m * 16 + n)], e = expected[static_cast<size_t>(m * 16 + n)];
      if (std::isnan(g) && std::isnan(e)) continue;
      ASSERT_EQ(std::bit_cast<uint32_t>(g), std::bit_cast<uint32_t>(e)) << g << " " << e << " at " << m << " " << n;
    }
}

TEST(AmxTile, DotBf16IsTheManuals) {
  if (!detect_cpu_features().avx2) return;  // the emulation needs AVX2
  std::mt19937 random(31);
  const auto word = [&](int kind) -> uint16_t {
    const uint32_t bits = static_cast<uint32_t>(random());
    switch (kind) {
      case 0:  // ordinary
        return static_cast<uint16_t>((bits & 0x807f) | ((120 + bits % 14) << 7));
      case 1:  // products around the smallest normal
        return static_cast<uint16_t>((bits & 0x807f) | ((58 + bits % 12) << 7));
      case 2:  // anything finite, subnormals too
        return static_cast<uint16_t>((bits & 0x7f80) == 0x7f80 ? bits & 0x80ff : bits);
      default:  // few and large: infinities and NaN arise
        return static_cast<uint16_t>(bits % 8 ? 0 : (bits & 0x80ff) | 0x7f00);
    }
  };
  for (const Shape& s : {Shape{16, 16, 16}, Shape{1, 16, 16}, Shape{5, 16, 16}, Shape{16, 3, 16}, Shape{7, 9, 4}})
    for (int round = 0; round < 40; ++round) {
      const int kind = round % 4;
      std::vector<uint16_t> a(16 * 32), b(16 * 32);
      std::vector<float> c(16 * 16), out(16 * 16);
      for (uint16_t& v : a) v = word(kind);
      for (uint16_t& v : b) v = word(kind);
      for (float& v : c)
        v = std::bit_cast<float>(static_cast<uint32_t>(word(kind)) << 16 | static_cast<uint32_t>(random() & 0xffffu));
      if (kind == 3)
        for (float& v : c) v = 0;
      load_operands(s, a.data(), b.data(), c.data());
      const unsigned before = _mm_getcsr();
      tile::dot_bf16<0, 1, 2>();
      EXPECT_EQ((_mm_getcsr() ^ before) & 0xffc0u, 0u) << "MXCSR is as it was";
      tile::store<0>(out.data(), 64);
      tile::release();
      expect_same_bits(s, out, pseudo_code(s, a, b, c));
    }
}

TEST(AmxTile, DotInt8IsTheManuals) {
  if (!detect_cpu_features().avx2) return;
  std::mt19937 random(32);
  for (const Shape& s : {Shape{16, 16, 16}, Shape{3, 16, 8}, Shape{16, 5, 1}}) {  // k_pairs: groups of four
    std::vector<int8_t> a(16 * 64), b(16 * 64);
    std::vector<int32_t> c(16 * 16), out(16 * 16);
    for (int8_t& v : a) v = static_cast<int8_t>(random());
    for (int8_t& v : b) v = static_cast<int8_t>(random());
    for (int32_t& v : c) v = static_cast<int32_t>(random());  // sums wrap
    load_operands(s, a.data(), b.data(), c.data());
    tile::dot_int8<0, 1, 2>();
    tile::store<0>(out.data(), 64);
    tile::release();
    for (int m = 0; m < s.m; ++m)
      for (int n = 0; n < s.n; ++n) {
        uint32_t sum = static_cast<uint32_t>(c[static_cast<size_t>(m * 16 + n)]);
        for (int k = 0; k < 4 * s.k_pairs; ++k)
          sum += static_cast<uint32_t>(a[static_cast<size_t>(m * 64 + k)] *
                                       b[static_cast<size_t>(k / 4 * 64 + 4 * n + k % 4)]);
        ASSERT_EQ(out[static_cast<size_t>(m * 16 + n)], static_cast<int32_t>(sum));
      }
  }
}

TEST(AmxTile, LoadsZeroWhatTheShapeLeavesOut) {
  if (!detect_cpu_features().avx2) return;
  std::vector<uint8_t> data(1024, 0xff), out(1024, 0x11);
  tile::Config config;
  config.set(0, 16, 64);
  tile::load_config(config);
  tile::load<0>(data.data(), 64);
  config.set(0, 3, 20);
  tile::load_config(config);  // a new configuration zeroes all tiles
  tile::load<0>(data.data(), 64);
  tile::store<0>(out.data(), 64);
  for (int row = 0; row < 16; ++row)
    for (int byte = 0; byte < 64; ++byte)
      EXPECT_EQ(out[static_cast<size_t>(row * 64 + byte)], row < 3 && byte < 20 ? 0xff : 0x11);
  tile::zero<0>();
  tile::store<0>(out.data(), 64);
  EXPECT_EQ(out[0], 0);
  tile::release();
}

}  // namespace
}  // namespace thermocline::cpu
