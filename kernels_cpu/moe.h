// The mixture-of-experts layer in two parallel regions: gate and up with SwiGLU, then down with the sum over experts.
// Tokens are grouped by expert, each active expert's weights are read once per step, and the outputs of a token are
// added in rising expert order, so the result depends on neither the batch nor the threads nor the nodes.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "kernels_cpu/gemm.h"
#include "runtime/base/number_formats.h"

namespace thermocline::cpu {

/// gate [I, D], up [I, D], down [D, I]. On several NUMA nodes each is sliced by its rows: gate and up along I, in units
/// of kMoeUnit row groups, down along D.
struct ExpertWeights {
  PackedMatrix w1, w3, w2;
  uint64_t bytes() const { return static_cast<uint64_t>(w1.bytes() + w3.bytes() + w2.bytes()); }
};

/// Row groups of gate and up that stay with one worker: 128 outputs, the block in which inputs of w2 are rounded.
inline constexpr int64_t kMoeUnit = 8;

/// Rows that a worker gathers at once, and takes through a unit of gate and up: a buffer of its own holds no more of
/// them, however long the step.
inline constexpr int64_t kMoeRows = 128;

/// Buffers of the layer, for up to max_tokens tokens.
class MoeWorkspace {
 public:
  static Result<MoeWorkspace> allocate(int workers, int64_t max_tokens, int top_k, int experts, int64_t dim,
                                       int64_t inter_dim);

 private:
  friend class MoeLayer;
  // One entry per active expert of the step, the shared expert last: pairs [first, first + count).
  struct Active {
    const ExpertWeights* weights;
    const GemmInput* x;
    RowRange pairs;
  };
  struct Worker {
    GemmInput x;                // gathered rows of one expert
    HostArray<float> gate, up;  // [kMoeRows, 128] of one unit
  };
  std::vector<Worker> workers_;
  GemmInput h_routed_, h_shared_;  // inputs of w2, one row a pair
  HostArray<float> pair_weight_;
  HostArray<int32_t> pair_token_;
  std::vector<int32_t> expert_begin_;
  std::vector<Active> active_;
};

struct MoeOptions {
  float swiglu_limit = 0;
  bool round = true;           // results of linears and of the layer are stored as bf16
  InputFormat routed, shared;  // inputs of w2
};

/// out[token] = sum over the token's experts of w2 (weight * swiglu(w1 x, w3 x)) + the shared expert's.
///   shared   null: no shared expert
///   routed_x, shared_x  [tokens, D]  prepared inputs of the routed experts and of the shared one; may be the same
///   ids      [tokens, top_k] i32, weights [tokens, top_k] f32: from the gate; ids of a token are distinct or not
///   out      [tokens, D]  f32
/// Traffic: bytes of every distinct expert in ids, and of the shared expert, once.
/// Source: spec section 3.9.
void moe(const CpuContext& cpu, std::span<const ExpertWeights> experts, const ExpertWeights* shared,
         const GemmInput& routed_x, const GemmInput& shared_x, TensorView<const int32_t, 2> ids,
         TensorView<const float, 2> weights, const MoeOptions& options, MoeWorkspace& workspace, float* out);

/// The experts of some (token, expert) pairs, a result each: what the CPU computes for a device.
///   ids  [tokens, top_k] i32  -1: not a pair
///   out  [pairs, D] bf16 out  w2 (weight * swiglu(w1 x, w3 x)), pairs by rising expert, then token
/// Traffic: bytes of every distinct expert in ids, once.
void moe_pairs(const CpuContext& cpu, std::span<const ExpertWeights> experts, const GemmInput& x,
               TensorView<const int32_t, 2> ids, TensorView<const float, 2> weights, const MoeOptions& options,
               MoeWorkspace& workspace, bf16* out);

/// Reads what the workers would need of experts that will probably be asked for into their L2 caches, each its own
/// share of moe() with these experts, until it has read `most_bytes` or `stop` (called by all workers, often) says that
/// the time is over. Changes nothing but the caches. With other experts beside them the shares move: what a neighbour
/// read lies in a shared cache then, at best.
///   experts  by rising id, as moe() takes them
/// Returns how many were read whole. Source: spec/scheduler.md 2.7.
int stage_experts(const CpuContext& cpu, std::span<const ExpertWeights* const> experts, int64_t most_bytes,
                  const std::function<bool()>& stop);

}  // namespace thermocline::cpu
