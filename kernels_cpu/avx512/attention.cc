// AVX-512 attention micro-kernels, norms and the float32 GEMV.
#include <immintrin.h>

#include "kernels_cpu/kernel_table.h"

namespace thermocline::cpu::avx512 {
namespace {

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

}  // namespace

void fill(KernelTable& table) {
  table.isa = Isa::avx512;
  fill_gemm(table);
  table.attention_scores_bf16 = attention_scores;
  table.attention_values_bf16 = attention_values;
  table.sum_squares = sum_squares;
  table.gemv_f32 = gemv_f32;
}

}  // namespace thermocline::cpu::avx512
