// AVX2 + FMA + F16C micro-kernels, on f32 activations. Weights widen to f32 in registers: e2m1 through a permute of its
// eight magnitudes, e4m3 as half floats 2^-8 too small, bf16 by a shift.
#include <immintrin.h>

#include <cstring>

#include "kernels_cpu/kernel_table.h"

namespace thermocline::cpu::avx2 {
namespace {

constexpr int kTokens = 4;  // that share a pass over the weights: more would spill

// A decoder covers `kRows` of the 16 rows per pass and fills f32 vectors of eight lanes. Lane layout differs:
//   by rows   lane = row; one vector per column, multiplied by a broadcast x[k]
//   by pairs  lane = 2 (row - first) + p for four rows; one vector per column pair, multiplied by x[k], x[k+1], ...
template <bool is_int4>
struct Nibbles {
  static constexpr int64_t kTileBytes = 256;
  static constexpr int kPasses = 2;  // eight rows each
  static constexpr bool kPairs = false;
  static constexpr float kValueScale = 1.0f;
  template <class Use>
  static void each(const uint8_t* tile, int pass, const Use& use) {
    const __m256 magnitudes = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
    const __m256 sign = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0x80000000u)));
    // The nibble in the low bits of a lane: looked up with its sign, or shifted up and down again.
    const auto value = [&](__m256i words) {
      if constexpr (is_int4)
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 28), 28));
      else
        return _mm256_xor_ps(_mm256_permutevar8x32_ps(magnitudes, words),
                             _mm256_and_ps(sign, _mm256_castsi256_ps(_mm256_slli_epi32(words, 28))));
    };
    for (int line = 0; line < 4; ++line) {
      __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + line * 64 + pass * 32));
      for (int s = 0; s < 4; ++s) {  // columns 8 line + 2 s (low word) and + 1 (high word)
        use(8 * line + 2 * s, value(words));
        use(8 * line + 2 * s + 1, value(_mm256_srli_epi32(words, 16)));
        words = _mm256_srli_epi32(words, 4);
      }
    }
  }
};

struct Fp8 {
  static constexpr int64_t kTileBytes = 512;
  static constexpr int kPasses = 4;  // four rows each
  static constexpr bool kPairs = true;
  static constexpr float kValueScale = 256.0f;
  template <class Use>
  static void each(const uint8_t* tile, int pass, const Use& use) {
    for (int line = 0; line < 8; ++line) {
      const __m256i words =
          _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + line * 64 + pass * 16)));
      // s eeee mmm -> the half float s 0eeee mmm0000000, whose bias is 8 higher; subnormals come out right too.
      const __m256i halves = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0x7f)), 7),
                                             _mm256_slli_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0x80)), 8));
      use(4 * line, _mm256_cvtph_ps(_mm256_castsi256_si128(halves)));
      use(4 * line + 2, _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
    }
  }
};

struct Int8 {
  static constexpr int64_t kTileBytes = 512;
  static constexpr int kPasses = 4;  // four rows each
  static constexpr bool kPairs = true;
  static constexpr float kValueScale = 1.0f;
  template <class Use>
  static void each(const uint8_t* tile, int pass, const Use& use) {
    for (int line = 0; line < 8; ++line) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + line * 64 + pass * 16));
      // Sign and magnitude to two's complement: a negative code is 128 + magnitude.
      const __m128i negative = _mm_cmplt_epi8(codes, _mm_setzero_si128());
      const __m128i values =
          _mm_blendv_epi8(codes, _mm_sub_epi8(_mm_set1_epi8(static_cast<char>(0x80)), codes), negative);
      use(4 * line, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values)));
      use(4 * line + 2, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(values, values))));
    }
  }
};

struct Bf16 {
  static constexpr int64_t kTileBytes = 1024;
  static constexpr int kPasses = 2;
  static constexpr bool kPairs = false;
  static constexpr float kValueScale = 1.0f;
  template <class Use>
  static void each(const uint8_t* tile, int pass, const Use& use) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    for (int line = 0; line < 16; ++line) {
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + line * 64 + pass * 32));
      use(2 * line, _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
      use(2 * line + 1, _mm256_castsi256_ps(_mm256_and_si256(words, upper)));
    }
  }
};

