// The AVX-512 kernels of bf16 products without vdpbf16ps, for CPUs that lack it or take four issue slots for it
// (Intel's cores; a multiply-add takes one). vdpbf16ps adds the product of the odd column, rounds, adds that of the
// even one and rounds: two multiply-adds in that order are the same bits, but for sums below 2^-126, which it makes
// zero.
//
// Instructions per tile of 16 x 32 (objdump of the M = 1 loop, and what each further token adds):
//   mxfp4  4 loads, 28 shifts, 32 vpermps; a token adds 32 vfmadd of a broadcast from memory, 1 add, 1 fma
//   fp8    8 loads, 16 vpermi2b, 8 vpternlogd, 16 vpunpck, 16 shifts, 16 vpand; a token adds the same
#include <immintrin.h>

#include "kernels_cpu/avx512/gemm_loops.h"
#include "kernels_cpu/avx512/lanes.h"

namespace thermocline::cpu::avx512 {
namespace {

// --- decoders to f32: a line into the odd and the even columns of its column pairs, 16 rows each ---

template <bool is_int4>
struct WideNibbles {
  static constexpr int kLines = 4, kPairs = 4;
  __m512 values;
  WideNibbles() {
    const NibbleLines<is_int4> words;  // 16 values as bf16, twice
    values = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(words.values)), 16));
  }
  // A dword is a row: its low word has the even columns of four pairs, its high word the odd ones.
  void decode(const uint8_t* line, __m512* odd, __m512* even) const {
    const __m512i row = _mm512_loadu_si512(line);
    even[0] = _mm512_permutexvar_ps(row, values);  // an index has four bits
    odd[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(row, 16), values);
    even[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(row, 4), values);
    odd[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(row, 20), values);
    even[2] = _mm512_permutexvar_ps(_mm512_srli_epi32(row, 8), values);
    odd[2] = _mm512_permutexvar_ps(_mm512_srli_epi32(row, 24), values);
    even[3] = _mm512_permutexvar_ps(_mm512_srli_epi32(row, 12), values);
    odd[3] = _mm512_permutexvar_ps(_mm512_srli_epi32(row, 28), values);
  }
};

template <class Lines>
struct Wide {
  static constexpr int kLines = Lines::kLines, kPairs = Lines::kVectors;
  const Lines lines{};
  void decode(const uint8_t* line, __m512* odd, __m512* even) const {
    __m512i v[kPairs];
    lines.decode(line, v);
    for (int i = 0; i < kPairs; ++i) {
      odd[i] = odd_of(v[i]);
      even[i] = even_of(v[i]);
    }
  }
};

// --- GEMM: the order of additions of gemm_m in gemm.cc ---

template <class Lines, ScaleFormat scale, int M>
void gemm_m(const RowGroup& w, const float* x, float* y) {
  const Lines lines;
  __m512 acc[M];
  for (__m512& a : acc) a = _mm512_setzero_ps();
  for_scaled_tiles<scale>(
      w, [&](int64_t tile, __m512 s) __attribute__((always_inline)) {
        ask_scales<IntelAhead, scale>(w, tile);
        const uint8_t* bytes = w.tiles + tile * Lines::kLines * 64;
        const float* xt = x + tile * M * kTileCols;
        __m512 even_pairs[M], odd_pairs[M];
        for (int token = 0; token < M; ++token) even_pairs[token] = odd_pairs[token] = _mm512_setzero_ps();
#pragma GCC unroll 16
        for (int line = 0; line < Lines::kLines; ++line) {
          IntelAhead::ask(bytes + line * 64);
          __m512 odd[Lines::kPairs], even[Lines::kPairs];
          lines.decode(bytes + line * 64, odd, even);
#pragma GCC unroll 4
          for (int i = 0; i < Lines::kPairs; ++i) {
            const int pair = line * Lines::kPairs + i;
#pragma GCC unroll 8
            for (int token = 0; token < M; ++token) {
              __m512& chain = pair % 2 ? odd_pairs[token] : even_pairs[token];
              const float* columns = xt + token * kTileCols + 2 * pair;
              chain = _mm512_fmadd_ps(odd[i], _mm512_set1_ps(columns[1]), chain);
              chain = _mm512_fmadd_ps(even[i], _mm512_set1_ps(columns[0]), chain);
            }
          }
        }
#pragma GCC unroll 8
        for (int token = 0; token < M; ++token)
          acc[token] = add_scaled<scale>(_mm512_add_ps(even_pairs[token], odd_pairs[token]), s, acc[token]);
      });
  for (int token = 0; token < M; ++token) _mm512_storeu_ps(y + token * 16, acc[token]);
}

template <class Lines, ScaleFormat scale>
void gemm(const RowGroup& w, const void* x, int m, float* y) {
  with_tokens(m, [&](auto tokens) { gemm_m<Lines, scale, tokens.value>(w, static_cast<const float*>(x), y); });
}

// --- attention: the orders of additions of attention_dots and attention_values_dots in attention.cc ---

