#include "kernels_cpu/gemm.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels_cpu/ref/ops.h"
#include "runtime/base/number_formats.h"

namespace thermocline::cpu {
namespace {

constexpr int64_t kActivationBlock = 128;  // spec 5.2: linear inputs are rounded per 128 channels

}  // namespace

Result<GemmInput> GemmInput::allocate(int64_t max_rows, int64_t max_k) {
  GemmInput input;
  const int64_t chunks = max_rows * ((max_k + kTileCols - 1) / kTileCols);
  TC_ASSIGN(input.buffer_, NumaBuffer::allocate(static_cast<uint64_t>(chunks * chunk_bytes(Activation::f32))));
  return input;
}

void GemmInput::reshape(const KernelTable& table, Activation activation, int64_t rows, int64_t k) {
  activation_ = activation;
  token_block_ = table.token_block;
  rows_ = rows;
  k_ = k;
  TC_CHECK(static_cast<uint64_t>(rows * row_bytes()) <= buffer_.size());
}

namespace {

// The nearest integers to x / scale, scale = max |x| / 127, in the chunk order of Int8Chunk.
void store_int8(const float* x, int64_t k, int64_t block, const RowChunks& out) {
  constexpr int kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  for (int64_t begin = 0; begin < k; begin += block) {
    const int64_t end = std::min(k, begin + block);
    float amax = 0;
    for (int64_t i = begin; i < end; ++i) amax = std::max(amax, std::fabs(x[i]));
    const float scale = amax / 127, inverse = amax > 0 ? 127 / amax : 0;
    for (int64_t tile = begin / kTileCols; tile * kTileCols < end; ++tile) {
      float padded[kTileCols] = {};
      std::copy(x + tile * kTileCols, x + std::min(end, (tile + 1) * kTileCols), padded);
      Int8Chunk& chunk = *reinterpret_cast<Int8Chunk*>(out.first + tile * out.stride);
      int8_t codes[kTileCols];
      int32_t sum = 0;
      for (int64_t i = 0; i < kTileCols; ++i) {
        // Adding 1.5 x 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
        const float shifted = padded[i] * inverse + 0x1.8p23f;
        const int32_t code = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(0x1.8p23f);
        codes[i] = static_cast<int8_t>(std::clamp(code, -127, 127));
        sum += codes[i];
      }
      for (int64_t i = 0; i < kTileCols; ++i) chunk.codes[i] = codes[i / 8 * 8 + kOrder[i % 8]];
      chunk.scale = scale;
      chunk.sum = sum;
    }
  }
}

}  // namespace

void store_row(const InputFormat& format, float* x, int64_t k, const RowChunks& out) {
  if (format.round_e4m3) ref::fake_fp8(x, k, kActivationBlock);
  if (format.activation == Activation::int8) return store_int8(x, k, format.int8_block, out);
  for (int64_t begin = 0, tile = 0; begin < k; begin += kTileCols, ++tile) {
    const int64_t count = std::min(kTileCols, k - begin);
    std::byte* chunk = out.first + tile * out.stride;
    if (format.activation == Activation::bf16) {
      bf16* to = reinterpret_cast<bf16*>(chunk);
      for (int64_t i = 0; i < count; ++i) to[i] = float_to_bf16(x[begin + i]);
      std::fill(to + count, to + kTileCols, bf16{0});
    } else {
      float* to = reinterpret_cast<float*>(chunk);
      if (format.activation == Activation::wide_bf16)
        for (int64_t i = 0; i < count; ++i) to[i] = bf16_to_float(float_to_bf16(x[begin + i]));
      else
        std::copy_n(x + begin, count, to);
      std::fill(to + count, to + kTileCols, 0.0f);
    }
  }
}

void prepare(const CpuContext& cpu, TensorView<const float, 2> x, const InputFormat& format, GemmInput& input,
             int64_t batches) {
  const int64_t rows = x.shape[0], k = x.shape[1], per_batch = rows / batches;
  TC_CHECK_EQ(per_batch * batches, rows);
  input.reshape(cpu.table, format.activation, rows, k);
  cpu.pool.split(rows, [&](int64_t begin, int64_t end, int) {
    constexpr int64_t kPiece = 512;  // whole blocks of every format; a piece is rounded on the stack
    float piece[kPiece];
    for (int64_t i = begin; i < end; ++i) {
      const RowRange range{i % batches * per_batch, per_batch};
      const RowChunks chunks = input.row(range, i / batches);
      for (int64_t at = 0; at < k; at += kPiece) {
        const int64_t count = std::min(kPiece, k - at);
        std::copy_n(x.row(i) + at, count, piece);
        store_row(format, piece, count, {chunks.first + at / kTileCols * chunks.stride, chunks.stride});
      }
    }
  });
}

GemmTile gemm_tile(const KernelTable& table, const PackedShape& w, Activation activation) {
  const int kind = static_cast<int>(gemm_kind(w));
  TC_CHECK(activation == Activation::int8 || activation == table.activation);
  const GemmTile tile = activation == Activation::int8 ? table.gemm_int8[kind] : table.gemm[kind];
  TC_CHECK(tile != nullptr);
  return tile;
}

namespace {

// Row groups [first, last) of one job. A group comes from memory once and stays in cache while all rows pass; decoding
// it again for every block costs less than a decoded copy of four times the bytes.
void run_job(const KernelTable& table, const GemmJob& job, int64_t first, int64_t last) {
  const PackedMatrix& w = *job.w;
  const GemmInput& x = *job.x;
  const int64_t blocks = x.blocks(job.rows);
  const GemmTile tile = gemm_tile(table, w, x.activation());
  alignas(64) float out[kMaxTokenBlock * kTileRows];
  for (int64_t group = first; group < last; ++group) {
    const RowGroup rows = w.row_group(group);
    const int64_t width = std::min(kTileRows, w.n - group * kTileRows);
    for (int64_t b = 0; b < blocks; ++b) {
      const RowBlock block = x.block(job.rows, b);
      tile(rows, x.data(block), block.rows, out);
      if (job.round) ref::round_to_bf16(out, block.rows * kTileRows);
      float* y = job.y + (block.first - job.rows.first) * job.y_stride + (group - job.first_group) * kTileRows;
      for (int i = 0; i < block.rows; ++i) std::copy_n(out + i * kTileRows, width, y + i * job.y_stride);
    }
  }
}

}  // namespace

void gemm(const CpuContext& cpu, std::span<const GemmJob> jobs) {
  WeightTraffic::Timer timer(cpu.traffic);
  const auto groups_of = [](const GemmJob& job) { return job.groups < 0 ? job.w->row_groups() : job.groups; };
  for (const GemmJob& job : jobs) {
    TC_CHECK_EQ(job.w->k, job.x->k());
    cpu.expect(timer, *job.w, groups_of(job));
  }
  const auto range_of = [&](int64_t i) {
    const GemmJob& job = jobs[static_cast<size_t>(i)];
    return GroupRange{job.w, job.first_group, job.first_group + groups_of(job), group_cost(*job.w, job.rows.count)};
  };
  cpu.pool.run([&](int worker) {
    for_own_groups(cpu.pool, worker, static_cast<int64_t>(jobs.size()), 1, range_of,
                   [&](int64_t i, int64_t first, int64_t last) {
                     const GemmJob& job = jobs[static_cast<size_t>(i)];
                     run_job(cpu.table, job, first, last);
                     cpu.count(worker, *job.w, first, last - first);
                   });
    cpu.finish();
  });
}

void gemm(const CpuContext& cpu, const PackedMatrix& w, const GemmInput& x, float* y, bool round) {
  const GemmJob job{.w = &w, .x = &x, .rows = {0, x.rows()}, .y = y, .y_stride = w.n, .round = round};
  gemm(cpu, std::span(&job, 1));
}

}  // namespace thermocline::cpu
