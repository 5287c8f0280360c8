// GEMM over packed weights: activations are laid out once for the micro-kernels, then row groups are split over
// workers. Every output is computed by one worker over all of K, so results depend on neither the thread count nor on
// M.
#pragma once

#include "kernels_cpu/cpu_context.h"
#include "runtime/base/tensor_view.h"
#include "runtime/hw/numa_buffer.h"

namespace thermocline::cpu {

/// Activations as the micro-kernels want them: bf16 or f32 rows, zero-padded to whole tiles. Owned by the step's
/// buffers; filled by prepare().
class GemmInput {
 public:
  /// Room for `max_rows` rows of `max_k` elements. Errors: out_of_memory.
  static Result<GemmInput> allocate(int64_t max_rows, int64_t max_k);

  const std::byte* row(int64_t i) const { return buffer_.data() + i * row_bytes_; }
  std::byte* row(int64_t i) { return buffer_.data() + i * row_bytes_; }
  int64_t rows() const { return rows_; }
  int64_t k() const { return k_; }
  int64_t row_bytes() const { return row_bytes_; }
  /// Sets the shape without filling. Element size by the table, rows padded to whole tiles.
  void reshape(const KernelTable& table, int64_t rows, int64_t k);

 private:
  NumaBuffer buffer_;
  int64_t rows_ = 0, k_ = 0, row_bytes_ = 0;
};

/// Writes one row of k floats into a prepared row of `input`. quantise rounds a copy as the input of an FP8 or FP4
/// linear first: e4m3 per 128 elements. `scratch` holds k floats.
void prepare_row(const KernelTable& table, const float* x, int64_t k, bool quantise, float* scratch, std::byte* row);

/// Row groups [group, group + 1) of w against `count` rows of x; y [count, 16]. Picks direct or expanded micro-kernels.
///   expanded  k_tiles * 1024 bytes of scratch for this worker
void gemm_row_group(const KernelTable& table, const PackedMatrix& w, int64_t group, const std::byte* x,
                    int64_t row_bytes, int64_t count, uint8_t* expanded, float* y);

/// Per-worker scratch of the GEMM drivers: expanded tiles of one row group, two output tiles, one activation row.
class GemmScratch {
 public:
  /// For inputs of up to max_rows rows of max_k elements. Errors: out_of_memory.
  static Result<GemmScratch> allocate(int workers, int64_t max_rows, int64_t max_k);
  uint8_t* expanded(int worker) const { return reinterpret_cast<uint8_t*>(buffer_.data()) + worker * stride_; }
  float* tile(int worker) const { return reinterpret_cast<float*>(buffer_.data() + worker * stride_ + tile_offset_); }
  float* row(int worker) const { return reinterpret_cast<float*>(buffer_.data() + worker * stride_ + row_offset_); }

 private:
  NumaBuffer buffer_;
  int64_t stride_ = 0, tile_offset_ = 0, row_offset_ = 0;
};

/// Lays out x [rows, k] in `input`, rows split over the workers.
void prepare(const CpuContext& cpu, TensorView<const float, 2> x, bool quantise, const GemmScratch& scratch,
             GemmInput& input);

/// y[row, n] = sum_k w[n, k] x[row, k] for rows first, first + step, ... of the prepared input.
///   y      [count, y_stride]  f32 out, row i from input row first + i * step
///   round  results are rounded to bf16, as a published linear stores them
/// Traffic: w.bytes() once per max_tokens rows (once in all where tiles are expanded).
void gemm(const CpuContext& cpu, const PackedMatrix& w, const GemmInput& x, const GemmScratch& scratch, float* y,
          int64_t y_stride, bool round, int64_t first = 0, int64_t step = 1);

}  // namespace thermocline::cpu