template <bool pairs>
__m256 load_x(const float* x) {
  if constexpr (pairs) {
    double both;
    std::memcpy(&both, x, 8);
    return _mm256_castpd_ps(_mm256_set1_pd(both));
  } else {
    return _mm256_set1_ps(*x);
  }
}

// Scales of the lanes of one pass. `kValueScale` undoes what the decoder left out.
template <class Weight, ScaleFormat scale>
__m256 load_scale(const RowGroup& w, int64_t tile, int pass) {
  if constexpr (scale == ScaleFormat::e8m0_rows) {
    const __m128i bytes =
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(w.scales) + tile * 16 + pass * 8));
    const __m256i exponents = _mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23);
    const __m256i zero = _mm256_cmpeq_epi32(exponents, _mm256_setzero_si256());  // byte 0 is 2^-127, a subnormal
    return _mm256_castsi256_ps(_mm256_or_si256(exponents, _mm256_and_si256(zero, _mm256_set1_epi32(0x00400000))));
  } else if constexpr (scale == ScaleFormat::f32_rows) {
    const float* rows = static_cast<const float*>(w.scales) + tile / w.scale_tiles * 16;
    if constexpr (Weight::kPairs) {  // every row's scale twice
      const __m128 four = _mm_loadu_ps(rows + pass * 4);
      return _mm256_set_m128(_mm_unpackhi_ps(four, four), _mm_unpacklo_ps(four, four));
    } else {
      return _mm256_loadu_ps(rows + pass * 8);
    }
  } else {
    return _mm256_set1_ps(static_cast<const float*>(w.scales)[tile / w.scale_tiles] * Weight::kValueScale);
  }
}

template <class Weight>
void store(__m256 acc, int pass, float* y) {
  if constexpr (Weight::kPairs) {  // add the two columns of a pair: lanes 0+1, 2+3, 4+5, 6+7
    const __m256 sums = _mm256_add_ps(acc, _mm256_permute_ps(acc, 0xb1));
    const __m256 packed = _mm256_permutevar8x32_ps(sums, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
    _mm_storeu_ps(y + pass * 4, _mm256_castps256_ps128(packed));
  } else {
    _mm256_storeu_ps(y + pass * 8, acc);
  }
}

template <class Weight, ScaleFormat scale, int M>
void gemm_m(const RowGroup& w, const float* x, int64_t tile_stride, float* y) {
  const int64_t span = scale == ScaleFormat::none ? w.k_tiles : scale == ScaleFormat::e8m0_rows ? 1 : w.scale_tiles;
  for (int pass = 0; pass < Weight::kPasses; ++pass) {
    __m256 acc[M];
    for (__m256& a : acc) a = _mm256_setzero_ps();
    for (int64_t first = 0; first < w.k_tiles; first += span) {
      __m256 chains[2][M];
      for (auto& chain : chains)
        for (__m256& c : chain) c = _mm256_setzero_ps();
      const int64_t last = first + span < w.k_tiles ? first + span : w.k_tiles;
      for (int64_t tile = first; tile < last; ++tile) {
        const float* xt = x + tile * tile_stride;
        Weight::each(w.tiles + tile * Weight::kTileBytes, pass, [&](int column, __m256 v) {
          __m256(&chain)[M] = chains[(Weight::kPairs ? column / 2 : column) % 2];
          for (int token = 0; token < M; ++token)
            chain[token] = _mm256_fmadd_ps(v, load_x<Weight::kPairs>(xt + token * kTileCols + column), chain[token]);
        });
      }
      for (int token = 0; token < M; ++token) {
        const __m256 sum = _mm256_add_ps(chains[0][token], chains[1][token]);
        if constexpr (scale == ScaleFormat::none)
          acc[token] = sum;
        else
          acc[token] = _mm256_fmadd_ps(sum, load_scale<Weight, scale>(w, first, pass), acc[token]);
      }
    }
    for (int token = 0; token < M; ++token) store<Weight>(acc[token], pass, y + token * 16);
  }
}

template <class Weight, ScaleFormat scale>
void gemm(const RowGroup& w, const void* x_void, int m, float* y) {
  const float* x = static_cast<const float*>(x_void);
  const int64_t tile_stride = m * kTileCols;
  for (; m > 0; m -= kTokens, x += kTokens * kTileCols, y += kTokens * kTileRows) {
    switch (m) {
      case 1:
        return gemm_m<Weight, scale, 1>(w, x, tile_stride, y);
      case 2:
        return gemm_m<Weight, scale, 2>(w, x, tile_stride, y);
      case 3:
        return gemm_m<Weight, scale, 3>(w, x, tile_stride, y);
      default:
        gemm_m<Weight, scale, kTokens>(w, x, tile_stride, y);
    }
  }
}

__m256 load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}

