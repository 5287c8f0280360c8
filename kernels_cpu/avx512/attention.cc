// AVX-512 attention and index micro-kernels, softmax, SwiGLU, norms and the float32 GEMV.
#include <immintrin.h>

#include "kernels_cpu/avx512/decode.h"
#include "kernels_cpu/avx512/lanes.h"
#include "kernels_cpu/kernel_table.h"

namespace thermocline::cpu::avx512 {
namespace {

__m512 load_bf16(const uint16_t* p, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

template <int H>
void scores_h(const float* q, int64_t q_stride, const void* const* rows, int64_t n, int64_t c, float scale,
              float* scores, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t* row = static_cast<const uint16_t*>(rows[i]);
    __m512 acc[H];
    for (int h = 0; h < H; ++h) acc[h] = _mm512_setzero_ps();
    for (int64_t d = 0; d < c; d += 16) {
      const __mmask16 mask = tail_mask(c - d);
      const __m512 r = load_bf16(row + d, mask);
      for (int h = 0; h < H; ++h)
        acc[h] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, q + h * q_stride + d), r, acc[h]);
    }
    for (int h = 0; h < H; ++h) scores[h * stride + i] = _mm512_reduce_add_ps(acc[h]) * scale;
  }
}

void attention_scores(const float* q, int64_t q_stride, int heads, const void* const* rows, int64_t n, int64_t c,
                      float scale, float* scores, int64_t stride) {
  int h = 0;
  for (; h + 8 <= heads; h += 8)
    scores_h<8>(q + h * q_stride, q_stride, rows, n, c, scale, scores + h * stride, stride);
  for (; h < heads; ++h) scores_h<1>(q + h * q_stride, q_stride, rows, n, c, scale, scores + h * stride, stride);
}

// H heads x V vectors of 16 dims stay in registers while the rows stream past.
template <int H, int V>
void values_block(const float* p, int64_t p_stride, const void* const* rows, int64_t n, int64_t d, __mmask16 mask,
                  float* out, int64_t stride) {
  __m512 acc[H][V];
  for (auto& head : acc)
    for (__m512& a : head) a = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t* row = static_cast<const uint16_t*>(rows[i]) + d;
    for (int v = 0; v < V; ++v) {
      const __m512 r = load_bf16(row + v * 16, mask);
      for (int h = 0; h < H; ++h) acc[h][v] = _mm512_fmadd_ps(_mm512_set1_ps(p[h * p_stride + i]), r, acc[h][v]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int v = 0; v < V; ++v) _mm512_mask_storeu_ps(out + h * stride + d + v * 16, mask, acc[h][v]);
}

template <int H>
void values_h(const float* p, int64_t p_stride, const void* const* rows, int64_t n, int64_t c, float* out,
              int64_t stride) {
  int64_t d = 0;
  for (; d + 64 <= c; d += 64) values_block<H, 4>(p, p_stride, rows, n, d, 0xffff, out, stride);
  for (; d < c; d += 16) values_block<H, 1>(p, p_stride, rows, n, d, tail_mask(c - d), out, stride);
}

void attention_values(const float* p, int64_t p_stride, int heads, const void* const* rows, int64_t n, int64_t c,
                      float* out, int64_t stride) {
  int h = 0;
  for (; h + 4 <= heads; h += 4) values_h<4>(p + h * p_stride, p_stride, rows, n, c, out + h * stride, stride);
  for (; h < heads; ++h) values_h<1>(p + h * p_stride, p_stride, rows, n, c, out + h * stride, stride);
}

// --- bf16 x bf16: q and p are rounded, so vdpbf16ps takes them as they are ---

__m512bh as_bf16(__m512i v) { return reinterpret_cast<__m512bh>(v); }

// Four heads x four rows share their loads: 8 loads and 16 vdpbf16ps per 32 dims, then 45 instructions for 16 sums.
void attention_dots(const float* queries, int64_t q_stride, int heads, const void* const* rows, int64_t n, int64_t c,
                    float scale, float* scores, int64_t stride) {
  alignas(64) uint16_t q[kMaxDotQueries];
  for (int h = 0; h < heads; ++h)
    for (int64_t d = 0; d < c; d += 16)
      _mm256_store_si256(reinterpret_cast<__m256i*>(q + h * c + d),
                         to_bf16(_mm512_loadu_ps(queries + h * q_stride + d)));
  for (int64_t i = 0; i < n; i += 4) {
    const int row_count = n - i < 4 ? static_cast<int>(n - i) : 4;
    const uint16_t* r[4];
    for (int j = 0; j < 4; ++j) r[j] = static_cast<const uint16_t*>(rows[i + (j < row_count ? j : 0)]);
    for (int h = 0; h < heads; h += 4) {
      const int head_count = heads - h < 4 ? heads - h : 4;
      const uint16_t* qh[4];
      for (int j = 0; j < 4; ++j) qh[j] = q + (h + (j < head_count ? j : 0)) * c;
      __m512 acc[16];
      for (__m512& a : acc) a = _mm512_setzero_ps();
      for (int64_t d = 0; d < c; d += 32) {
        __m512i row[4];
        for (int j = 0; j < 4; ++j) row[j] = _mm512_loadu_si512(r[j] + d);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const __m512i query = _mm512_loadu_si512(qh[k] + d);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j)
            acc[4 * k + j] = _mm512_dpbf16_ps(acc[4 * k + j], as_bf16(query), as_bf16(row[j]));
        }
      }
      store_scores(acc, scale, head_count, row_count, scores + h * stride + i, stride);
    }
  }
}

