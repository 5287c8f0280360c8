#include "kernels_cpu/moe.h"

#include <algorithm>
#include <cstring>

#include "kernels_cpu/ref/ops.h"

namespace thermocline::cpu {

Result<MoeWorkspace> MoeWorkspace::allocate(int64_t max_tokens, int top_k, int experts, int64_t dim,
                                            int64_t inter_dim) {
  const int64_t pairs = max_tokens * (top_k + 1);
  MoeWorkspace w;
  TC_ASSIGN(w.x_, GemmInput::allocate(pairs, dim));
  TC_ASSIGN(w.h_, GemmInput::allocate(pairs, inter_dim));
  TC_ASSIGN(w.hidden_, HostArray<float>::allocate(pairs * inter_dim));
  TC_ASSIGN(w.y_, HostArray<float>::allocate(pairs * dim));
  TC_ASSIGN(w.pair_weight_, HostArray<float>::allocate(pairs));
  TC_ASSIGN(w.pair_token_, HostArray<int32_t>::allocate(pairs));
  TC_ASSIGN(w.pair_of_, HostArray<int32_t>::allocate(pairs));
  w.expert_begin_.resize(static_cast<size_t>(experts) + 1);
  w.active_.reserve(static_cast<size_t>(experts) + 1);
  return w;
}

/// One call of moe(): the phases in the order the data moves.
class MoeLayer {
 public:
  MoeLayer(const CpuContext& cpu, const GemmInput& x, const MoeOptions& options, const GemmScratch& scratch,
           MoeWorkspace& w, int64_t top_k)
      : cpu_(cpu),
        x_(x),
        options_(options),
        scratch_(scratch),
        w_(w),
        tokens_(x.rows()),
        top_k_(top_k),
        pairs_(tokens_ * (top_k + 1)) {}

  void group_by_expert(std::span<const ExpertWeights> experts, const ExpertWeights& shared,
                       TensorView<const int32_t, 2> ids, TensorView<const float, 2> weights);
  void gather();
  void gate_and_up();
  void down();
  void combine(float* out);

 private:
  template <class Fn>
  void for_row_groups(PackedMatrix ExpertWeights::*which, const Fn& fn);

