// The micro-kernels of every family as one table of function pointers, filled once at start-up with the best version
// the CPU runs. A micro-kernel computes one tile on plain pointers; threads, gathering and tails are its family's
// driver.
//
// This header is included by units built with AVX flags: it holds plain data and no inline function.
#pragma once

#include <cstdint>
#include <string>

#include "kernels_cpu/packed_matrix.h"
#include "runtime/hw/cpu_features.h"

namespace thermocline::cpu {

/// The weight and scale formats a GEMM micro-kernel exists for.
enum class GemmKind { mxfp4_e8m0, mxfp4_f32, fp8_f32, bf16, int8_f32, int4_f32 };
inline constexpr int kGemmKinds = 6;

/// What a GEMM's activations are stored as. f32 keeps them as they are; bf16 and wide_bf16 (a bf16 value as f32, for
/// kernels that multiply in f32) keep what published numerics leave in them; int8 rounds.
enum class Activation : uint8_t { f32, bf16, wide_bf16, int8 };

/// 32 columns of one row of INT8 activations: x = scale * codes. Columns lie in the order 0 4 1 5 2 6 3 7 of every
/// eight, which is how the nibbles of a line come apart.
struct Int8Chunk {
  int8_t codes[32];
  float scale;
  int32_t sum;  // of the codes: what a bias on the weights adds
};

/// Bytes of one row's 32 columns.
constexpr int64_t chunk_bytes(Activation activation) {
  switch (activation) {
    case Activation::bf16:
      return 64;
    case Activation::int8:
      return sizeof(Int8Chunk);
    default:
      return 128;
  }
}

/// The most tokens a GEMM micro-kernel takes on any instruction set.
inline constexpr int kMaxTokenBlock = 64;

/// y[token][0..15] = sum_k w[row, k] x[token, k] for one row group; 1 <= m <= KernelTable::token_block.
///   x  [k_tiles][m] chunks of 32 columns, zero beyond K
///   y  [m, 16]      f32 out
/// The order of additions for one (row, token) is the same for every m, so a token's result does not depend on who
/// shares the call.
using GemmTile = void (*)(const RowGroup& w, const void* x, int m, float* y);

/// scores[head][i] = scale * dot(q[head], row i) for `heads` heads and n rows of c elements.
using AttentionScores = void (*)(const float* q, int64_t q_stride, int heads, const void* const* rows, int64_t n,
                                 int64_t c, float scale, float* scores, int64_t scores_stride);
/// out[head] = sum_i p[head][i] * row i.
using AttentionValues = void (*)(const float* p, int64_t p_stride, int heads, const void* const* rows, int64_t n,
                                 int64_t c, float* out, int64_t out_stride);

/// out [n, nope + rope] bf16, contiguous <- n FP8 rows: `rope` bf16 values, `nope` e4m3 codes, an E8M0 byte per
/// kFp8Block codes; a row of `out` has the values of the codes first. Exact: a code has 4 bits, a scale is a power of
/// two, and store_fp8_row gives neither NaN nor what bf16 cannot hold.
using UnpackFp8Rows = void (*)(const void* const* rows, int64_t n, int64_t nope, int64_t rope, uint16_t* out);

/// Dims that share a scale in an FP8 row (spec 5.2).
inline constexpr int64_t kFp8Block = 64;

/// Queries a call of attention_dots takes, heads x c: they fit the stack.
inline constexpr int64_t kMaxDotQueries = 8192;

/// Scores of 16-row groups of FP4 index keys: scores[16 g + r] = sum_h bf16(gates[h] max(0, bf16(q[h] . key))).
///   q       [heads][k_tiles] chunks: twice the e2m1 values, scale a power of two (index_query)
///   groups  [n] key groups, each k_tiles mxfp4 tiles followed by [k_tiles][16] E8M0 bytes
using IndexScoresFp4 = void (*)(const Int8Chunk* q, const float* gates, int heads, const uint8_t* const* groups,
                                int64_t n, int64_t k_tiles, float* scores);

struct KernelTable {
  Isa isa = Isa::scalar;
  Activation activation = Activation::f32;  // what gemm[] takes: any but int8
  int token_block = 16;                     // tokens a GemmTile call takes
  GemmTile gemm[kGemmKinds] = {};
  GemmTile gemm_int8[kGemmKinds] = {};  // on INT8 activations; null for fp8 and bf16 weights, which are no integers

