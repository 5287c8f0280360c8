#include "kernels_cpu/moe.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels_cpu/ref/ops.h"

namespace thermocline::cpu {
namespace {

constexpr int64_t kUnitCols = kMoeUnit * kTileRows;

// A worker that turns to another matrix would wait for its first lines; asked for early, they lie in L2 by then.
void prefetch_start(const PackedMatrix& w, int64_t group) {
  constexpr int64_t kBytes = 8192;
  const RowGroup rows = w.row_group(group);
  for (int64_t at = 0; at < kBytes; at += 64) __builtin_prefetch(rows.tiles + at, 0, 2);
  for (int64_t at = 0; at < kBytes / 16; at += 64)
    __builtin_prefetch(static_cast<const uint8_t*>(rows.scales) + at, 0, 2);
}

// Asks for bytes of a plane, and now and then whether to go on.
bool prefetch_plane(const void* plane, int64_t bytes, int64_t& left, const std::function<bool()>& stop) {
  constexpr int64_t kLook = 4096;
  const auto* const begin = static_cast<const std::byte*>(plane);
  for (int64_t at = 0; at < bytes; at += kLook) {
    if (left <= 0 || stop()) return false;
    const int64_t end = std::min(bytes, at + kLook);
    for (int64_t line = at; line < end; line += 64) __builtin_prefetch(begin + line, 0, 2);
    left -= end - at;
  }
  return true;
}

}  // namespace

Result<MoeWorkspace> MoeWorkspace::allocate(int workers, int64_t max_tokens, int top_k, int experts, int64_t dim,
                                            int64_t inter_dim) {
  const int64_t pairs = max_tokens * top_k;
  MoeWorkspace w;
  w.workers_.resize(static_cast<size_t>(workers));
  for (Worker& worker : w.workers_) {
    const int64_t rows = std::min(max_tokens, kMoeRows);
    TC_ASSIGN(worker.x, GemmInput::allocate(rows, dim));
    TC_ASSIGN(worker.gate, HostArray<float>::allocate(rows * kUnitCols));
    TC_ASSIGN(worker.up, HostArray<float>::allocate(rows * kUnitCols));
  }
  TC_ASSIGN(w.h_routed_, GemmInput::allocate(pairs, inter_dim));
  TC_ASSIGN(w.h_shared_, GemmInput::allocate(max_tokens, inter_dim));
  TC_ASSIGN(w.pair_weight_, HostArray<float>::allocate(pairs));
  TC_ASSIGN(w.pair_token_, HostArray<int32_t>::allocate(pairs));
  w.expert_begin_.resize(static_cast<size_t>(experts) + 1);
  w.active_.reserve(static_cast<size_t>(experts + top_k) + 1);
  return w;
}

/// One call of moe(): the phases in the order the data moves.
class MoeLayer {
 public:
  MoeLayer(const CpuContext& cpu, const MoeOptions& options, MoeWorkspace& w, int64_t tokens, int64_t top_k)
      : cpu_(cpu), options_(options), w_(w), tokens_(tokens), top_k_(top_k) {}

  void group_by_expert(std::span<const ExpertWeights> experts, const ExpertWeights* shared, const GemmInput& routed_x,
                       const GemmInput& shared_x, TensorView<const int32_t, 2> ids, TensorView<const float, 2> weights);
  void expect(WeightTraffic::Timer& timer) const;
  void gate_and_up();
  /// Sums [tokens, D], or every pair's own result [pairs, D].
  void down(float* out);
  void down_pairs(bf16* out);

 private:
  using Active = MoeWorkspace::Active;
  using Worker = MoeWorkspace::Worker;

