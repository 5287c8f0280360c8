// Number formats on the device: the bit arithmetic of runtime/base/number_formats.h, and blocks rounded by a warp.
#pragma once

#include "kernels_gpu/device/simt.cuh"
#include "runtime/base/number_formats.h"

namespace thermocline::gpu::dev {

TC_DEVICE float widen(bf16 x) { return bits_to<float>(static_cast<uint32_t>(x) << 16); }
TC_DEVICE bf16 narrow(float x) {
  const uint32_t bits = bits_to<uint32_t>(x);
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
TC_DEVICE float to_bf16(float x) { return widen(narrow(x)); }
TC_DEVICE uint32_t pack_bf16(float low, float high) {
  return static_cast<uint32_t>(narrow(low)) | static_cast<uint32_t>(narrow(high)) << 16;
}

TC_DEVICE float power_of_two_above(float x) {
  const uint32_t bits = bits_to<uint32_t>(x);
  return bits_to<float>((((bits >> 23) & 255u) + ((bits & 0x7fffffu) != 0)) << 23);
}
TC_DEVICE float e8m0(uint8_t byte) {
  return bits_to<float>(byte == 0 ? 0x00400000u : static_cast<uint32_t>(byte) << 23);
}

/// The value of the nearest e4m3 code, |x| <= 448.
TC_DEVICE float nearest_e4m3(float x) {
  const uint32_t bits = bits_to<uint32_t>(x), sign = bits & 0x80000000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) & 0xfff00000u;
  // Below 2^-6 the grid is 2^-9; adding 2^14, whose last bit is 2^-9, rounds to it.
  const uint32_t small = bits_to<uint32_t>(add(add(bits_to<float>(magnitude), 16384.0f), -16384.0f));
  return bits_to<float>(sign | (magnitude < 0x3c800000u ? small : normal));
}
/// x scaled by a block's maximum, rounded to e4m3, and scaled back (spec 5.2).
TC_DEVICE float e4m3_scale(float amax) { return power_of_two_above(mul(max_of(amax, 1e-4f), 1.0f / 448.0f)); }
TC_DEVICE float scaled_to_e4m3(float x, float scale) {
  return nearest_e4m3(min_of(448.0f, max_of(-448.0f, mul(x, 1.0f / scale))));
}
TC_DEVICE float fake_e4m3(float x, float amax) {
  const float scale = e4m3_scale(amax);
  return mul(scaled_to_e4m3(x, scale), scale);
}
/// The code of a value on the e4m3 grid.
TC_DEVICE uint8_t e4m3_code(float x) {
  const uint32_t bits = bits_to<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t code = magnitude < 0x3c800000u ? static_cast<uint32_t>(bits_to<float>(magnitude) * 512.0f)
                                                : (magnitude >> 20) - (120u << 3);
  return static_cast<uint8_t>((bits >> 24 & 0x80u) | code);
}
/// Two bf16 values of e4m3 codes in the low bytes of both halves: exact, subnormals included.
TC_DEVICE uint32_t e4m3_pair(uint32_t t) {
  return mul_bf16x2((t & 0x00800080u) << 8 | (t & 0x007f007fu) << 4, 0x7b807b80u);
}
/// The same with e2m1: the code, and its block's scale.
TC_DEVICE float e2m1_scale(float amax) {
  return power_of_two_above(mul(max_of(amax, 6 * 1.1754943508222875e-38f), 1.0f / 6.0f));
}
TC_DEVICE uint32_t nearest_e2m1(float x) {
  const float m = x < 0 ? -x : x;
  const uint32_t sign = bits_to<uint32_t>(x) >> 31 << 3;
  const uint32_t code = (m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) + (m >= 3.5f) + (m > 5.0f);
  return sign | code;
}
TC_DEVICE float e2m1_value(uint32_t code) {
  const uint32_t magnitude = code & 7;
  const float value = magnitude < 4    ? 0.5f * static_cast<float>(magnitude)
                      : magnitude == 7 ? 6.0f
                                       : static_cast<float>(magnitude - 2);
  return code & 8 ? -value : value;
}

TC_DEVICE float absolute(float x) { return x < 0 ? -x : x; }
TC_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/// Whole warp: columns [begin, begin + 128) of a row, read by load(column), as inputs of linears.
template <class Load, class View>
TC_DEVICE void store_linear_block(const Load& load, int64_t begin, int64_t width, bool round, const View& out) {
  float x[4], amax = 0;
  for (int i = 0; i < 4; ++i) {
    const int64_t column = begin + 4 * lane() + i;
    x[i] = column < width ? static_cast<float>(load(column)) : 0.0f;
    amax = max_of(amax, absolute(x[i]));
  }
  if (round) amax = warp_max(amax);
  for (int i = 0; i < 4; ++i) {
    const int64_t column = begin + 4 * lane() + i;
    if (column < width) out[column] = narrow(round ? fake_e4m3(x[i], amax) : x[i]);
  }
}

}  // namespace thermocline::gpu::dev
