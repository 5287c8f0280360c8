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
enum class GemmKind { mxfp4_e8m0, mxfp4_f32, fp8_f32, bf16 };
inline constexpr int kGemmKinds = 4;

/// y[token][0..15] = sum_k w[row, k] x[token, k] for one row group; token < m.
///   x  [m, x_stride]  bf16 or f32 as KernelTable::bf16_inputs says, zero from K to padded_k
///   y  [m, 16]        f32 out
/// The order of additions for one (row, token) is the same for every m, so a token's result does not depend on who
/// shares the call.
using GemmTile = void (*)(const RowGroup& w, const void* x, int64_t x_stride, int m, float* y);

/// Widens a row group's codes to bf16 tiles, once for many tokens; scales stay where they are.
using ExpandTiles = void (*)(const uint8_t* tiles, int64_t k_tiles, uint8_t* bf16_tiles);

/// scores[head][i] = scale * dot(q[head], row i) for `heads` heads and n rows of c elements.
using AttentionScores = void (*)(const float* q, int64_t q_stride, int heads, const void* const* rows, int64_t n,
                                 int64_t c, float scale, float* scores, int64_t scores_stride);
/// out[head] = sum_i p[head][i] * row i.
using AttentionValues = void (*)(const float* p, int64_t p_stride, int heads, const void* const* rows, int64_t n,
                                 int64_t c, float* out, int64_t out_stride);

struct KernelTable {
  Isa isa = Isa::scalar;
  bool bf16_inputs = false;  // GEMM activations: bf16, or f32
  int max_tokens = 1;        // tokens a GemmTile call takes
  GemmTile gemm[kGemmKinds] = {};
  /// With more than max_tokens tokens: expand once, then the kind's kernel on bf16 tiles with its own scales.
  /// Null where decoding twice costs little.
  ExpandTiles expand[kGemmKinds] = {};
  GemmTile gemm_expanded[kGemmKinds] = {};

  AttentionScores attention_scores_bf16 = nullptr, attention_scores_f32 = nullptr;  // by the element type of the rows
  AttentionValues attention_values_bf16 = nullptr, attention_values_f32 = nullptr;

  /// Sum of x[i]^2.
  float (*sum_squares)(const float* x, int64_t n) = nullptr;
  /// out[i] = dot(w[i], x), w [n, k] row-major f32.
  void (*gemv_f32)(const float* w, const float* x, int64_t n, int64_t k, float* out) = nullptr;

  /// Runs the multiply-add instruction of the GEMMs on registers, `rounds` times; returns the FLOPs done.
  double (*peak_flops)(int64_t rounds) = nullptr;

  /// One line for the log: which version won each entry.
  std::string to_string() const;
};

/// The best table for this CPU, no higher than `max_isa`.
KernelTable make_kernel_table(const CpuFeatures& cpu, Isa max_isa = Isa::amx);

GemmKind gemm_kind(const PackedShape& shape);

namespace scalar {
KernelTable table();  // every entry, for every CPU; the fp32 numerics run on it
}
namespace avx2 {
void fill(KernelTable& table);
}
namespace avx512 {
void fill(KernelTable& table);
}

}  // namespace thermocline::cpu