float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float reduce(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

template <int H>
void scores_h(const float* q, int64_t q_stride, const void* const* rows, int64_t n, int64_t c, float scale,
              float* scores, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t* row = static_cast<const uint16_t*>(rows[i]);
    __m256 acc[H];
    for (__m256& a : acc) a = _mm256_setzero_ps();
    int64_t d = 0;
    for (; d + 8 <= c; d += 8) {
      const __m256 r = load_bf16(row + d);
      for (int h = 0; h < H; ++h) acc[h] = _mm256_fmadd_ps(_mm256_loadu_ps(q + h * q_stride + d), r, acc[h]);
    }
    for (int h = 0; h < H; ++h) {
      float sum = reduce(acc[h]);
      for (int64_t tail = d; tail < c; ++tail) sum += q[h * q_stride + tail] * widen(row[tail]);
      scores[h * stride + i] = sum * scale;
    }
  }
}

void attention_scores(const float* q, int64_t q_stride, int heads, const void* const* rows, int64_t n, int64_t c,
                      float scale, float* scores, int64_t stride) {
  int h = 0;
  for (; h + 4 <= heads; h += 4)
    scores_h<4>(q + h * q_stride, q_stride, rows, n, c, scale, scores + h * stride, stride);
  for (; h < heads; ++h) scores_h<1>(q + h * q_stride, q_stride, rows, n, c, scale, scores + h * stride, stride);
}

template <int H, int V>
void values_block(const float* p, int64_t p_stride, const void* const* rows, int64_t n, int64_t d, float* out,
                  int64_t stride) {
  __m256 acc[H][V];
  for (auto& head : acc)
    for (__m256& a : head) a = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t* row = static_cast<const uint16_t*>(rows[i]) + d;
    for (int v = 0; v < V; ++v) {
      const __m256 r = load_bf16(row + v * 8);
      for (int h = 0; h < H; ++h) acc[h][v] = _mm256_fmadd_ps(_mm256_set1_ps(p[h * p_stride + i]), r, acc[h][v]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int v = 0; v < V; ++v) _mm256_storeu_ps(out + h * stride + d + v * 8, acc[h][v]);
}

template <int H>
void values_h(const float* p, int64_t p_stride, const void* const* rows, int64_t n, int64_t c, float* out,
              int64_t stride) {
  int64_t d = 0;
  for (; d + 16 <= c; d += 16) values_block<H, 2>(p, p_stride, rows, n, d, out, stride);
  for (; d + 8 <= c; d += 8) values_block<H, 1>(p, p_stride, rows, n, d, out, stride);
  for (; d < c; ++d) {
    for (int h = 0; h < H; ++h) {
      float sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += p[h * p_stride + i] * widen(static_cast<const uint16_t*>(rows[i])[d]);
      out[h * stride + d] = sum;
    }
  }
}

void attention_values(const float* p, int64_t p_stride, int heads, const void* const* rows, int64_t n, int64_t c,
                      float* out, int64_t stride) {
  int h = 0;
  for (; h + 4 <= heads; h += 4) values_h<4>(p + h * p_stride, p_stride, rows, n, c, out + h * stride, stride);
  for (; h < heads; ++h) values_h<1>(p + h * p_stride, p_stride, rows, n, c, out + h * stride, stride);
}

// s eeee mmm -> the half float s 0eeee mmm0000000, 2^-8 too small; F16C takes subnormals as they are. The product with
// the scale has a mantissa of 3 bits, so its upper half is the bf16 value.
__m256i unpack_codes(__m128i codes, __m256 scale) {
  const __m256i words = _mm256_cvtepu8_epi16(codes);
  const __m256i halves = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0x7f)), 7),
                                         _mm256_slli_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0x80)), 8));
  const auto value = [&](__m128i eight) {
    const __m256 v = _mm256_mul_ps(_mm256_cvtph_ps(eight), _mm256_set1_ps(256.0f));
    return _mm256_srli_epi32(_mm256_castps_si256(_mm256_mul_ps(v, scale)), 16);
  };
  const __m256i low = value(_mm256_castsi256_si128(halves)), high = value(_mm256_extracti128_si256(halves, 1));
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
}

