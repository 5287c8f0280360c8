// What the AVX-512 GEMM units share: scales of a row group, its tiles in order, the number of tokens as a constant, and
// the kernels on INT8 activations.
// Internal linkage, as in decode.h.
#pragma once

#include "kernels_cpu/avx512/decode.h"
#include "kernels_cpu/kernel_table.h"
#include "kernels_cpu/prefetch.h"

namespace thermocline::cpu {
namespace {

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

// Asks for the scales ahead where they are a plane of their own and the core wants it.
template <class Ahead, ScaleFormat format>
inline __attribute__((always_inline)) void ask_scales(const RowGroup& w, int64_t tile) {
  if constexpr (format == ScaleFormat::e8m0_rows && Ahead::kScales > 0)
    if (tile % 4 == 0)
      _mm_prefetch(static_cast<const char*>(w.scales) + tile * kTileRows + Ahead::kScales, _MM_HINT_T0);
}

template <ScaleFormat format>
__m512 add_scaled(__m512 sum, __m512 scale, __m512 acc) {
  if constexpr (format == ScaleFormat::none)
    return _mm512_add_ps(acc, sum);
  else
    return _mm512_fmadd_ps(sum, scale, acc);
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

inline __attribute__((always_inline)) __m512i pair_of(const uint32_t* x, int i) {
  return _mm512_set1_epi32(static_cast<int>(x[i]));
}

// --- int8 activations ---

template <class Ahead, class Bytes, ScaleFormat scale, int M>
void gemm_int8_m(const RowGroup& w, const Int8Chunk* x, float* y) {
  const Bytes lines;
  __m512 acc[M];
  for (__m512& a : acc) a = _mm512_setzero_ps();
  for_scaled_tiles<scale>(
      w, [&](int64_t tile, __m512 s) __attribute__((always_inline)) {
        ask_scales<Ahead, scale>(w, tile);
        const Int8Chunk* xt = x + tile * M;
        const __m512 value = _mm512_mul_ps(s, _mm512_set1_ps(Bytes::kValue));
        __m512i dots[M];
#pragma GCC unroll 8
        for (int token = 0; token < M; ++token) dots[token] = _mm512_set1_epi32(-Bytes::kBias * xt[token].sum);
#pragma GCC unroll 4
        for (int block = 0; block < 4; ++block) {
          const uint8_t* bytes = w.tiles + tile * Bytes::kLines * 64;
          for (int line = block * Bytes::kLines / 4; line < (block + 1) * Bytes::kLines / 4; ++line)
            Ahead::ask(bytes + line * 64);
          __m512i v[2];
          lines.decode(bytes, block, v);
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

template <class Ahead, class Bytes, ScaleFormat scale>
void gemm_int8(const RowGroup& w, const void* x, int m, float* y) {
  with_tokens(
      m, [&](auto tokens) { gemm_int8_m<Ahead, Bytes, scale, tokens.value>(w, static_cast<const Int8Chunk*>(x), y); });
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

template <class Ahead>
void fill_int8(KernelTable& table) {
  const auto set = [&](GemmKind kind, GemmTile tile) { table.gemm_int8[static_cast<int>(kind)] = tile; };
  set(GemmKind::mxfp4_e8m0, gemm_int8<Ahead, NibbleBytes<false>, ScaleFormat::e8m0_rows>);
  set(GemmKind::mxfp4_f32, gemm_int8<Ahead, NibbleBytes<false>, ScaleFormat::f32_rows>);
  set(GemmKind::int8_f32, gemm_int8<Ahead, Int8Bytes, ScaleFormat::f32_rows>);
  set(GemmKind::int4_f32, gemm_int8<Ahead, NibbleBytes<true>, ScaleFormat::f32_rows>);
  table.peak_int8_ops = peak_int8_ops;
}

}  // namespace
}  // namespace thermocline::cpu
