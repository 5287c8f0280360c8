#include "kernels_cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels_cpu/ref/ops.h"
#include "runtime/base/number_formats.h"

namespace thermocline::cpu {
namespace {

bool takes_dots(const KernelTable& table, const Attention& a) {
  return a.round && a.bf16_rows && table.attention_dots && a.c % 32 == 0 && a.heads * a.c <= kMaxDotQueries;
}

}  // namespace

void attention_scores(const KernelTable& table, const Attention& a, int64_t first, int64_t count, float* scores) {
  const auto score = takes_dots(table, a) ? table.attention_dots
                     : a.bf16_rows        ? table.attention_scores_bf16
                                          : table.attention_scores_f32;
  score(a.q, a.c, a.heads, a.rows + first, count, a.c, a.scale, scores + first, a.n);
}

float attention_softmax(const KernelTable& table, const Attention& a, float sink, float* scores) {
  return table.softmax_with_sink(scores, a.n, sink, a.round);
}

void attention_values(const KernelTable& table, const Attention& a, int64_t block, float* scores, float* out) {
  const int64_t first = block * kRowBlock, count = std::min(kRowBlock, a.n - first);
  if (takes_dots(table, a))
    return table.attention_values_dots(scores + first, a.n, a.heads, a.rows + first, count, a.c, out, a.c);
  const auto value = a.bf16_rows ? table.attention_values_bf16 : table.attention_values_f32;
  value(scores + first, a.n, a.heads, a.rows + first, count, a.c, out, a.c);
}

void attention_finish(const KernelTable& table, const Attention& a, float denominator, float* out) {
  table.divide(out, a.c, denominator, a.round);
}

void attention(const KernelTable& table, const Attention& a, const float* sinks, float* scores, float* partial,
               float* out) {
  float denominators[64];
  TC_CHECK(a.heads <= 64);
  attention_scores(table, a, 0, a.n, scores);
  for (int h = 0; h < a.heads; ++h) denominators[h] = attention_softmax(table, a, sinks[h], scores + h * a.n);
  attention_values(table, a, 0, scores, out);
  for (int64_t block = 1; block < a.blocks(); ++block) {
    attention_values(table, a, block, scores, partial);
    for (int64_t i = 0; i < a.heads * a.c; ++i) out[i] += partial[i];
  }
  for (int h = 0; h < a.heads; ++h) attention_finish(table, a, denominators[h], out + h * a.c);
}

void store_fp8_row(const float* row, int64_t nope, int64_t rope, uint8_t* out) {
  uint8_t* codes = out + 2 * rope;
  uint8_t* scales = codes + nope;
  for (int64_t begin = 0; begin < nope; begin += kFp8Block) {
    const int64_t end = std::min(nope, begin + kFp8Block);
    const float scale = ref::e4m3_scale(row + begin, end - begin), inverse = 1.0f / scale;
    for (int64_t d = begin; d < end; ++d)
      codes[d] = float_to_e4m3(std::min(448.0f, std::max(-448.0f, row[d] * inverse)));
    scales[begin / kFp8Block] = static_cast<uint8_t>(std::bit_cast<uint32_t>(scale) >> 23);
  }
  for (int64_t d = 0; d < rope; ++d) {
    const bf16 value = float_to_bf16(row[nope + d]);
    std::memcpy(out + 2 * d, &value, sizeof(value));
  }
}

void rms_norm(const KernelTable& table, const float* x, const float* weight, int64_t n, float eps, bool round,
              float* out) {
  const float scale = 1.0f / std::sqrt(table.sum_squares(x, n) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = weight[i] * (x[i] * scale);
  if (round) ref::round_to_bf16(out, n);
}

}  // namespace thermocline::cpu
