// AVX-512 GEMM micro-kernels. On bf16 activations a vector of weights is 16 rows x one column pair, the operand of
// vdpbf16ps against a broadcast pair of x; it treats subnormal inputs as zero, and e4m3 and e2m1 codes are normal in
// bf16. On int8 activations a vector is 16 rows x 4 columns of biased bytes, the unsigned operand of vpdpbusd.
//
// Instructions per tile of 16 x 32 (objdump of the M = 1 loop, and what each further token adds):
//   mxfp4  4 loads, 12 shifts, 16 vpermw, 6 for the scale; a token adds 16 vdpbf16ps, 1 add, 1 fma
//   fp8    8 loads, 16 vpermi2b, 8 vpternlogd, 16 vpunpck; a token adds 16 vdpbf16ps, 1 add, 1 fma
//   mxfp4 x int8  4 loads, 4 shifts, 8 vpand, 8 vpshufb, 6 for the scale; a token adds 8 vpdpbusd, cvt, mul, fma
#include <immintrin.h>

#include "kernels_cpu/avx512/decode.h"
#include "kernels_cpu/kernel_table.h"

namespace thermocline::cpu::avx512 {
namespace {

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

// Calls tile_fn(tile, scale) for every tile, with the scale of the group it lies in.
template <ScaleFormat format, class TileFn>
inline __attribute__((always_inline)) void for_scaled_tiles(const RowGroup& w, const TileFn& tile_fn) {
  if constexpr (format == ScaleFormat::none) {
    for (int64_t tile = 0; tile < w.k_tiles; ++tile) tile_fn(tile, _mm512_setzero_ps());
  } else if constexpr (format == ScaleFormat::e8m0_rows) {
    for (int64_t tile = 0; tile < w.k_tiles; ++tile) tile_fn(tile, load_scale<format>(w, tile));
  } else {
    for (int64_t tile = 0, group = 0; tile < w.k_tiles; ++group) {
      const __m512 s = load_scale<format>(w, group);
      const int64_t last = tile + w.scale_tiles < w.k_tiles ? tile + w.scale_tiles : w.k_tiles;
      for (; tile < last; ++tile) tile_fn(tile, s);
    }
  }
}

template <ScaleFormat format>
__m512 add_scaled(__m512 sum, __m512 scale, __m512 acc) {
  if constexpr (format == ScaleFormat::none)
    return _mm512_add_ps(acc, sum);
  else
    return _mm512_fmadd_ps(sum, scale, acc);
}

inline __attribute__((always_inline)) __m512i pair_of(const uint32_t* x, int i) {
  return _mm512_set1_epi32(static_cast<int>(x[i]));
}

// --- bf16 activations: within a tile, even column pairs add to one chain and odd pairs to another; they join, are
// scaled and added to the row's sum ---

template <class Lines, ScaleFormat scale, int M>
void gemm_m(const RowGroup& w, const uint32_t* x, float* y) {
  const Lines lines;
  __m512 acc[M];
  for (__m512& a : acc) a = _mm512_setzero_ps();
  for_scaled_tiles<scale>(
      w, [&](int64_t tile, __m512 s) __attribute__((always_inline)) {
        const uint8_t* bytes = w.tiles + tile * Lines::kLines * 64;
        const uint32_t* xt = x + tile * M * 16;
        __m512 even[M], odd[M];
        for (int token = 0; token < M; ++token) even[token] = odd[token] = _mm512_setzero_ps();
#pragma GCC unroll 16
        for (int line = 0; line < Lines::kLines; ++line) {
          // Into L2: in L1 the lines ahead would push out x, which is read again for every row group.
          _mm_prefetch(reinterpret_cast<const char*>(bytes + line * 64 + kPrefetchBytes), _MM_HINT_T1);
          __m512i v[Lines::kVectors];
          lines.decode(bytes + line * 64, v);
#pragma GCC unroll 4
          for (int i = 0; i < Lines::kVectors; ++i) {
            const int pair = line * Lines::kVectors + i;
#pragma GCC unroll 8
            for (int token = 0; token < M; ++token) {
              __m512& chain = pair % 2 ? odd[token] : even[token];
              chain = _mm512_dpbf16_ps(chain, reinterpret_cast<__m512bh>(v[i]),
                                       reinterpret_cast<__m512bh>(pair_of(xt + token * 16, pair)));
            }
          }
        }
#pragma GCC unroll 8
        for (int token = 0; token < M; ++token)
          acc[token] = add_scaled<scale>(_mm512_add_ps(even[token], odd[token]), s, acc[token]);
      });
  for (int token = 0; token < M; ++token) _mm512_storeu_ps(y + token * 16, acc[token]);
}

// Calls fn with m as a constant, 1 to 8.
template <int N>
struct Tokens {
  static constexpr int value = N;
};
template <class Fn>
void with_tokens(int m, const Fn& fn) {
  switch (m) {
    case 1:
      return fn(Tokens<1>());
    case 2:
      return fn(Tokens<2>());
    case 3:
      return fn(Tokens<3>());
    case 4:
      return fn(Tokens<4>());
    case 5:
      return fn(Tokens<5>());
    case 6:
      return fn(Tokens<6>());
    case 7:
      return fn(Tokens<7>());
    default:
      return fn(Tokens<8>());
  }
}

template <class Lines, ScaleFormat scale>
void gemm(const RowGroup& w, const void* x, int m, float* y) {
  with_tokens(m, [&](auto tokens) { gemm_m<Lines, scale, tokens.value>(w, static_cast<const uint32_t*>(x), y); });
}

// --- int8 activations ---

template <class Bytes, ScaleFormat scale, int M>
void gemm_int8_m(const RowGroup& w, const Int8Chunk* x, float* y) {
  const Bytes lines;
  __m512 acc[M];
  for (__m512& a : acc) a = _mm512_setzero_ps();
  for_scaled_tiles<scale>(
      w, [&](int64_t tile, __m512 s) __attribute__((always_inline)) {
        const Int8Chunk* xt = x + tile * M;
        const __m512 value = _mm512_mul_ps(s, _mm512_set1_ps(Bytes::kValue));
        __m512i dots[M];
#pragma GCC unroll 8
        for (int token = 0; token < M; ++token) dots[token] = _mm512_set1_epi32(-Bytes::kBias * xt[token].sum);
#pragma GCC unroll 4
        for (int block = 0; block < 4; ++block) {
          __m512i v[2];
          lines.decode(w.tiles + tile * Bytes::kTileBytes, block, v);
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half)
#pragma GCC unroll 8
            for (int token = 0; token < M; ++token)
              dots[token] = _mm512_dpbusd_epi32(
                  dots[token], v[half], pair_of(reinterpret_cast<const uint32_t*>(xt[token].codes), 2 * block + half));
        }
#pragma GCC unroll 8
        for (int token = 0; token < M; ++token) {
          const __m512 factor = _mm512_mul_ps(value, _mm512_set1_ps(xt[token].scale));
          acc[token] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[token]), factor, acc[token]);
        }
      });
  for (int token = 0; token < M; ++token) _mm512_storeu_ps(y + token * 16, acc[token]);
}

