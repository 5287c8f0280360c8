// The mixture-of-experts layer: tokens are grouped by expert, each active expert's weights are read once per step, and
// the outputs of a token are added in rising expert order, so the result does not depend on the batch or the threads.
#pragma once

#include <span>
#include <vector>

#include "kernels_cpu/gemm.h"

namespace thermocline::cpu {

/// gate [I, D], up [I, D], down [D, I].
struct ExpertWeights {
  PackedMatrix w1, w3, w2;
  uint64_t bytes() const { return static_cast<uint64_t>(w1.bytes() + w3.bytes() + w2.bytes()); }
};

/// Buffers of the layer, for up to max_tokens tokens.
class MoeWorkspace {
 public:
  static Result<MoeWorkspace> allocate(int64_t max_tokens, int top_k, int experts, int64_t dim, int64_t inter_dim);

 private:
  friend class MoeLayer;
  friend int64_t distinct_experts(TensorView<const int32_t, 2> ids, MoeWorkspace& workspace);
  // One entry per active expert of the step, the shared expert last: pairs [first, first + count).
  struct Active {
    const ExpertWeights* weights;
    int64_t first, count;
  };
  GemmInput x_, h_;              // gathered inputs, inputs of w2
  HostArray<float> hidden_, y_;  // [pairs, I], [pairs, D]
  HostArray<float> pair_weight_;
  HostArray<int32_t> pair_token_, pair_of_;  // [pairs], [tokens, top_k + 1] in rising expert order, shared last
  std::vector<int32_t> expert_begin_;
  std::vector<Active> active_;
};

struct MoeOptions {
  float swiglu_limit = 0;
  bool round = true;     // results of linears and of the layer are stored as bf16
  bool quantise = true;  // inputs of w2 are rounded to e4m3
};

/// out[token] = sum over the token's experts of w2 (weight * swiglu(w1 x, w3 x)) + the shared expert's.
///   x        [tokens, D]  prepared (quantised where the numerics ask for it)
///   ids      [tokens, top_k] i32, weights [tokens, top_k] f32: from the gate; ids of a token are distinct or not
///   out      [tokens, D]  f32
/// Traffic: bytes of every distinct expert in ids, and of the shared expert, once.
/// Source: spec section 3.9.
void moe(const CpuContext& cpu, std::span<const ExpertWeights> experts, const ExpertWeights& shared, const GemmInput& x,
         TensorView<const int32_t, 2> ids, TensorView<const float, 2> weights, const MoeOptions& options,
         const GemmScratch& scratch, MoeWorkspace& workspace, float* out);

/// How many different experts the ids name.
int64_t distinct_experts(TensorView<const int32_t, 2> ids, MoeWorkspace& workspace);

}  // namespace thermocline::cpu
