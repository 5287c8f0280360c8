// GEMM over packed weights: activations are laid out once for the micro-kernels, then row groups are split over
// workers, those of a NUMA node over the node's own. Every output is computed by one worker over all of K, so results
// depend on neither the thread count nor the node count nor M.
#pragma once

#include <span>

#include "kernels_cpu/cpu_context.h"
#include "runtime/base/tensor_view.h"
#include "runtime/hw/numa_buffer.h"

namespace thermocline::cpu {

/// How the input of a linear is stored.
struct InputFormat {
  Activation activation = Activation::bf16;
  bool round_e4m3 = false;  // e4m3 per 128 columns first, as published inputs of FP8 and FP4 linears
  int int8_block = 32;      // columns that share a scale in INT8 activations: 32 or 128
};

/// Rows of a GemmInput that a micro-kernel takes at once: they lie together, tile by tile.
struct RowBlock {
  int64_t first = 0;
  int rows = 0;
};

/// Rows that go through the same weights.
struct RowRange {
  int64_t first = 0, count = 0;
};

/// Where one row's chunks of 32 columns lie.
struct RowChunks {
  std::byte* first = nullptr;
  int64_t stride = 0;  // bytes from one chunk of the row to its next
};

/// Activations as the micro-kernels want them: a range of rows is cut into even blocks of at most token_block rows, a
/// block is [k_tiles][rows] chunks, zero beyond K. Owned by the step's buffers; filled by prepare().
class GemmInput {
 public:
  /// Room for `max_rows` rows of `max_k` elements in any activation format. Errors: out_of_memory.
  static Result<GemmInput> allocate(int64_t max_rows, int64_t max_k);

  /// Sets the shape without filling.
  void reshape(const KernelTable& table, Activation activation, int64_t rows, int64_t k);
  Activation activation() const { return activation_; }
  int64_t rows() const { return rows_; }
  int64_t k() const { return k_; }
  int64_t row_bytes() const { return k_tiles() * chunk_bytes(activation_); }
  int64_t blocks(const RowRange& range) const { return (range.count + token_block_ - 1) / token_block_; }
  RowBlock block(const RowRange& range, int64_t i) const {
    const int64_t n = blocks(range), begin = range.count * i / n, end = range.count * (i + 1) / n;
    return {range.first + begin, static_cast<int>(end - begin)};
  }
  const std::byte* data(const RowBlock& block) const { return buffer_.data() + block.first * row_bytes(); }
  /// Row `i` of a range.
  RowChunks row(const RowRange& range, int64_t i) const {
    const int64_t n = blocks(range);
    int64_t b = i * n / range.count;
    while (range.count * (b + 1) / n <= i) ++b;
    const RowBlock block = this->block(range, b);
    const int64_t chunk = chunk_bytes(activation_);
    return {buffer_.data() + block.first * row_bytes() + (range.first + i - block.first) * chunk, block.rows * chunk};
  }

 private:
  int64_t k_tiles() const { return (k_ + kTileCols - 1) / kTileCols; }

  NumaBuffer buffer_;
  Activation activation_ = Activation::bf16;
  int token_block_ = 1;
  int64_t rows_ = 0, k_ = 0;
};

/// Writes k floats as one row in `format`; x is rounded in place where the format rounds.
void store_row(const InputFormat& format, float* x, int64_t k, const RowChunks& out);

/// Lays out x [rows, k] in `input`, rows split over the workers.
///   batches  rows i, i + batches, ... go through the same weights and become the range {i rows / batches, rows /
///   batches}
void prepare(const CpuContext& cpu, TensorView<const float, 2> x, const InputFormat& format, GemmInput& input,
             int64_t batches = 1);

/// One matrix (or some of its row groups) times some rows of a prepared input.
struct GemmJob {
  const PackedMatrix* w = nullptr;
  const GemmInput* x = nullptr;
  RowRange rows = {};
  float* y = nullptr;  // [rows.count, y_stride] f32 out; column 0 is the first row of first_group
  int64_t y_stride = 0;
  bool round = false;                    // results are rounded to bf16, as a published linear stores them
  int64_t first_group = 0, groups = -1;  // -1: all
};

/// Computes all jobs in one parallel region.
/// Traffic: the bytes of every job's row groups once, whatever the number of rows.
void gemm(const CpuContext& cpu, std::span<const GemmJob> jobs);

/// y [rows of x, n] = x w^T.
void gemm(const CpuContext& cpu, const PackedMatrix& w, const GemmInput& x, float* y, bool round);

/// The micro-kernel for a weight and an activation format. Checked: there is one.
GemmTile gemm_tile(const KernelTable& table, const PackedShape& w, Activation activation);

/// Whether `w` has a micro-kernel on INT8 activations.
inline bool takes_int8(const KernelTable& table, const PackedShape& w) {
  return table.gemm_int8[static_cast<int>(gemm_kind(w))] != nullptr;
}

/// Some row groups of a matrix, and what one of them costs.
struct GroupRange {
  const PackedMatrix* w = nullptr;
  int64_t first = 0, last = 0;
  int64_t cost = 0;
};

/// What one row group costs a worker: its bytes, or the multiplications of `rows` rows where those take longer.
inline int64_t group_cost(const PackedMatrix& w, int64_t rows) {
  return w.group_tile_bytes() + rows * w.k_tiles() * 64;
}

/// Calls fn(item, first, last) for the row groups of `count` items that are this worker's: of the slices on its own
/// node, the contiguous share by cost. `unit` neighbouring groups stay together.
template <class RangeOf, class Fn>
void for_own_groups(const WorkerPool& pool, int worker, int64_t count, int64_t unit, const RangeOf& range_of,
                    const Fn& fn) {
  const WorkerPool::Team team = pool.team(worker);
  const auto own = [&](int64_t item) {
    GroupRange range = range_of(item);
    if (range.w->nodes > 1) {
      range.first = std::max(range.first, range.w->first_group(team.node));
      range.last = std::max(range.first, std::min(range.last, range.w->first_group(team.node + 1)));
    }
    return range;
  };
  if (count == 0) return;
  const bool sliced = range_of(0).w->nodes > 1;
  const int64_t rank = sliced ? team.rank : worker, size = sliced ? team.size : pool.size();
  int64_t total = 0;
  for (int64_t item = 0; item < count; ++item) {
    const GroupRange range = own(item);
    total += (range.last - range.first + unit - 1) / unit * range.cost;
  }
  const int64_t low = total * rank / size, high = total * (rank + 1) / size;
  int64_t base = 0;
  for (int64_t item = 0; item < count; ++item) {
    // Unit u stands for the costs [base + u c, base + (u + 1) c); it goes to the worker whose share holds the first.
    const GroupRange range = own(item);
    const int64_t c = range.cost, units = (range.last - range.first + unit - 1) / unit;
    const auto unit_at = [&](int64_t bound) { return std::clamp<int64_t>((bound - base + c - 1) / c, 0, units); };
    const int64_t first = range.first + unit_at(low) * unit,
                  last = std::min(range.last, range.first + unit_at(high) * unit);
    if (first < last) fn(item, first, last);
    base += units * c;
  }
}

}  // namespace thermocline::cpu
