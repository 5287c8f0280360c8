// Vectors of 16 floats: tails, sums, roundings to bf16, for the AVX-512 units. Internal linkage, as in decode.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace thermocline::cpu {
namespace {

[[maybe_unused]] __mmask16 tail_mask(int64_t left) {
  return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

// Lane i of the result is the sum of the lanes of v[i]; always the same tree.
[[maybe_unused]] __m512 sum_lanes(const __m512* v) {
  __m512 t[8], u[4];
  for (int i = 0; i < 8; ++i)
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto halve = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halve(halve(u[0], u[1]), halve(u[2], u[3]));
}

// Scores of up to four heads and four rows from their sums a lane, row fastest.
[[maybe_unused]] void store_scores(const __m512* acc, float scale, int heads, int rows, float* scores, int64_t stride) {
  alignas(64) float out[16];
  _mm512_store_ps(out, _mm512_mul_ps(sum_lanes(acc), _mm512_set1_ps(scale)));
  for (int k = 0; k < heads; ++k)
    for (int j = 0; j < rows; ++j) scores[k * stride + j] = out[4 * k + j];
}

[[maybe_unused]] __m512i round_bf16_bits(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
[[maybe_unused]] __m512 round_bf16(__m512 x) {
  return _mm512_castsi512_ps(_mm512_and_si512(round_bf16_bits(x), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

[[maybe_unused]] __m256i to_bf16(__m512 x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16_bits(x), 16)); }

// The two bf16 of every dword as f32.
[[maybe_unused]] __m512 even_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
[[maybe_unused]] __m512 odd_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

}  // namespace
}  // namespace thermocline::cpu