  const CpuContext& cpu_;
  const GemmInput& x_;
  const MoeOptions& options_;
  const GemmScratch& scratch_;
  MoeWorkspace& w_;
  const int64_t tokens_, top_k_, pairs_;
};

// A counting sort of (token, expert) pairs. Scanning tokens in order keeps a token's pairs reachable in expert order.
void MoeLayer::group_by_expert(std::span<const ExpertWeights> experts, const ExpertWeights& shared,
                               TensorView<const int32_t, 2> ids, TensorView<const float, 2> weights) {
  std::vector<int32_t>& begin = w_.expert_begin_;
  std::fill(begin.begin(), begin.end(), 0);
  for (int64_t i = 0; i < tokens_ * top_k_; ++i) ++begin[static_cast<size_t>(ids.data[i]) + 1];
  for (size_t e = 1; e < begin.size(); ++e) begin[e] += begin[e - 1];
  w_.active_.clear();
  for (size_t e = 0; e < experts.size(); ++e)
    if (begin[e + 1] > begin[e]) w_.active_.push_back({&experts[e], begin[e], begin[e + 1] - begin[e]});
  w_.active_.push_back({&shared, tokens_ * top_k_, tokens_});
  for (int64_t token = 0; token < tokens_; ++token) {
    int32_t* pairs = &w_.pair_of_[token * (top_k_ + 1)];
    for (int64_t j = 0; j < top_k_; ++j) {
      const int32_t pair = begin[static_cast<size_t>(ids.row(token)[j])]++;
      pairs[j] = pair;
      w_.pair_token_[pair] = static_cast<int32_t>(token);
      w_.pair_weight_[pair] = weights.row(token)[j];
    }
    std::sort(pairs, pairs + top_k_);  // pairs are numbered by expert
    const int64_t pair = tokens_ * top_k_ + token;
    pairs[top_k_] = static_cast<int32_t>(pair);
    w_.pair_token_[pair] = static_cast<int32_t>(token);
    w_.pair_weight_[pair] = 1.0f;
  }
}

void MoeLayer::gather() {
  w_.x_.reshape(cpu_.table, pairs_, x_.k());
  cpu_.pool.split(pairs_, [&](int64_t begin, int64_t end, int) {
    for (int64_t pair = begin; pair < end; ++pair)
      std::memcpy(w_.x_.row(pair), x_.row(w_.pair_token_[pair]), static_cast<size_t>(x_.row_bytes()));
  });
}

// Calls fn(active, group, worker) for every row group of matrix `which` of every active expert, split so that each
// worker gets the same share of the work: weight bytes read plus multiplications.
template <class Fn>
void MoeLayer::for_row_groups(PackedMatrix ExpertWeights::*which, const Fn& fn) {
  const auto matrix = [&](const MoeWorkspace::Active& active) -> const PackedMatrix& { return active.weights->*which; };
  const auto cost = [&](const MoeWorkspace::Active& active) {
    return matrix(active).group_tile_bytes() + active.count * matrix(active).k_tiles() * 64;
  };
  int64_t total = 0;
  for (const auto& active : w_.active_) total += matrix(active).row_groups() * cost(active);
  cpu_.pool.run([&](int worker) {
    const int64_t low = total * worker / cpu_.pool.size(), high = total * (worker + 1) / cpu_.pool.size();
    int64_t base = 0;
    for (const auto& active : w_.active_) {
      // Group g stands for the costs [base + g c, base + (g + 1) c); it goes to the worker whose share holds the first.
      const int64_t c = cost(active), groups = matrix(active).row_groups();
      const auto group_at = [&](int64_t bound) { return std::clamp<int64_t>((bound - base + c - 1) / c, 0, groups); };
      const int64_t last = group_at(high);
      for (int64_t group = group_at(low); group < last; ++group) fn(active, group, worker);
      base += groups * c;
    }
  });
}

void MoeLayer::gate_and_up() {
  const int64_t inter_dim = w_.active_[0].weights->w1.n;
  for_row_groups(&ExpertWeights::w1, [&](const MoeWorkspace::Active& active, int64_t group, int worker) {
    float* g = scratch_.tile(worker);
    float* u = g + active.count * kTileRows;
    const std::byte* x = w_.x_.row(active.first);
    gemm_row_group(cpu_.table, active.weights->w1, group, x, w_.x_.row_bytes(), active.count, scratch_.expanded(worker),
                   g);
    gemm_row_group(cpu_.table, active.weights->w3, group, x, w_.x_.row_bytes(), active.count, scratch_.expanded(worker),
                   u);
    if (options_.round) ref::round_to_bf16(g, 2 * active.count * kTileRows);
    const int64_t n = group * kTileRows, width = std::min(kTileRows, inter_dim - n);
    for (int64_t i = 0; i < active.count; ++i) {
      float* h = &w_.hidden_[(active.first + i) * inter_dim + n];
      const float weight = w_.pair_weight_[active.first + i];
      for (int64_t r = 0; r < width; ++r)
        h[r] = weight * ref::swiglu(g[i * kTileRows + r], u[i * kTileRows + r], options_.swiglu_limit);
      if (options_.round) ref::round_to_bf16(h, width);
    }
  });
}

void MoeLayer::down() {
  const int64_t dim = w_.active_[0].weights->w2.n, inter_dim = w_.active_[0].weights->w2.k;
  prepare(cpu_, TensorView<const float, 2>(w_.hidden_.data(), {pairs_, inter_dim}), options_.quantise, scratch_, w_.h_);
  for_row_groups(&ExpertWeights::w2, [&](const MoeWorkspace::Active& active, int64_t group, int worker) {
    float* tile = scratch_.tile(worker);
    gemm_row_group(cpu_.table, active.weights->w2, group, w_.h_.row(active.first), w_.h_.row_bytes(), active.count,
                   scratch_.expanded(worker), tile);
    if (options_.round) ref::round_to_bf16(tile, active.count * kTileRows);
    const int64_t n = group * kTileRows, width = std::min(kTileRows, dim - n);
    for (int64_t i = 0; i < active.count; ++i)
      std::copy_n(tile + i * kTileRows, width, &w_.y_[(active.first + i) * dim + n]);
  });
}

void MoeLayer::combine(float* out) {
  const int64_t dim = w_.active_[0].weights->w2.n;
  cpu_.pool.split(tokens_, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      float* sum = out + token * dim;
      std::fill_n(sum, dim, 0.0f);
      for (int64_t j = 0; j <= top_k_; ++j) {
        const float* y = &w_.y_[w_.pair_of_[token * (top_k_ + 1) + j] * dim];
        for (int64_t d = 0; d < dim; ++d) sum[d] += y[d];
      }
      if (options_.round) ref::round_to_bf16(sum, dim);
    }
  });
}

int64_t distinct_experts(TensorView<const int32_t, 2> ids, MoeWorkspace& workspace) {
  std::vector<int32_t>& seen = workspace.expert_begin_;
  std::fill(seen.begin(), seen.end(), 0);
  int64_t count = 0;
  for (int64_t i = 0; i < ids.size(); ++i) count += seen[static_cast<size_t>(ids.data[i])]++ == 0;
  return count;
}

void moe(const CpuContext& cpu, std::span<const ExpertWeights> experts, const ExpertWeights& shared, const GemmInput& x,
         TensorView<const int32_t, 2> ids, TensorView<const float, 2> weights, const MoeOptions& options,
         const GemmScratch& scratch, MoeWorkspace& workspace, float* out) {
  if (x.rows() == 0) return;
  MoeLayer layer(cpu, x, options, scratch, workspace, ids.shape[1]);
  layer.group_by_expert(experts, shared, ids, weights);
  layer.gather();
  layer.gate_and_up();
  layer.down();
  layer.combine(out);
}

}  // namespace thermocline::cpu
