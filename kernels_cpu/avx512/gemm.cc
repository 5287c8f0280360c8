// AVX-512 GEMM micro-kernels. On bf16 activations a vector of weights is 16 rows x one column pair, the operand of
// vdpbf16ps against a broadcast pair of x; it treats subnormal inputs as zero, and e4m3 and e2m1 codes are normal in
// bf16. On int8 activations a vector is 16 rows x 4 columns of biased bytes, the unsigned operand of vpdpbusd.
//
// Instructions per tile of 16 x 32 (objdump of the M = 1 loop, and what each further token adds):
//   mxfp4  4 loads, 12 shifts, 16 vpermw, 6 for the scale; a token adds 16 vdpbf16ps, 1 add, 1 fma
//   fp8    8 loads, 16 vpermi2b, 8 vpternlogd, 16 vpunpck; a token adds 16 vdpbf16ps, 1 add, 1 fma
//   mxfp4 x int8  4 loads, 4 shifts, 8 vpand, 8 vpshufb, 6 for the scale; a token adds 8 vpdpbusd, cvt, mul, fma
#include <immintrin.h>

#include "kernels_cpu/avx512/gemm_loops.h"

namespace thermocline::cpu::avx512 {
namespace {

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
          ZenAhead<_MM_HINT_T1>::ask(bytes + line * 64);
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

template <class Lines, ScaleFormat scale>
void gemm(const RowGroup& w, const void* x, int m, float* y) {
  with_tokens(m, [&](auto tokens) { gemm_m<Lines, scale, tokens.value>(w, static_cast<const uint32_t*>(x), y); });
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

void fill_gemm(KernelTable& table) {
  const auto set = [&](GemmKind kind, GemmTile exact) { table.gemm[static_cast<int>(kind)] = exact; };
  table.activation = Activation::bf16;
  table.token_block = 8;
  set(GemmKind::mxfp4_e8m0, gemm<NibbleLines<false>, ScaleFormat::e8m0_rows>);
  set(GemmKind::mxfp4_f32, gemm<NibbleLines<false>, ScaleFormat::f32_rows>);
  set(GemmKind::fp8_f32, gemm<ByteLines<false>, ScaleFormat::f32_blocks>);
  set(GemmKind::bf16, gemm<Bf16Lines, ScaleFormat::none>);
  set(GemmKind::int8_f32, gemm<ByteLines<true>, ScaleFormat::f32_rows>);
  set(GemmKind::int4_f32, gemm<NibbleLines<true>, ScaleFormat::f32_rows>);
  fill_int8<ZenAhead<_MM_HINT_T0>>(table);
  table.prefetch = ZenAhead<_MM_HINT_T1>::kText;
  table.peak_flops = peak_flops;
}

}  // namespace thermocline::cpu::avx512