// Two rows interleave word by word into column pairs of (row i, row i + 1); H heads x 32 dims stay in registers.
template <int H>
void values_dots_h(const uint32_t* pairs, int64_t pair_stride, const void* const* rows, int64_t n, int64_t c,
                   float* out, int64_t stride) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int64_t d = 0; d < c; d += 32) {
    __m512 low[H], high[H];
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) low[h] = high[h] = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 2) {
      const __m512i a = _mm512_loadu_si512(static_cast<const uint16_t*>(rows[i]) + d);
      const __m512i b = _mm512_loadu_si512(static_cast<const uint16_t*>(rows[i + 1 < n ? i + 1 : i]) + d);
      const __m512bh lo = as_bf16(_mm512_unpacklo_epi16(a, b)), hi = as_bf16(_mm512_unpackhi_epi16(a, b));
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) {
        const __m512bh p = as_bf16(_mm512_set1_epi32(static_cast<int>(pairs[h * pair_stride + i / 2])));
        low[h] = _mm512_dpbf16_ps(low[h], lo, p);
        high[h] = _mm512_dpbf16_ps(high[h], hi, p);
      }
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
      _mm512_storeu_ps(out + h * stride + d, _mm512_permutex2var_ps(low[h], first, high[h]));
      _mm512_storeu_ps(out + h * stride + d + 16, _mm512_permutex2var_ps(low[h], second, high[h]));
    }
  }
}

// p becomes bf16 in place: the words of a head lie at the start of its floats.
void attention_values_dots(float* p, int64_t p_stride, int heads, const void* const* rows, int64_t n, int64_t c,
                           float* out, int64_t stride) {
  for (int h = 0; h < heads; ++h) {
    const float* from = p + h * p_stride;
    uint16_t* to = reinterpret_cast<uint16_t*>(p + h * p_stride);
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 mask = tail_mask(n - i);
      const __m512 v = _mm512_maskz_loadu_ps(mask, from + i);
      const __m256i words = to_bf16(v);
      // An odd count is filled up with one zero; there is room, as n words take half of n floats.
      _mm256_mask_storeu_epi16(to + i, n - i < 16 && n % 2 ? static_cast<__mmask16>(mask << 1 | 1) : mask, words);
    }
  }
  const uint32_t* pairs = reinterpret_cast<const uint32_t*>(p);
  int h = 0;
  for (; h + 8 <= heads; h += 8) values_dots_h<8>(pairs + h * p_stride, p_stride, rows, n, c, out + h * stride, stride);
  for (; h < heads; ++h) values_dots_h<1>(pairs + h * p_stride, p_stride, rows, n, c, out + h * stride, stride);
}

// --- FP8 rows ---

constexpr int64_t kRowsAhead = 4;  // rows lie anywhere: no hardware prefetcher finds the next one

// 64 codes -> 64 bf16 words. Codes look up their bf16 value, zero included; a power of two adds to its exponent.
void unpack_codes(const ByteLines<false>& decoder, const uint8_t* codes, uint8_t scale, __m512i* words) {
  const __m512i low_half = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                high_half = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const __m512i exponent = _mm512_set1_epi16(static_cast<int16_t>((scale - 127) * 128)),
                magnitude = _mm512_set1_epi16(0x7fff);
  __m512i v[2];
  decoder.decode(codes, v);
  for (__m512i& word : v) word = _mm512_mask_add_epi16(word, _mm512_test_epi16_mask(word, magnitude), word, exponent);
  words[0] = _mm512_permutex2var_epi64(v[0], low_half, v[1]);
  words[1] = _mm512_permutex2var_epi64(v[0], high_half, v[1]);
}

