// AVX-512 BF16 micro-kernels. A vector of weights is 16 rows x one column pair, the operand of vdpbf16ps against a
// broadcast pair of activations. vdpbf16ps treats subnormal inputs as zero; e4m3 and e2m1 codes are normal in bf16.
//
// Per mxfp4 tile (256 bytes) and token: 4 loads, 12 shifts, 16 vpermw, 16 vdpbf16ps, 1 add, 1 fma.
// Per fp8 tile (512 bytes) and token: 8 loads, 16 vpermi2b, 8 vpternlogd, 16 vpunpck, 16 vdpbf16ps.
#include <immintrin.h>

#include "kernels_cpu/kernel_table.h"

namespace thermocline::cpu::avx512 {
namespace {

constexpr int kMaxTokens = 8;
constexpr int64_t kPrefetchBytes = 6144;  // 4-8 KiB ahead keeps one core's read stream full

// Decoders turn one 64-byte line into vectors of 32 bf16: 16 rows x a column pair, pairs in rising order.
struct Mxfp4Lines {
  static constexpr int kLines = 4, kVectors = 4;
  // The e2m1 values as bf16, twice: vpermw looks at five bits, so bit 4 of the index does not matter.
  const __m512i values = _mm512_broadcast_i64x4(_mm256_setr_epi16(
      0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, static_cast<short>(0x8000),
      static_cast<short>(0xbf00), static_cast<short>(0xbf80), static_cast<short>(0xbfc0), static_cast<short>(0xc000),
      static_cast<short>(0xc040), static_cast<short>(0xc080), static_cast<short>(0xc0c0)));
  void decode(const uint8_t* line, __m512i* v) const {
    const __m512i words = _mm512_loadu_si512(line);
    v[0] = _mm512_permutexvar_epi16(words, values);
    v[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), values);
    v[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), values);
    v[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), values);
  }
};

struct Fp8Lines {
  static constexpr int kLines = 8, kVectors = 2;
  __m512i high[2], low[2];  // bf16 bytes of the 128 non-negative e4m3 codes
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  Fp8Lines() {
    alignas(64) uint8_t high_bytes[128], low_bytes[128];
    for (int code = 0; code < 128; ++code) {
      const int exponent = code >> 3, mantissa = code & 7;
      int word = ((exponent + 120) << 7) | (mantissa << 4);
      if (exponent == 0) {  // subnormal: mantissa x 2^-9, normalised
        const int top = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;
        word = mantissa == 0 ? 0 : ((118 + top) << 7) | ((mantissa - (1 << top)) << (7 - top));
      }
      high_bytes[code] = static_cast<uint8_t>(word >> 8);
      low_bytes[code] = static_cast<uint8_t>(word);
    }
    for (int half = 0; half < 2; ++half) {
      high[half] = _mm512_load_si512(high_bytes + 64 * half);
      low[half] = _mm512_load_si512(low_bytes + 64 * half);
    }
  }
  void decode(const uint8_t* line, __m512i* v) const {
    const __m512i codes = _mm512_loadu_si512(line);
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

template <ScaleFormat format>
__m512 load_scale(const RowGroup& w, int64_t tile) {
  if constexpr (format == ScaleFormat::e8m0_rows) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(w.scales) + tile);
    const __m512i exponents = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
    // Byte 0 is 2^-127, a subnormal float.
    return _mm512_castsi512_ps(
        _mm512_mask_mov_epi32(exponents, _mm512_testn_epi32_mask(exponents, exponents), _mm512_set1_epi32(0x00400000)));
  } else if constexpr (format == ScaleFormat::f32_rows) {
    return _mm512_loadu_ps(static_cast<const float*>(w.scales) + tile * 16);
  } else {
    return _mm512_set1_ps(static_cast<const float*>(w.scales)[tile / w.scale_tiles]);
  }
}