void unpack_fp8_rows(const void* const* rows, int64_t n, int64_t nope, int64_t rope, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i, out += nope + rope) {
    const uint8_t* row = static_cast<const uint8_t*>(rows[i]);
    const uint8_t* codes = row + 2 * rope;
    const uint8_t* scales = codes + nope;
    for (int64_t d = 0; d < nope; d += 16) {
      const __m256 scale = _mm256_castsi256_ps(_mm256_set1_epi32(scales[d / kFp8Block] << 23));
      if (nope - d >= 16) {
        const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + d));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d), unpack_codes(sixteen, scale));
      } else {
        const size_t left = static_cast<size_t>(nope - d);
        __m128i tail = _mm_setzero_si128();
        std::memcpy(&tail, codes + d, left);
        const __m256i words = unpack_codes(tail, scale);
        std::memcpy(out + d, &words, 2 * left);
      }
    }
    std::memcpy(out + nope, row, static_cast<size_t>(2 * rope));
  }
}

float dot(const float* a, const float* b, int64_t n) {
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (int v = 0; v < 4; ++v)
      sums[v] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + v * 8), _mm256_loadu_ps(b + i + v * 8), sums[v]);
  float sum = reduce(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

float sum_squares(const float* x, int64_t n) { return dot(x, x, n); }

void gemv_f32(const float* w, const float* x, int64_t n, int64_t k, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = dot(w + i * k, x, k);
}

double peak_flops(int64_t rounds) {
  __m256 sums[12];
  for (__m256& sum : sums) sum = _mm256_setzero_ps();
  volatile float seed = 1.0f;
  const __m256 a = _mm256_set1_ps(seed);
  for (int64_t round = 0; round < rounds; ++round)
    for (__m256& sum : sums) sum = _mm256_fmadd_ps(a, a, sum);
  for (const __m256 sum : sums) seed = seed + reduce(sum);
  return static_cast<double>(rounds) * 12 * 8 * 2;
}

}  // namespace

void fill(KernelTable& table) {
  table.isa = Isa::avx2;
  table.activation = Activation::f32;
  table.gemm[static_cast<int>(GemmKind::mxfp4_e8m0)] = gemm<Nibbles<false>, ScaleFormat::e8m0_rows>;
  table.gemm[static_cast<int>(GemmKind::mxfp4_f32)] = gemm<Nibbles<false>, ScaleFormat::f32_rows>;
  table.gemm[static_cast<int>(GemmKind::fp8_f32)] = gemm<Fp8, ScaleFormat::f32_blocks>;
  table.gemm[static_cast<int>(GemmKind::bf16)] = gemm<Bf16, ScaleFormat::none>;
  table.gemm[static_cast<int>(GemmKind::int8_f32)] = gemm<Int8, ScaleFormat::f32_rows>;
  table.gemm[static_cast<int>(GemmKind::int4_f32)] = gemm<Nibbles<true>, ScaleFormat::f32_rows>;
  table.attention_scores_bf16 = attention_scores;
  table.attention_values_bf16 = attention_values;
  table.unpack_fp8_rows = unpack_fp8_rows;
  table.sum_squares = sum_squares;
  table.gemv_f32 = gemv_f32;
  table.peak_flops = peak_flops;
}

}  // namespace thermocline::cpu::avx2
