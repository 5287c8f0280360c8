// The number formats of a DeepSeek-V4 checkpoint as plain bit arithmetic: BF16, F16, FP8 e4m3fn, FP4 e2m1, E8M0.
// Source: spec sections 2.2 and 5.2 (OCP 8-bit and MX formats).
//
// Every function is `static`: this header is also included by units built with AVX-512 flags, and an inline copy
// shared with baseline code could be linked from there and fault on an older CPU.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace thermocline {

using bf16 = uint16_t;  // the upper half of an IEEE float32

[[maybe_unused]] static inline float bf16_to_float(bf16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x) << 16);
}

/// Round to nearest, ties to even; NaN stays NaN.
[[maybe_unused]] static inline bf16 float_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40u);
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/// The nearest BF16 value, as a float. Inputs are finite.
[[maybe_unused]] static inline float round_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

[[maybe_unused]] static inline float f16_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t exponent = (x >> 10) & 31u, mantissa = x & 1023u;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0)
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
  return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

/// Unsigned integers in the order of the floats, -0 being 0. Also an order where there are NaNs, as < on floats is not:
/// they lie beyond the infinity of their sign.
[[maybe_unused]] static inline uint32_t ordered_bits(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

/// 2^(byte - 127); 255 is NaN.
[[maybe_unused]] static inline float e8m0_to_float(uint8_t byte) {
  if (byte == 255) return std::bit_cast<float>(0x7fc00000u);
  return std::bit_cast<float>(byte == 0 ? 0x00400000u : static_cast<uint32_t>(byte) << 23);
}

/// The smallest power of two that is not below x (x finite and positive): exponent + (mantissa != 0) on the bits.
[[maybe_unused]] static inline float pow2_ceil(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>((((bits >> 23) & 255u) + ((bits & 0x7fffffu) != 0)) << 23);
}

/// FP8 e4m3fn: 1-4-3, bias 7, no infinities, NaN is 0x7f and 0xff.
[[maybe_unused]] static inline float e4m3_to_float(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const uint32_t exponent = (code >> 3) & 15u, mantissa = code & 7u;
  if (exponent == 15 && mantissa == 7) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (exponent == 0)
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-9f));
  return std::bit_cast<float>(sign | ((exponent + 120u) << 23) | (mantissa << 20));
}

/// The nearest e4m3 code, ties to even; |x| above 448 becomes 448.
[[maybe_unused]] static inline uint8_t float_to_e4m3(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint8_t sign = static_cast<uint8_t>((bits >> 24) & 0x80u);
  const float magnitude = std::bit_cast<float>(bits & 0x7fffffffu);
  if (magnitude >= 448.0f) return static_cast<uint8_t>(sign | 0x7e);
  if (magnitude < 0x1p-6f)  // subnormal grid of 2^-9: adding 2^14 leaves it in the last bits, rounded to even
    return static_cast<uint8_t>(sign |
                                (std::bit_cast<uint32_t>(magnitude + 0x1p14f) - std::bit_cast<uint32_t>(0x1p14f)));
  const uint32_t rounded = std::bit_cast<uint32_t>(magnitude) + 0x7ffffu + ((bits >> 20) & 1u);
  return static_cast<uint8_t>(sign | ((rounded >> 20) - (120u << 3)));
}

/// FP4 e2m1: codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; codes 8..15 their negatives.
inline constexpr float kE2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                    -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

/// The nearest e2m1 code, ties to the even code; |x| above 6 becomes 6.
[[maybe_unused]] static inline uint8_t float_to_e2m1(float x) {
  const uint8_t sign = std::signbit(x) ? 8 : 0;
  const float m = std::fabs(x);
  uint8_t code = 7;
  if (m <= 0.25f)
    code = 0;
  else if (m < 0.75f)
    code = 1;
  else if (m <= 1.25f)
    code = 2;
  else if (m < 1.75f)
    code = 3;
  else if (m <= 2.5f)
    code = 4;
  else if (m < 3.5f)
    code = 5;
  else if (m <= 5.0f)
    code = 6;
  return static_cast<uint8_t>(sign | code);
}

}  // namespace thermocline