void unpack_fp8_rows(const void* const* rows, int64_t n, int64_t nope, int64_t rope, uint16_t* out) {
  const ByteLines<false> decoder;
  const int64_t bytes = 2 * rope + nope + (nope + kFp8Block - 1) / kFp8Block;
  for (int64_t i = 0; i < n; ++i, out += nope + rope) {
    const uint8_t* row = static_cast<const uint8_t*>(rows[i]);
    const char* ahead = static_cast<const char*>(rows[i + kRowsAhead < n ? i + kRowsAhead : i]);
    for (int64_t byte = 0; byte < bytes; byte += 64) _mm_prefetch(ahead + byte, _MM_HINT_T0);
    const uint8_t* codes = row + 2 * rope;
    const uint8_t* scales = codes + nope;
    __m512i words[2];
    int64_t d = 0;
    for (; d + 64 <= nope; d += 64) {
      unpack_codes(decoder, codes + d, scales[d / kFp8Block], words);
      _mm512_storeu_si512(out + d, words[0]);
      _mm512_storeu_si512(out + d + 32, words[1]);
    }
    if (d < nope) {
      alignas(64) uint8_t tail[64] = {};
      for (int64_t j = d; j < nope; ++j) tail[j - d] = codes[j];
      unpack_codes(decoder, tail, scales[d / kFp8Block], words);
      const uint64_t mask = (uint64_t{1} << (nope - d)) - 1;
      _mm512_mask_storeu_epi16(out + d, static_cast<__mmask32>(mask), words[0]);
      _mm512_mask_storeu_epi16(out + d + 32, static_cast<__mmask32>(mask >> 32), words[1]);
    }
    for (int64_t r = 0; r < rope; r += 16) {
      const __mmask16 mask = tail_mask(rope - r);
      _mm256_mask_storeu_epi16(out + nope + r, mask, _mm256_maskz_loadu_epi16(mask, row + 2 * r));
    }
  }
}

// --- index scores ---

// An FP4 key has one power-of-two scale per 32 dims, and so has a query head. Where the scales of a vector lie within
// 2^3 of each other, they go into the integers: a key is then at most 12 x 8 = 96, a query too, and the whole dot
// product is one exact int32 times a power of two. Rounding to bf16 does not mind powers of two, so a row's scale is
// left to the end and a head's rides on its gate. Others take the plain path; both are exact where both apply.
constexpr int kKeyBias = 96;
constexpr int kMaxKeyTiles = 8;

struct KeyBlock {                                      // two groups of 16 rows
  alignas(64) uint8_t bytes[2][kMaxKeyTiles * 8][64];  // biased, in the column order of Int8Chunk
  __m512 scale[2];
};

// False where the scales of a row lie too far apart.
bool decode_keys(const uint8_t* group, int64_t k_tiles, uint8_t (*bytes)[64], __m512& scale) {
  const uint8_t* exponents = group + k_tiles * 256;
  __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(exponents)), high = low;
  for (int64_t tile = 1; tile < k_tiles; ++tile) {
    const __m128i e = _mm_loadu_si128(reinterpret_cast<const __m128i*>(exponents) + tile);
    low = _mm_min_epu8(low, e);
    high = _mm_max_epu8(high, e);
  }
  if (_mm_cmpgt_epu8_mask(_mm_sub_epi8(high, low), _mm_set1_epi8(3)) != 0) return false;
  // A quarter for the halves of key and query; exponents this low would be no keys.
  scale = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(low), 23)), _mm512_set1_ps(0.25f));
  // Biased by 12 a value is 0..24, so a row's four bytes shift together; the bias then becomes 96 for every row.
  const __m512i values =
      _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  const __m512i nibbles = _mm512_set1_epi8(0x0f), twelve = _mm512_set1_epi8(12), bias = _mm512_set1_epi8(kKeyBias);
  for (int64_t tile = 0; tile < k_tiles; ++tile) {
    const __m128i up = _mm_sub_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(exponents) + tile), low);
    const __m512i shifts = _mm512_cvtepu8_epi32(up);
    const __m512i rest = _mm512_sub_epi8(bias, _mm512_sllv_epi32(twelve, shifts));