// Four heads x four rows share their loads; a head's 32 dims are the odd ones, then the even ones, as f32.
void attention_dots(const float* queries, int64_t q_stride, int heads, const void* const* rows, int64_t n, int64_t c,
                    float scale, float* scores, int64_t stride) {
  alignas(64) float q[kMaxDotQueries];
  for (int h = 0; h < heads; ++h)
    for (int64_t d = 0; d < c; d += 32) {
      const float* from = queries + h * q_stride + d;
      const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(to_bf16(_mm512_loadu_ps(from))),
                                               to_bf16(_mm512_loadu_ps(from + 16)), 1);
      _mm512_store_ps(q + h * c + d, odd_of(words));
      _mm512_store_ps(q + h * c + d + 16, even_of(words));
    }
  for (int64_t i = 0; i < n; i += 4) {
    const int row_count = n - i < 4 ? static_cast<int>(n - i) : 4;
    const uint16_t* r[4];
    for (int j = 0; j < 4; ++j) r[j] = static_cast<const uint16_t*>(rows[i + (j < row_count ? j : 0)]);
    for (int h = 0; h < heads; h += 4) {
      const int head_count = heads - h < 4 ? heads - h : 4;
      const float* qh[4];
      for (int j = 0; j < 4; ++j) qh[j] = q + (h + (j < head_count ? j : 0)) * c;
      __m512 acc[16];
#pragma GCC unroll 16
      for (__m512& a : acc) a = _mm512_setzero_ps();
      for (int64_t d = 0; d < c; d += 32) {
        __m512 odd[4], even[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const __m512i words = _mm512_loadu_si512(r[j] + d);
          odd[j] = odd_of(words);
          even[j] = even_of(words);
        }
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const __m512 odd_query = _mm512_load_ps(qh[k] + d), even_query = _mm512_load_ps(qh[k] + d + 16);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            __m512& sum = acc[4 * k + j];
            sum = _mm512_fmadd_ps(even_query, even[j], _mm512_fmadd_ps(odd_query, odd[j], sum));
          }
        }
      }
      store_scores(acc, scale, head_count, row_count, scores + h * stride + i, stride);
    }
  }
}

// H heads x 32 dims stay in registers while pairs of rows stream past, of each the second row first.
template <int H>
void values_dots_h(const float* p, int64_t p_stride, const void* const* rows, int64_t n, int64_t c, float* out,
                   int64_t stride) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  for (int64_t d = 0; d < c; d += 32) {
    __m512 even[H], odd[H];
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) even[h] = odd[h] = _mm512_setzero_ps();
    const auto add = [&](int64_t i) __attribute__((always_inline)) {
      const __m512i words = _mm512_loadu_si512(static_cast<const uint16_t*>(rows[i]) + d);
      const __m512 row_even = even_of(words), row_odd = odd_of(words);
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) {
        const __m512 weight = _mm512_set1_ps(p[h * p_stride + i]);
        even[h] = _mm512_fmadd_ps(row_even, weight, even[h]);
        odd[h] = _mm512_fmadd_ps(row_odd, weight, odd[h]);
      }
    };
    for (int64_t i = 0; i < n; i += 2) {
      if (i + 1 < n) add(i + 1);
      add(i);
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
      _mm512_storeu_ps(out + h * stride + d, _mm512_permutex2var_ps(even[h], first, odd[h]));
      _mm512_storeu_ps(out + h * stride + d + 16, _mm512_permutex2var_ps(even[h], second, odd[h]));
    }
  }
}

void attention_values_dots(float* p, int64_t p_stride, int heads, const void* const* rows, int64_t n, int64_t c,
                           float* out, int64_t stride) {
  for (int h = 0; h < heads; ++h)
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 mask = tail_mask(n - i);
      float* at = p + h * p_stride + i;
      _mm512_mask_storeu_ps(at, mask, round_bf16(_mm512_maskz_loadu_ps(mask, at)));
    }
  int h = 0;
  for (; h + 8 <= heads; h += 8) values_dots_h<8>(p + h * p_stride, p_stride, rows, n, c, out + h * stride, stride);
  for (; h < heads; ++h) values_dots_h<1>(p + h * p_stride, p_stride, rows, n, c, out + h * stride, stride);
}

double peak_flops(int64_t rounds) {
  __m512 sums[16];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  volatile float seed = 1.0f;
  const __m512 a = _mm512_set1_ps(seed);
  for (int64_t round = 0; round < rounds; ++round)
    for (__m512& sum : sums) sum = _mm512_fmadd_ps(a, a, sum);
  float total = 0;
  for (const __m512 sum : sums) total += _mm512_reduce_add_ps(sum);
  seed = total;
  return static_cast<double>(rounds) * 16 * 16 * 2;
}

}  // namespace

void fill_intel(KernelTable& table) {
  const auto set = [&](GemmKind kind, GemmTile exact) { table.gemm[static_cast<int>(kind)] = exact; };
  table.activation = Activation::wide_bf16;
  set(GemmKind::mxfp4_e8m0, gemm<WideNibbles<false>, ScaleFormat::e8m0_rows>);
  set(GemmKind::mxfp4_f32, gemm<WideNibbles<false>, ScaleFormat::f32_rows>);
  set(GemmKind::fp8_f32, gemm<Wide<ByteLines<false>>, ScaleFormat::f32_blocks>);
  set(GemmKind::bf16, gemm<Wide<Bf16Lines>, ScaleFormat::none>);
  set(GemmKind::int8_f32, gemm<Wide<ByteLines<true>>, ScaleFormat::f32_rows>);
  set(GemmKind::int4_f32, gemm<WideNibbles<true>, ScaleFormat::f32_rows>);
  fill_int8<IntelAhead>(table);
  table.prefetch = IntelAhead::kText;
  table.attention_dots = attention_dots;
  table.attention_values_dots = attention_values_dots;
  table.peak_flops = peak_flops;
}

}  // namespace thermocline::cpu::avx512