// Within one scale, even column pairs add to one chain and odd pairs to another; the two join before the scale.
template <class Lines, ScaleFormat scale, int M>
void gemm_m(const RowGroup& w, const uint16_t* x, int64_t x_stride, float* y) {
  constexpr int64_t kTileBytes = Lines::kLines * 64;
  const Lines lines;
  __m512 acc[M];
  for (int token = 0; token < M; ++token) acc[token] = _mm512_setzero_ps();
  const int64_t span = scale == ScaleFormat::none ? w.k_tiles : scale == ScaleFormat::f32_blocks ? w.scale_tiles : 1;
  for (int64_t first = 0; first < w.k_tiles; first += span) {
    __m512 even[M], odd[M];
    for (int token = 0; token < M; ++token) even[token] = odd[token] = _mm512_setzero_ps();
    const int64_t last = first + span < w.k_tiles ? first + span : w.k_tiles;
    for (int64_t tile = first; tile < last; ++tile) {
      const uint8_t* bytes = w.tiles + tile * kTileBytes;
      const uint16_t* xt = x + tile * kTileCols;
#pragma GCC unroll 16
      for (int line = 0; line < Lines::kLines; ++line) {
        _mm_prefetch(reinterpret_cast<const char*>(bytes + line * 64 + kPrefetchBytes), _MM_HINT_T0);
        __m512i v[Lines::kVectors];
        lines.decode(bytes + line * 64, v);
#pragma GCC unroll 4
        for (int i = 0; i < Lines::kVectors; ++i) {
          const int pair = line * Lines::kVectors + i;
#pragma GCC unroll 8
          for (int token = 0; token < M; ++token) {
            const __m512i xp = _mm512_set1_epi32(reinterpret_cast<const int*>(xt + token * x_stride)[pair]);
            __m512& chain = pair % 2 ? odd[token] : even[token];
            chain = _mm512_dpbf16_ps(chain, reinterpret_cast<__m512bh>(v[i]), reinterpret_cast<__m512bh>(xp));
          }
        }
      }
    }
    if constexpr (scale == ScaleFormat::none) {
      for (int token = 0; token < M; ++token) acc[token] = _mm512_add_ps(even[token], odd[token]);
    } else {
      const __m512 s = load_scale<scale>(w, first);
      for (int token = 0; token < M; ++token)
        acc[token] = _mm512_fmadd_ps(_mm512_add_ps(even[token], odd[token]), s, acc[token]);
    }
  }
  for (int token = 0; token < M; ++token) _mm512_storeu_ps(y + token * 16, acc[token]);
}

template <class Lines, ScaleFormat scale>
void gemm(const RowGroup& w, const void* x_void, int64_t x_stride, int m, float* y) {
  const uint16_t* x = static_cast<const uint16_t*>(x_void);
  switch (m) {
    case 1:
      return gemm_m<Lines, scale, 1>(w, x, x_stride, y);
    case 2:
      return gemm_m<Lines, scale, 2>(w, x, x_stride, y);
    case 3:
      return gemm_m<Lines, scale, 3>(w, x, x_stride, y);
    case 4:
      return gemm_m<Lines, scale, 4>(w, x, x_stride, y);
    case 5:
      return gemm_m<Lines, scale, 5>(w, x, x_stride, y);
    case 6:
      return gemm_m<Lines, scale, 6>(w, x, x_stride, y);
    case 7:
      return gemm_m<Lines, scale, 7>(w, x, x_stride, y);
    default:
      return gemm_m<Lines, scale, 8>(w, x, x_stride, y);
  }
}

template <class Lines>
void expand(const uint8_t* tiles, int64_t k_tiles, uint8_t* out) {
  const Lines lines;
  for (int64_t line = 0; line < k_tiles * Lines::kLines; ++line) {
    __m512i v[Lines::kVectors];
    lines.decode(tiles + line * 64, v);
    for (int i = 0; i < Lines::kVectors; ++i) _mm512_storeu_si512(out + (line * Lines::kVectors + i) * 64, v[i]);
  }
}

__mmask16 tail_mask(int64_t left) { return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1); }

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

template <class Lines, ScaleFormat scale>
void add_gemm(KernelTable& table, GemmKind kind) {
  const int i = static_cast<int>(kind);
  table.gemm[i] = gemm<Lines, scale>;
  table.expand[i] = expand<Lines>;
  table.gemm_expanded[i] = gemm<Bf16Lines, scale>;
}

double peak_flops(int64_t rounds) {
  __m512 sums[16];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  volatile int seed = 0x3f803f80;
  const __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(seed));
  for (int64_t round = 0; round < rounds; ++round)
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, a, a);
  float total = 0;
  for (const __m512 sum : sums) total += _mm512_reduce_add_ps(sum);
  seed = static_cast<int>(total);
  return static_cast<double>(rounds) * 16 * 32 * 2;
}

}  // namespace

void fill(KernelTable& table) {
  table.isa = Isa::avx512;
  table.bf16_inputs = true;
  table.max_tokens = kMaxTokens;
  add_gemm<Mxfp4Lines, ScaleFormat::e8m0_rows>(table, GemmKind::mxfp4_e8m0);
  add_gemm<Mxfp4Lines, ScaleFormat::f32_rows>(table, GemmKind::mxfp4_f32);
  add_gemm<Fp8Lines, ScaleFormat::f32_blocks>(table, GemmKind::fp8_f32);
  table.gemm[static_cast<int>(GemmKind::bf16)] = gemm<Bf16Lines, ScaleFormat::none>;
  table.expand[static_cast<int>(GemmKind::bf16)] = nullptr;
  table.attention_scores_bf16 = attention_scores;
  table.attention_values_bf16 = attention_values;
  table.sum_squares = sum_squares;
  table.gemv_f32 = gemv_f32;
  table.peak_flops = peak_flops;
}

}  // namespace thermocline::cpu::avx512