#pragma GCC unroll 4
    for (int line = 0; line < 4; ++line) {
      const __m512i codes = _mm512_loadu_si512(group + tile * 256 + line * 64);
      const __m512i v[2] = {_mm512_shuffle_epi8(values, _mm512_and_si512(codes, nibbles)),
                            _mm512_shuffle_epi8(values, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibbles))};
      for (int half = 0; half < 2; ++half)
        _mm512_store_si512(bytes[tile * 8 + line * 2 + half],
                           _mm512_add_epi8(_mm512_sllv_epi32(v[half], shifts), rest));
    }
  }
  return true;
}

// Dot products of up to eight heads that wait for their rounding, gate and sum. That takes 14 instructions each on
// ports the dot products leave idle, so they are done between those of the next heads.
struct PendingDots {
  alignas(64) int32_t dots[8][2][16] = {};
  float gates[8] = {};  // 0: nothing waits
};

void add_pending(const PendingDots& pending, int unit, __m512* sums) {
  const int head = unit / 2, half = unit % 2;
  const __m512i dots = _mm512_max_epi32(_mm512_load_si512(pending.dots[head][half]), _mm512_setzero_si512());
  const __m512 dot = round_bf16(_mm512_cvtepi32_ps(dots));
  sums[half] = _mm512_add_ps(sums[half], round_bf16(_mm512_mul_ps(_mm512_set1_ps(pending.gates[head]), dot)));
}

// H heads x 32 rows: 2 + H loads and 2 H vpdpbusd per 4 dims.
template <int H>
void score_heads(const Int8Chunk* q, const float* gates, const KeyBlock& keys, int64_t k_tiles, PendingDots& pending,
                 __m512* sums) {
  __m512i dots[H][2];
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) {
    int32_t total = 0;
    for (int64_t tile = 0; tile < k_tiles; ++tile) total += q[h * k_tiles + tile].sum;
    dots[h][0] = dots[h][1] = _mm512_set1_epi32(-kKeyBias * total);
  }
  int unit = 0;
  for (int64_t tile = 0; tile < k_tiles; ++tile) {
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step) {
      const __m512i a = _mm512_load_si512(keys.bytes[0][tile * 8 + step]),
                    b = _mm512_load_si512(keys.bytes[1][tile * 8 + step]);
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) {
        const __m512i x = _mm512_set1_epi32(reinterpret_cast<const int32_t*>(q[h * k_tiles + tile].codes)[step]);
        dots[h][0] = _mm512_dpbusd_epi32(dots[h][0], a, x);
        dots[h][1] = _mm512_dpbusd_epi32(dots[h][1], b, x);
      }
      if (step % 2 == 0 && unit < 16) add_pending(pending, unit++, sums);
    }
  }
  while (unit < 16) add_pending(pending, unit++, sums);
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) {
    _mm512_store_si512(pending.dots[h][0], dots[h][0]);
    _mm512_store_si512(pending.dots[h][1], dots[h][1]);
  }
  for (int h = 0; h < 8; ++h) pending.gates[h] = h < H ? gates[h] * q[h * k_tiles].scale : 0.0f;
}

void index_scores_fp4(const Int8Chunk* q, const float* gates, int heads, const uint8_t* const* groups, int64_t n,
                      int64_t k_tiles, float* scores) {
  bool folded = k_tiles <= kMaxKeyTiles;
  for (int h = 0; h < heads; ++h)
    for (int64_t tile = 1; tile < k_tiles; ++tile) folded &= q[h * k_tiles + tile].scale == q[h * k_tiles].scale;
  if (!folded) return scalar::index_scores_fp4(q, gates, heads, groups, n, k_tiles, scores);
  KeyBlock keys;
  for (int64_t g = 0; g < n; g += 2) {
    const int64_t count = n - g < 2 ? n - g : 2;
    bool fits = decode_keys(groups[g], k_tiles, keys.bytes[0], keys.scale[0]);
    fits &= decode_keys(groups[g + count - 1], k_tiles, keys.bytes[1], keys.scale[1]);
    if (!fits) {
      scalar::index_scores_fp4(q, gates, heads, groups + g, count, k_tiles, scores + g * 16);
      continue;
    }
    if (g + 8 < n) {
      for (int64_t byte = 0; byte < key_group_bytes(k_tiles); byte += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(groups[g + 7] + byte), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(groups[g + 8] + byte), _MM_HINT_T0);
      }
    }
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    PendingDots pending;
    int h = 0;
    for (; h + 8 <= heads; h += 8) score_heads<8>(q + h * k_tiles, gates + h, keys, k_tiles, pending, sums);
    for (; h < heads; ++h) score_heads<1>(q + h * k_tiles, gates + h, keys, k_tiles, pending, sums);
    for (int unit = 0; unit < 16; ++unit) add_pending(pending, unit, sums);
    for (int64_t i = 0; i < count; ++i)
      _mm512_storeu_ps(scores + (g + i) * 16, _mm512_mul_ps(round_bf16(sums[i]), keys.scale[i]));
  }
}

