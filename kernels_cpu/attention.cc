#include "kernels_cpu/attention.h"

#include <cmath>

#include "kernels_cpu/ref/ops.h"

namespace thermocline::cpu {

void attention(const KernelTable& table, const float* q, int heads, const void* const* rows, int64_t n, int64_t c,
               bool bf16_rows, float scale, const float* sinks, bool round, float* scores, float* out) {
  const auto score = bf16_rows ? table.attention_scores_bf16 : table.attention_scores_f32;
  const auto value = bf16_rows ? table.attention_values_bf16 : table.attention_values_f32;
  score(q, c, heads, rows, n, c, scale, scores, n);
  float denominators[64];
  TC_CHECK(heads <= 64);
  for (int h = 0; h < heads; ++h) denominators[h] = ref::softmax_with_sink(scores + h * n, n, sinks[h], round);
  value(scores, n, heads, rows, n, c, out, c);
  for (int h = 0; h < heads; ++h)
    for (int64_t d = 0; d < c; ++d) out[h * c + d] /= denominators[h];
  if (round) ref::round_to_bf16(out, heads * c);
}

void index_scores(const KernelTable& table, const float* q, int heads, const void* const* keys, int64_t n, int64_t c,
                  bool bf16_rows, const float* g, bool round, float* dots, float* scores) {
  const auto score = bf16_rows ? table.attention_scores_bf16 : table.attention_scores_f32;
  score(q, c, heads, keys, n, c, 1.0f, dots, n);
  ref::index_scores(dots, n, g, heads, n, round, scores);
}

void rms_norm(const KernelTable& table, const float* x, const float* weight, int64_t n, float eps, bool round,
              float* out) {
  const float scale = 1.0f / std::sqrt(table.sum_squares(x, n) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = weight[i] * (x[i] * scale);
  if (round) ref::round_to_bf16(out, n);
}

}  // namespace thermocline::cpu