  bool is_shared(const Active& active) const { return &active == &w_.active_.back() && has_shared_; }
  int64_t token_of(const Active& active, int64_t i) const {
    return is_shared(active) ? i : w_.pair_token_[active.pairs.first + i];
  }
  // Rows of an expert, at most kMoeRows of them, as the micro-kernels take them: blocks [begin, end) of `range`.
  struct Part {
    RowRange rows;  // of the expert's
    const GemmInput* x;
    RowRange range;
    int64_t begin, end;
  };
  Part part(const Active& active, int64_t first, Worker& worker) const;
  void gather(const Active& active, const RowRange& rows, Worker& worker) const;
  void run_unit(const PackedMatrix& w, const Part& part, int64_t first, int64_t last, float* out) const;
  /// fn(active, row, n, count, y): a pair's outputs [n, n + count) of w2, every active expert in order.
  template <class Fn>
  void for_down_tiles(int id, int64_t first, int64_t last, const Fn& fn) const;
  void activate(const Active& active, const RowRange& rows, int64_t first_group, int64_t width, float* gate,
                float* up) const;
  void run_unit_of(const Active& active, int64_t first, int64_t last, Part* whole, Worker& worker) const;

  const CpuContext& cpu_;
  const MoeOptions& options_;
  MoeWorkspace& w_;
  const int64_t tokens_, top_k_;
  bool has_shared_ = false;
};

// A counting sort of (token, expert) pairs; scanning tokens in order keeps those of an expert in order.
void MoeLayer::group_by_expert(std::span<const ExpertWeights> experts, const ExpertWeights* shared,
                               const GemmInput& routed_x, const GemmInput& shared_x, TensorView<const int32_t, 2> ids,
                               TensorView<const float, 2> weights) {
  std::vector<int32_t>& begin = w_.expert_begin_;
  std::fill(begin.begin(), begin.end(), 0);
  for (int64_t i = 0; i < tokens_ * top_k_; ++i)
    if (ids.data[i] >= 0) ++begin[static_cast<size_t>(ids.data[i]) + 1];
  for (size_t e = 1; e < begin.size(); ++e) begin[e] += begin[e - 1];
  w_.active_.clear();
  for (size_t e = 0; e < experts.size(); ++e)
    // A token that names an expert twice makes more pairs than tokens; the buffers of a worker hold one of each.
    for (int64_t first = begin[e]; first < begin[e + 1]; first += tokens_)
      w_.active_.push_back({&experts[e], &routed_x, {first, std::min<int64_t>(tokens_, begin[e + 1] - first)}});
  if ((has_shared_ = shared != nullptr)) w_.active_.push_back({shared, &shared_x, {0, tokens_}});
  for (int64_t token = 0; token < tokens_; ++token)
    for (int64_t j = 0; j < top_k_; ++j) {
      if (ids.row(token)[j] < 0) continue;
      const int32_t pair = begin[static_cast<size_t>(ids.row(token)[j])]++;
      w_.pair_token_[pair] = static_cast<int32_t>(token);
      w_.pair_weight_[pair] = weights.row(token)[j];
    }
  w_.h_routed_.reshape(cpu_.table, options_.routed.activation, tokens_ * top_k_, experts[0].w2.k);
  if (shared) w_.h_shared_.reshape(cpu_.table, options_.shared.activation, tokens_, shared->w2.k);
}

void MoeLayer::expect(WeightTraffic::Timer& timer) const {
  for (const Active& active : w_.active_)
    for (const PackedMatrix* w : {&active.weights->w1, &active.weights->w3, &active.weights->w2})
      cpu_.expect(timer, *w, w->row_groups());
}

// A copy of the expert's rows in the worker's own cache.
void MoeLayer::gather(const Active& active, const RowRange& rows, Worker& worker) const {
  const GemmInput& x = *active.x;
  worker.x.reshape(cpu_.table, x.activation(), rows.count, x.k());
  const int64_t chunk = chunk_bytes(x.activation()), chunks = x.row_bytes() / chunk;
  for (int64_t i = 0; i < rows.count; ++i) {
    const RowChunks from = x.row({0, tokens_}, token_of(active, rows.first + i)), to = worker.x.row({0, rows.count}, i);
    for (int64_t c = 0; c < chunks; ++c)
      std::memcpy(to.first + c * to.stride, from.first + c * from.stride, static_cast<size_t>(chunk));
  }
}

// From row `first` on, gathered, except where every token is there and the input lies right already.
MoeLayer::Part MoeLayer::part(const Active& active, int64_t first, Worker& worker) const {
  const GemmInput& x = *active.x;
  if (active.pairs.count == tokens_ && (is_shared(active) || tokens_ == 1)) {
    const RowRange all{0, tokens_};
    int64_t begin = 0;
    while (x.block(all, begin).first < first) ++begin;
    const int64_t end = std::min(x.blocks(all), begin + kMoeRows / cpu_.table.token_block);
    const RowBlock last = x.block(all, end - 1);
    return {{first, last.first + last.rows - first}, &x, all, begin, end};
  }
  const RowRange rows{first, std::min(kMoeRows, active.pairs.count - first)};
  gather(active, rows, worker);
  const RowRange range{0, rows.count};
  return {rows, &worker.x, range, 0, worker.x.blocks(range)};
}

// Row groups [first, last) of w, at most a unit, times the part's rows: out [count, 128].
void MoeLayer::run_unit(const PackedMatrix& w, const Part& part, int64_t first, int64_t last, float* out) const {
  const GemmTile tile = gemm_tile(cpu_.table, w, part.x->activation());
  const int64_t first_row = part.x->block(part.range, part.begin).first;
  alignas(64) float y[kMaxTokenBlock * kTileRows];
  for (int64_t group = first; group < last; ++group) {
    const RowGroup weights = w.row_group(group);
    for (int64_t b = part.begin; b < part.end; ++b) {
      const RowBlock block = part.x->block(part.range, b);
      tile(weights, part.x->data(block), block.rows, y);
      for (int i = 0; i < block.rows; ++i)
        std::memcpy(out + (block.first - first_row + i) * kUnitCols + (group - first) * kTileRows, y + i * kTileRows,
                    kTileRows * sizeof(float));
    }
  }
}

// swiglu of one unit, into the prepared inputs of w2. A unit is a whole block of every rounding.
void MoeLayer::activate(const Active& active, const RowRange& rows, int64_t first_group, int64_t width, float* gate,
                        float* up) const {
  const bool shared = is_shared(active);
  const GemmInput& h = shared ? w_.h_shared_ : w_.h_routed_;
  const InputFormat& format = shared ? options_.shared : options_.routed;
  for (int64_t i = 0; i < rows.count; ++i) {
    float* g = gate + i * kUnitCols;
    cpu_.table.swiglu(g, up + i * kUnitCols, kUnitCols, options_.swiglu_limit,
                      shared ? 1.0f : w_.pair_weight_[active.pairs.first + rows.first + i], options_.round, g);
    const RowChunks row = h.row(active.pairs, rows.first + i);
    store_row(format, g, width, {row.first + first_group * kTileRows / kTileCols * row.stride, row.stride});
  }
}

// Gate and up of one unit for all rows. `whole`: the only part, where all rows are one; else the rows are gathered part
// by part, and the unit's weights come from cache from the second part on.
void MoeLayer::run_unit_of(const Active& active, int64_t first, int64_t last, Part* whole, Worker& worker) const {
  const ExpertWeights& e = *active.weights;
  const int64_t width = std::min(e.w1.n - first * kTileRows, kUnitCols);
  for (int64_t row = 0; row < active.pairs.count;) {
    const Part p = whole ? *whole : part(active, row, worker);
    prefetch_start(e.w3, first);
    run_unit(e.w1, p, first, std::min(last, first + kMoeUnit), worker.gate.data());
    if (first + kMoeUnit < last) prefetch_start(e.w1, first + kMoeUnit);
    run_unit(e.w3, p, first, std::min(last, first + kMoeUnit), worker.up.data());
    activate(active, p.rows, first, width, worker.gate.data(), worker.up.data());
    row += p.rows.count;
  }
}

void MoeLayer::gate_and_up() {
  const auto range_of = [&](int64_t i) {
    const Active& active = w_.active_[static_cast<size_t>(i)];
    const PackedMatrix& w1 = active.weights->w1;
    return GroupRange{&w1, 0, w1.row_groups(), group_cost(w1, active.pairs.count)};
  };
  cpu_.pool.run([&](int id) {
    Worker& worker = w_.workers_[static_cast<size_t>(id)];
    for_own_groups(cpu_.pool, id, static_cast<int64_t>(w_.active_.size()), kMoeUnit, range_of,
                   [&](int64_t item, int64_t first, int64_t last) {
                     const Active& active = w_.active_[static_cast<size_t>(item)];
                     const ExpertWeights& e = *active.weights;
                     cpu_.count(id, e.w1, first, last - first);
                     cpu_.count(id, e.w3, first, last - first);
                     Part whole = part(active, 0, worker);
                     const bool one = whole.rows.count == active.pairs.count;
                     for (; first < last; first += kMoeUnit)
                       run_unit_of(active, first, last, one ? &whole : nullptr, worker);
                   });
    cpu_.finish();
  });
}

template <class Fn>
void MoeLayer::for_down_tiles(int id, int64_t first, int64_t last, const Fn& fn) const {
  alignas(64) float y[kMaxTokenBlock * kTileRows];
  for (const Active& active : w_.active_) {
    const PackedMatrix& w2 = active.weights->w2;
    const GemmInput& h = is_shared(active) ? w_.h_shared_ : w_.h_routed_;
    const int64_t blocks = h.blocks(active.pairs);
    const GemmTile tile = gemm_tile(cpu_.table, w2, h.activation());
    cpu_.count(id, w2, first, last - first);
    if (&active != &w_.active_.back()) prefetch_start((&active + 1)->weights->w2, first);
    for (int64_t group = first; group < last; ++group) {
      const RowGroup rows = w2.row_group(group);
      const int64_t n = group * kTileRows, count = std::min(kTileRows, w2.n - n);
      for (int64_t b = 0; b < blocks; ++b) {
        const RowBlock block = h.block(active.pairs, b);
        tile(rows, h.data(block), block.rows, y);
        if (options_.round) ref::round_to_bf16(y, block.rows * kTileRows);
        for (int i = 0; i < block.rows; ++i)
          fn(active, block.first - active.pairs.first + i, n, count, y + i * kTileRows);
      }
    }
  }
}

// Each worker owns some of the D outputs and adds up all experts for them.
void MoeLayer::down(float* out) {
  const PackedMatrix& any = w_.active_[0].weights->w2;
  const int64_t dim = any.n;
  const auto range_of = [&](int64_t) { return GroupRange{&any, 0, any.row_groups(), 1}; };
  cpu_.pool.run([&](int id) {
    for_own_groups(cpu_.pool, id, 1, 1, range_of, [&](int64_t, int64_t first, int64_t last) {
      const int64_t begin = first * kTileRows, width = std::min(dim, last * kTileRows) - begin;
      for (int64_t token = 0; token < tokens_; ++token) std::fill_n(out + token * dim + begin, width, 0.0f);
      for_down_tiles(id, first, last, [&](const Active& active, int64_t i, int64_t n, int64_t count, const float* y) {
        float* sum = out + token_of(active, i) * dim + n;
        for (int64_t r = 0; r < count; ++r) sum[r] += y[r];
      });
      if (options_.round)
        for (int64_t token = 0; token < tokens_; ++token) ref::round_to_bf16(out + token * dim + begin, width);
    });
    cpu_.finish();
  });
}

void MoeLayer::down_pairs(bf16* out) {
  const PackedMatrix& any = w_.active_[0].weights->w2;
  const auto range_of = [&](int64_t) { return GroupRange{&any, 0, any.row_groups(), 1}; };
  cpu_.pool.run([&](int id) {
    for_own_groups(cpu_.pool, id, 1, 1, range_of, [&](int64_t, int64_t first, int64_t last) {
      for_down_tiles(id, first, last, [&](const Active& active, int64_t i, int64_t n, int64_t count, const float* y) {
        bf16* row = out + (active.pairs.first + i) * any.n + n;
        for (int64_t r = 0; r < count; ++r) row[r] = float_to_bf16(y[r]);
      });
    });
    cpu_.finish();
  });
}

void moe(const CpuContext& cpu, std::span<const ExpertWeights> experts, const ExpertWeights* shared,
         const GemmInput& routed_x, const GemmInput& shared_x, TensorView<const int32_t, 2> ids,
         TensorView<const float, 2> weights, const MoeOptions& options, MoeWorkspace& workspace, float* out) {
  const int64_t tokens = routed_x.rows();
  if (tokens == 0) return;
  WeightTraffic::Timer timer(cpu.traffic);
  MoeLayer layer(cpu, options, workspace, tokens, ids.shape[1]);
  layer.group_by_expert(experts, shared, routed_x, shared_x, ids, weights);
  layer.expect(timer);
  layer.gate_and_up();
  layer.down(out);
}

void moe_pairs(const CpuContext& cpu, std::span<const ExpertWeights> experts, const GemmInput& x,
               TensorView<const int32_t, 2> ids, TensorView<const float, 2> weights, const MoeOptions& options,
               MoeWorkspace& workspace, bf16* out) {
  if (std::all_of(ids.data, ids.data + ids.size(), [](int32_t id) { return id < 0; })) return;
  WeightTraffic::Timer timer(cpu.traffic);
  MoeLayer layer(cpu, options, workspace, x.rows(), ids.shape[1]);
  layer.group_by_expert(experts, nullptr, x, x, ids, weights);
  layer.expect(timer);
  layer.gate_and_up();
  layer.down_pairs(out);
}

// Each worker reads what it would have if these were the step's active experts: its part of all gates and ups, then its
// rows of every down.
int stage_experts(const CpuContext& cpu, std::span<const ExpertWeights* const> experts, int64_t most_bytes,
                  const std::function<bool()>& stop) {
  std::vector<std::atomic<int64_t>> read(experts.size());
  const auto count = static_cast<int64_t>(experts.size());
  cpu.pool.run([&](int worker) {
    int64_t left = most_bytes;
    bool go_on = true;
    const auto stage = [&](int64_t expert, const PackedMatrix& w, int64_t first, int64_t last) {
      if (!go_on) return;
      const RowGroup rows = w.row_group(first);
      const int64_t tiles = (last - first) * w.group_tile_bytes(), scales = (last - first) * w.group_scale_bytes();
      go_on = prefetch_plane(rows.tiles, tiles, left, stop) && prefetch_plane(rows.scales, scales, left, stop);
      if (go_on) read[static_cast<size_t>(expert)] += last - first;
    };
    const auto gate_of = [&](int64_t i) {
      const PackedMatrix& w1 = experts[static_cast<size_t>(i)]->w1;
      return GroupRange{&w1, 0, w1.row_groups(), group_cost(w1, 1)};
    };
    for_own_groups(cpu.pool, worker, count, kMoeUnit, gate_of, [&](int64_t i, int64_t first, int64_t last) {
      stage(i, experts[static_cast<size_t>(i)]->w1, first, last);
      stage(i, experts[static_cast<size_t>(i)]->w3, first, last);
    });
    for (int64_t i = 0; i < count; ++i) {
      const PackedMatrix& w2 = experts[static_cast<size_t>(i)]->w2;
      for_own_groups(
          cpu.pool, worker, 1, 1,
          [&](int64_t) {
            return GroupRange{&w2, 0, w2.row_groups(), 1};
          },
          [&](int64_t, int64_t first, int64_t last) { stage(i, w2, first, last); });
    }
  });
  int whole = 0;
  for (size_t i = 0; i < experts.size(); ++i)
    whole += read[i] == experts[i]->w1.row_groups() + experts[i]->w3.row_groups() + experts[i]->w2.row_groups();
  return whole;
}

}  // namespace thermocline::cpu