// --- exp, softmax, SwiGLU ---

// Within 1 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, exp(r) by its Taylor sum to r^7. Below -104 it is zero.
__m512 exp(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

float softmax_with_sink(float* scores, int64_t n, float sink, bool round) {
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
  __m512 maxima = lowest;
  for (int64_t i = 0; i < n; i += 16)
    maxima = _mm512_max_ps(maxima, _mm512_mask_loadu_ps(lowest, tail_mask(n - i), scores + i));
  const __m512 max = _mm512_set1_ps(_mm512_reduce_max_ps(maxima));
  __m512 sums = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = tail_mask(n - i);
    const __m512 p = exp(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + i), max));
    sums = _mm512_add_ps(sums, _mm512_maskz_mov_ps(mask, p));
    _mm512_mask_storeu_ps(scores + i, mask, round ? round_bf16(p) : p);
  }
  const __m512 sink_term = exp(_mm512_sub_ps(_mm512_set1_ps(sink), max));
  return _mm512_reduce_add_ps(sums) + _mm512_cvtss_f32(sink_term);
}

void divide(float* x, int64_t n, float denominator, bool round) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = tail_mask(n - i);
    const __m512 q = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), _mm512_set1_ps(denominator));
    _mm512_mask_storeu_ps(x + i, mask, round ? round_bf16(q) : q);
  }
}

void swiglu(const float* gate, const float* up, int64_t n, float limit, float weight, bool round, float* out) {
  const __m512 most = _mm512_set1_ps(limit), least = _mm512_set1_ps(-limit), one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = tail_mask(n - i);
    __m512 g = _mm512_maskz_loadu_ps(mask, gate + i), u = _mm512_maskz_loadu_ps(mask, up + i);
    if (round) {
      g = round_bf16(g);
      u = round_bf16(u);
    }
    g = _mm512_min_ps(g, most);
    u = _mm512_max_ps(least, _mm512_min_ps(u, most));
    const __m512 e = exp(_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), g), _mm512_set1_ps(88.0f)));
    const __m512 h = _mm512_mul_ps(_mm512_set1_ps(weight),
                                   _mm512_mul_ps(_mm512_mul_ps(g, _mm512_div_ps(one, _mm512_add_ps(one, e))), u));
    _mm512_mask_storeu_ps(out + i, mask, round ? round_bf16(h) : h);
  }
}

float dot(const float* a, const float* b, int64_t n) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int v = 0; v < 4; ++v)
      sums[v] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + v * 16), _mm512_loadu_ps(b + i + v * 16), sums[v]);
  for (; i < n; i += 16) {
    const __mmask16 mask = tail_mask(n - i);
    sums[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, a + i), _mm512_maskz_loadu_ps(mask, b + i), sums[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

float sum_squares(const float* x, int64_t n) { return dot(x, x, n); }

void gemv_f32(const float* w, const float* x, int64_t n, int64_t k, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = dot(w + i * k, x, k);
}

}  // namespace

void fill(KernelTable& table) {
  table.isa = Isa::avx512;
  fill_gemm(table);
  table.attention_scores_bf16 = attention_scores;
  table.attention_values_bf16 = attention_values;
  table.attention_dots = attention_dots;
  table.attention_values_dots = attention_values_dots;
  table.unpack_fp8_rows = unpack_fp8_rows;
  table.softmax_with_sink = softmax_with_sink;
  table.divide = divide;
  table.index_scores_fp4 = index_scores_fp4;
  table.swiglu = swiglu;
  table.sum_squares = sum_squares;
  table.gemv_f32 = gemv_f32;
}

}  // namespace thermocline::cpu::avx512
