// Packed lines to vector operands, for the AVX-512 and AMX units. Everything has internal linkage: see STYLE, a unit
// keeps its helpers to itself.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels_cpu/packed_matrix.h"

namespace thermocline::cpu {
namespace {

// --- decoders to bf16: one 64-byte line into vectors of 32 bf16, 16 rows x a column pair, pairs in rising order ---

template <bool is_int4>
struct NibbleLines {
  static constexpr int kLines = 4, kVectors = 4;
  // The 16 values as bf16, twice: vpermw looks at five bits, so bit 4 of the index does not matter.
  __m512i values;
  NibbleLines() {
    alignas(64) constexpr uint16_t kE2m1[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
                                                0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
    alignas(64) constexpr uint16_t kInt4[16] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    values = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(is_int4 ? kInt4 : kE2m1)));
  }
  void decode(const uint8_t* line, __m512i* v) const {
    const __m512i words = _mm512_loadu_si512(line);
    v[0] = _mm512_permutexvar_epi16(words, values);
    v[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), values);
    v[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), values);
    v[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), values);
  }
};

// The 128 non-negative byte codes as bf16, upper and lower bytes apart.
struct ByteTables {
  alignas(64) uint8_t high[128] = {}, low[128] = {};
};
constexpr ByteTables make_byte_tables(bool is_int8) {
  // value x 2^exponent as bf16, value < 256.
  const auto bf16_word = [](int value, int exponent) {
    if (value == 0) return 0;
    int top = 0;
    while (value >> (top + 1)) ++top;
    return ((127 + exponent + top) << 7) | ((value << 7 >> top) & 0x7f);
  };
  ByteTables tables;
  for (int code = 0; code < 128; ++code) {
    const int exponent = code >> 3, mantissa = code & 7;
    const int word = is_int8         ? bf16_word(code, 0)
                     : exponent == 0 ? bf16_word(mantissa, -9)
                                     : bf16_word(8 + mantissa, exponent - 10);
    tables.high[code] = static_cast<uint8_t>(word >> 8);
    tables.low[code] = static_cast<uint8_t>(word);
  }
  return tables;
}
constexpr ByteTables kE4m3Tables = make_byte_tables(false), kInt8Tables = make_byte_tables(true);

template <bool is_int8>
struct ByteLines {
  static constexpr int kLines = 8, kVectors = 2;
  static constexpr const ByteTables& kTables = is_int8 ? kInt8Tables : kE4m3Tables;
  const __m512i high[2] = {_mm512_load_si512(kTables.high), _mm512_load_si512(kTables.high + 64)};
  const __m512i low[2] = {_mm512_load_si512(kTables.low), _mm512_load_si512(kTables.low + 64)};
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  void decode(const uint8_t* line, __m512i* v) const {
    __m512i codes = _mm512_loadu_si512(line);
    asm("" : "+v"(codes));  // else GCC loads the line again for each look-up
    const __m512i magnitude = _mm512_permutex2var_epi8(high[0], codes, high[1]);    // bit 7 of an index is ignored
    const __m512i upper = _mm512_ternarylogic_epi32(magnitude, codes, sign, 0xf8);  // magnitude | (codes & sign)
    const __m512i lower = _mm512_permutex2var_epi8(low[0], codes, low[1]);
    v[0] = _mm512_unpacklo_epi8(lower, upper);
    v[1] = _mm512_unpackhi_epi8(lower, upper);
  }
};

struct Bf16Lines {
  static constexpr int kLines = 16, kVectors = 1;
  void decode(const uint8_t* line, __m512i* v) const { v[0] = _mm512_loadu_si512(line); }
};

// --- int8 activations: decoders to biased bytes, eight columns at a time, {0,4,1,5} then {2,6,3,7} ---

template <bool is_int4>
struct NibbleBytes {
  static constexpr int kLines = 4;
  static constexpr int kBias = is_int4 ? 8 : 12;
  static constexpr float kValue = is_int4 ? 1.0f : 0.5f;  // e2m1 in halves is an integer
  const __m512i low_nibbles = _mm512_set1_epi8(0x0f);
  const __m512i values =
      _mm512_broadcast_i32x4(is_int4 ? _mm_setr_epi8(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
                                     : _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  void decode(const uint8_t* tile, int block, __m512i* v) const {
    const __m512i codes = _mm512_loadu_si512(tile + block * 64);
    v[0] = _mm512_shuffle_epi8(values, _mm512_and_si512(codes, low_nibbles));
    v[1] = _mm512_shuffle_epi8(values, _mm512_and_si512(_mm512_srli_epi16(codes, 4), low_nibbles));
  }
};

struct Int8Bytes {
  static constexpr int kLines = 8;
  static constexpr int kBias = 128;
  static constexpr float kValue = 1.0f;
  // Sign and magnitude to value + 128.
  static __m512i biased(const uint8_t* line) {
    const __m512i codes = _mm512_loadu_si512(line), bias = _mm512_set1_epi8(static_cast<char>(0x80));
    const __mmask64 negative = _mm512_movepi8_mask(codes);
    // A negative code is 128 + magnitude, its value + 128 is 128 - magnitude = 0 - code mod 256.
    return _mm512_mask_sub_epi8(_mm512_or_si512(codes, bias), negative, _mm512_setzero_si512(), codes);
  }
  void decode(const uint8_t* tile, int block, __m512i* v) const {
    const __m512i a = biased(tile + block * 128), b = biased(tile + block * 128 + 64);
    v[0] = _mm512_unpacklo_epi8(a, b);
    v[1] = _mm512_unpackhi_epi8(a, b);
  }
};

// --- scales ---

// Scales of `group`, which covers `scale_tiles` tiles: a vector of 16 rows.
template <ScaleFormat format>
__m512 load_scale(const RowGroup& w, int64_t group) {
  if constexpr (format == ScaleFormat::e8m0_rows) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(w.scales) + group);
    const __m512i exponents = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
    // Byte 0 is 2^-127, a subnormal float.
    return _mm512_castsi512_ps(
        _mm512_mask_mov_epi32(exponents, _mm512_testn_epi32_mask(exponents, exponents), _mm512_set1_epi32(0x00400000)));
  } else if constexpr (format == ScaleFormat::f32_rows) {
    return _mm512_loadu_ps(static_cast<const float*>(w.scales) + group * 16);
  } else {
    return _mm512_set1_ps(static_cast<const float*>(w.scales)[group]);
  }
}

}  // namespace
}  // namespace thermocline::cpu
