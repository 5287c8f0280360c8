// Attention of one token over cached rows that lie anywhere (pages): scores, a softmax with a sink, values. K = V.
// Values are summed in blocks of kRowBlock rows, the blocks in order, so a long context can be split over workers
// without changing a bit.
#pragma once

#include <cstdint>

#include "kernels_cpu/kernel_table.h"

namespace thermocline::cpu {

inline constexpr int64_t kRowBlock = 512;

/// Some query heads of one token and the rows they see.
struct Attention {
  const float* q = nullptr;  // [heads, c]
  int heads = 0;
  const void* const* rows = nullptr;  // [n] pointers to rows of c elements; their order is the order of addition
  int64_t n = 0, c = 0;
  bool bf16_rows = true;  // else f32
  float scale = 0;
  bool round = true;  // q is rounded, probabilities and results are to be: the published numerics

  int64_t blocks() const { return (n + kRowBlock - 1) / kRowBlock; }
};

/// scores[h][i] of rows [first, first + count); scores [heads, n].
void attention_scores(const KernelTable& table, const Attention& a, int64_t first, int64_t count, float* scores);
/// Turns the scores of one head into probabilities times the returned denominator.
float attention_softmax(const KernelTable& table, const Attention& a, float sink, float* scores);
/// out [heads, c] = the sum over the rows of block `block` only; overwrites its scores.
void attention_values(const KernelTable& table, const Attention& a, int64_t block, float* scores, float* out);
/// Divides and rounds a head's summed values.
void attention_finish(const KernelTable& table, const Attention& a, float denominator, float* out);

/// All of it on one worker.
///   sinks    [heads] f32     logits without a value, used as they are
///   scores   [heads, n] f32  scratch
///   partial  [heads, c] f32  scratch, read where n > kRowBlock
///   out      [heads, c] f32
/// n >= 1. Source: spec section 3.7.
void attention(const KernelTable& table, const Attention& a, const float* sinks, float* scores, float* partial,
               float* out);

/// Packs a cached row in FP8 (UnpackFp8Rows has the format), rounding it to that grid on the way.
///   row  [nope + rope] f32
///   out  [2 rope + nope + ceil(nope / kFp8Block)] bytes
/// Unpacked it is ref::fake_fp8 of the first `nope` values per kFp8Block, and the others in bf16. Source:
/// spec 4.2, 5.2.
void store_fp8_row(const float* row, int64_t nope, int64_t rope, uint8_t* out);

/// rms_norm of spec 3.5 on the table's sum of squares; arguments as ref::rms_norm.
void rms_norm(const KernelTable& table, const float* x, const float* weight, int64_t n, float eps, bool round,
              float* out);

}  // namespace thermocline::cpu