  AttentionScores attention_scores_bf16 = nullptr, attention_scores_f32 = nullptr;  // by the element type of the rows
  AttentionValues attention_values_bf16 = nullptr, attention_values_f32 = nullptr;

  UnpackFp8Rows unpack_fp8_rows = nullptr;

  /// For rounded numerics: the same with both operands in bf16, c a multiple of 32, heads x c at most kMaxDotQueries.
  /// Null: none faster than the above. attention_values_dots overwrites p.
  AttentionScores attention_dots = nullptr;
  void (*attention_values_dots)(float* p, int64_t p_stride, int heads, const void* const* rows, int64_t n, int64_t c,
                                float* out, int64_t out_stride) = nullptr;
  /// scores <- exp(scores - max), rounded to bf16 if `round`; returns their unrounded sum + exp(sink - max).
  float (*softmax_with_sink)(float* scores, int64_t n, float sink, bool round) = nullptr;
  /// x[i] <- x[i] / denominator, rounded to bf16 if `round`.
  void (*divide)(float* x, int64_t n, float denominator, bool round) = nullptr;
  IndexScoresFp4 index_scores_fp4 = nullptr;

  /// out[i] = weight * silu(min(gate, limit)) * clamp(up, limit); round: gate, up and the result are rounded to bf16.
  void (*swiglu)(const float* gate, const float* up, int64_t n, float limit, float weight, bool round,
                 float* out) = nullptr;
  /// Sum of x[i]^2.
  float (*sum_squares)(const float* x, int64_t n) = nullptr;
  /// out[i] = dot(w[i], x), w [n, k] row-major f32.
  void (*gemv_f32)(const float* w, const float* x, int64_t n, int64_t k, float* out) = nullptr;

  /// How far ahead gemm[] asks for weights (prefetch.h), in words; null: it does not.
  const char* prefetch = nullptr;

  /// Runs the multiply-add instruction of gemm[] on registers, `rounds` times; returns the FLOPs done.
  double (*peak_flops)(int64_t rounds) = nullptr;
  /// The same for gemm_int8[], in integer operations.
  double (*peak_int8_ops)(int64_t rounds) = nullptr;

  /// Called by a worker that is done with gemm[] and gemm_int8[] for now, at the end of a region; null: nothing to do.
  /// AMX keeps its tile configuration from call to call until then.
  void (*finish)() = nullptr;

  /// One line for the log: which version won each entry.
  std::string to_string() const;
};

/// The best table for this CPU, no higher than `max_isa`.
KernelTable make_kernel_table(const CpuFeatures& cpu, Isa max_isa = Isa::amx);

GemmKind gemm_kind(const PackedShape& shape);

/// Bytes of one group of 16 index keys.
constexpr int64_t key_group_bytes(int64_t k_tiles) { return k_tiles * (256 + 16); }

namespace scalar {
void index_scores_fp4(const Int8Chunk* q, const float* gates, int heads, const uint8_t* const* groups, int64_t n,
                      int64_t k_tiles, float* scores);
KernelTable table();  // every entry, for every CPU; the fp32 numerics run on it
}  // namespace scalar
namespace avx2 {
void fill(KernelTable& table);
}
namespace avx512 {
void fill(KernelTable& table);
void fill_gemm(KernelTable& table);
void fill_intel(KernelTable& table);  // over fill: the same bits by other instructions
}  // namespace avx512
namespace amx {
void fill(KernelTable& table);
}
namespace amx_emulated {  // the same kernels on emulated tiles, for machines without AMX
void fill(KernelTable& table);
}
namespace amx_emulated_avx512 {  // with the decoders of amx: for tests on CPUs with AVX-512
void fill(KernelTable& table);
}

}  // namespace thermocline::cpu
