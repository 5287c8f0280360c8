#include "kernels_cpu/gemm.h"

#include <algorithm>
#include <cstring>

#include "kernels_cpu/ref/ops.h"
#include "runtime/base/number_formats.h"

namespace thermocline::cpu {
namespace {

constexpr int64_t kActivationBlock = 128;  // spec 5.2: linear inputs are rounded per 128 channels

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

Result<GemmInput> GemmInput::allocate(int64_t max_rows, int64_t max_k) {
  GemmInput input;
  TC_ASSIGN(input.buffer_, NumaBuffer::allocate(static_cast<uint64_t>(max_rows * round_up(max_k, kTileCols) * 4)));
  return input;
}

void GemmInput::reshape(const KernelTable& table, int64_t rows, int64_t k) {
  rows_ = rows;
  k_ = k;
  row_bytes_ = round_up(k, kTileCols) * (table.bf16_inputs ? 2 : 4);
  TC_CHECK(static_cast<uint64_t>(rows * row_bytes_) <= buffer_.size());
}

void prepare_row(const KernelTable& table, const float* x, int64_t k, bool quantise, float* scratch, std::byte* row) {
  const float* values = x;
  if (quantise) {
    std::copy_n(x, k, scratch);
    ref::fake_fp8(scratch, k, kActivationBlock);
    values = scratch;
  }
  const int64_t padded = round_up(k, kTileCols);
  if (table.bf16_inputs) {
    bf16* out = reinterpret_cast<bf16*>(row);
    for (int64_t i = 0; i < k; ++i) out[i] = float_to_bf16(values[i]);
    std::fill(out + k, out + padded, bf16{0});
  } else {
    float* out = reinterpret_cast<float*>(row);
    std::copy_n(values, k, out);
    std::fill(out + k, out + padded, 0.0f);
  }
}

void prepare(const CpuContext& cpu, TensorView<const float, 2> x, bool quantise, const GemmScratch& scratch,
             GemmInput& input) {
  const int64_t rows = x.shape[0], k = x.shape[1];
  input.reshape(cpu.table, rows, k);
  cpu.pool.split(rows, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t i = begin; i < end; ++i)
      prepare_row(cpu.table, x.row(i), k, quantise, scratch.row(worker), input.row(i));
  });
}

Result<GemmScratch> GemmScratch::allocate(int workers, int64_t max_rows, int64_t max_k) {
  GemmScratch scratch;
  scratch.tile_offset_ = round_up(max_k, kTileCols) / kTileCols * 1024;
  scratch.row_offset_ = scratch.tile_offset_ + 2 * max_rows * kTileRows * 4;
  scratch.stride_ = round_up(scratch.row_offset_ + max_k * 4, 4096);
  TC_ASSIGN(scratch.buffer_, NumaBuffer::allocate(static_cast<uint64_t>(workers * scratch.stride_)));
  return scratch;
}

void gemm_row_group(const KernelTable& table, const PackedMatrix& w, int64_t group, const std::byte* x,
                    int64_t row_bytes, int64_t count, uint8_t* expanded, float* y) {
  const int kind = static_cast<int>(gemm_kind(w));
  const int64_t x_stride = row_bytes / (table.bf16_inputs ? 2 : 4);
  RowGroup rows = w.row_group(group);
  GemmTile tile = table.gemm[kind];
  if (count > table.max_tokens && table.expand[kind]) {
    table.expand[kind](rows.tiles, rows.k_tiles, expanded);
    rows.tiles = expanded;
    tile = table.gemm_expanded[kind];
  }
  for (int64_t i = 0; i < count; i += table.max_tokens) {
    const int m = static_cast<int>(std::min<int64_t>(table.max_tokens, count - i));
    tile(rows, x + i * row_bytes, x_stride, m, y + i * kTileRows);
  }
}

void gemm(const CpuContext& cpu, const PackedMatrix& w, const GemmInput& x, const GemmScratch& scratch, float* y,
          int64_t y_stride, bool round, int64_t first, int64_t step) {
  TC_CHECK_EQ(w.k, x.k());
  const int64_t count = (x.rows() - first + step - 1) / step;
  cpu.pool.split(w.row_groups(), [&](int64_t begin, int64_t end, int worker) {
    float* tile = scratch.tile(worker);
    for (int64_t group = begin; group < end; ++group) {
      gemm_row_group(cpu.table, w, group, x.row(first), step * x.row_bytes(), count, scratch.expanded(worker), tile);
      const int64_t n = group * kTileRows, width = std::min(kTileRows, w.n - n);
      if (round) ref::round_to_bf16(tile, count * kTileRows);
      for (int64_t i = 0; i < count; ++i) std::copy_n(tile + i * kTileRows, width, y + i * y_stride + n);
    }
  });
}

}  // namespace thermocline::cpu
