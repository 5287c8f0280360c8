// Attention of one token over cached rows that lie anywhere (pages): scores, a softmax with a sink, values. K = V.
#pragma once

#include <cstdint>

#include "kernels_cpu/kernel_table.h"

namespace thermocline::cpu {

/// Attends `heads` query heads of one token.
///   q       [heads, c] f32
///   rows    [n] pointers to rows of c elements, bf16 or f32 by `bf16_rows`; their order is the order of addition
///   sinks   [heads] f32   logits without a value, used as they are
///   scores  [heads, n] f32 scratch
///   out     [heads, c] f32
/// round: probabilities and results are rounded to bf16 (the published numerics). n >= 1.
/// Source: spec section 3.7.
void attention(const KernelTable& table, const float* q, int heads, const void* const* rows, int64_t n, int64_t c,
               bool bf16_rows, float scale, const float* sinks, bool round, float* scores, float* out);

/// Dots of every indexer head with n keys, then their gated sum: I[r] = sum_h g[h] max(0, q[h] . key r).
///   q [heads, c], keys [n] pointers, g [heads], dots [heads, n] scratch, scores [n] out
/// Source: spec section 3.8.3.
void index_scores(const KernelTable& table, const float* q, int heads, const void* const* keys, int64_t n, int64_t c,
                  bool bf16_rows, const float* g, bool round, float* dots, float* scores);

/// rms_norm of spec 3.5 on the table's sum of squares; arguments as ref::rms_norm.
void rms_norm(const KernelTable& table, const float* x, const float* weight, int64_t n, float eps, bool round,
              float* out);

}  // namespace thermocline::cpu