template <class Bytes, ScaleFormat scale>
void gemm_int8(const RowGroup& w, const void* x, int m, float* y) {
  with_tokens(m, [&](auto tokens) { gemm_int8_m<Bytes, scale, tokens.value>(w, static_cast<const Int8Chunk*>(x), y); });
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

double peak_int8_ops(int64_t rounds) {
  __m512i sums[16];
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  volatile int seed = 0x01010101;
  const __m512i a = _mm512_set1_epi32(seed);
  for (int64_t round = 0; round < rounds; ++round)
    for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, a);
  int total = 0;
  for (const __m512i sum : sums) total += _mm512_reduce_add_epi32(sum);
  seed = total;
  return static_cast<double>(rounds) * 16 * 64 * 2;
}

}  // namespace

void fill_gemm(KernelTable& table) {
  const auto set = [&](GemmKind kind, GemmTile exact, GemmTile int8) {
    table.gemm[static_cast<int>(kind)] = exact;
    table.gemm_int8[static_cast<int>(kind)] = int8;
  };
  table.activation = Activation::bf16;
  table.token_block = 8;
  set(GemmKind::mxfp4_e8m0, gemm<NibbleLines<false>, ScaleFormat::e8m0_rows>,
      gemm_int8<NibbleBytes<false>, ScaleFormat::e8m0_rows>);
  set(GemmKind::mxfp4_f32, gemm<NibbleLines<false>, ScaleFormat::f32_rows>,
      gemm_int8<NibbleBytes<false>, ScaleFormat::f32_rows>);
  set(GemmKind::fp8_f32, gemm<ByteLines<false>, ScaleFormat::f32_blocks>, nullptr);
  set(GemmKind::bf16, gemm<Bf16Lines, ScaleFormat::none>, nullptr);
  set(GemmKind::int8_f32, gemm<ByteLines<true>, ScaleFormat::f32_rows>, gemm_int8<Int8Bytes, ScaleFormat::f32_rows>);
  set(GemmKind::int4_f32, gemm<NibbleLines<true>, ScaleFormat::f32_rows>,
      gemm_int8<NibbleBytes<true>, ScaleFormat::f32_rows>);
  table.peak_flops = peak_flops;
  table.peak_int8_ops = peak_int8_ops;
}

}  // namespace thermocline::cpu::avx512
