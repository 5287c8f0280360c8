// GEMV and small GEMM over packed weights at V4-Flash shapes: GB/s of weights and share of the STREAM-read peak, which
// is measured in the same process right before each row.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstring>

#include "kernels_cpu/gemm.h"
#include "runtime/hw/memory_bandwidth.h"

namespace thermocline::cpu {
namespace {

constexpr uint64_t kRotation = uint64_t{1} << 30;  // copies of the weight, more than any last-level cache holds

PackedMatrix shape_of(GemmKind kind, int64_t n, int64_t k) {
  PackedMatrix m;
  m.n = n;
  m.k = k;
  m.format = kind == GemmKind::mxfp4_e8m0 ? WeightFormat::mxfp4
             : kind == GemmKind::fp8_f32  ? WeightFormat::fp8
                                          : WeightFormat::bf16;
  m.scale = kind == GemmKind::mxfp4_e8m0 ? ScaleFormat::e8m0_rows
            : kind == GemmKind::fp8_f32  ? ScaleFormat::f32_blocks
                                         : ScaleFormat::none;
  m.scale_tiles = kind == GemmKind::fp8_f32 ? 4 : 1;
  return m;
}

void gemm_bench(benchmark::State& state, GemmKind kind, int64_t n, int64_t k) {
  WorkerPool pool(read_topology().value());
  const KernelTable table = make_kernel_table(detect_cpu_features());
  const CpuContext cpu{pool, table};
  const int64_t tokens = state.range(0);
  PackedMatrix w = shape_of(kind, n, k);
  const uint64_t bytes = static_cast<uint64_t>(w.bytes() + 63) / 64 * 64,
                 copies = std::max<uint64_t>(1, kRotation / bytes);
  const NumaBuffer weights = NumaBuffer::allocate(bytes * copies).value();
  std::memset(weights.data(), 0x35, weights.size());  // a finite value in every format
  GemmInput input = GemmInput::allocate(tokens, k).value();
  const std::vector<float> x(static_cast<size_t>(tokens * k), 0.5f);
  std::vector<float> y(static_cast<size_t>(tokens * n));
  prepare(cpu, TensorView<const float, 2>(x.data(), {tokens, k}), {table.activation, true}, input);
  const double peak = StreamRead::create(pool, kRotation)->measure();
  uint64_t copy = 0;
  const WorkerPool::StepScope scope(pool);
  for (auto _ : state) {
    w.tiles = reinterpret_cast<const uint8_t*>(weights.data() + copy * bytes);
    w.scales = w.tiles + w.tile_plane_bytes();
    gemm(cpu, w, input, y.data(), true);
    copy = (copy + 1) % copies;
  }
  const double total = static_cast<double>(w.bytes()) * static_cast<double>(state.iterations());
  state.counters["GB/s"] = benchmark::Counter(total / 1e9, benchmark::Counter::kIsRate);
  state.counters["of STREAM"] = benchmark::Counter(total / peak, benchmark::Counter::kIsRate);
  state.counters["GFLOP/s"] =
      benchmark::Counter(2e-9 * static_cast<double>(n * k * tokens) * static_cast<double>(state.iterations()),
                         benchmark::Counter::kIsRate);
}

BENCHMARK_CAPTURE(gemm_bench, expert_w1_mxfp4_2048x4096, GemmKind::mxfp4_e8m0, 2048, 4096)
    ->Arg(1)
    ->Arg(2)
    ->Arg(4)
    ->Arg(8)
    ->Arg(12)
    ->Arg(16)
    ->Arg(128)
    ->UseRealTime();
BENCHMARK_CAPTURE(gemm_bench, wq_b_fp8_32768x1024, GemmKind::fp8_f32, 32768, 1024)
    ->Arg(1)
    ->Arg(8)
    ->Arg(128)
    ->UseRealTime();
BENCHMARK_CAPTURE(gemm_bench, head_bf16_129280x4096, GemmKind::bf16, 129280, 4096)->Arg(1)->Arg(8)->UseRealTime();

}  // namespace
}  // namespace thermocline::cpu
