// GEMM over packed tiles. One kernel for every M: a warp owns one row group (two for many rows) over all of K, so a
// token's sums are the same alone and in a batch.
#include "kernels_gpu/device/tiles.cuh"
#include "kernels_gpu/launch.h"

namespace thermocline::gpu {
namespace {
using namespace dev;

constexpr int kWarps = 4;

/// Few rows: one row group a warp, a deep ring, as there are few warps. Many: two, to use an x fragment twice.
template <int kFrags>
inline constexpr int kGroups = kFrags == 8 ? 2 : 1;
template <int kFrags>
inline constexpr int kDepth = kFrags == 8 ? 4 : 8;

template <WeightFormat format, ScaleFormat scale, int kFrags>
TC_KERNEL(kWarps * 32, kFrags == 8 ? 2 : 3)
gemm_kernel(const GemmArgs args) {
  constexpr int kPerWarp = kGroups<kFrags>;
  TC_DYNAMIC_SHARED(uint8_t, ring, kWarps * ring_bytes(kPerWarp, kDepth<kFrags>));
  int64_t unit = static_cast<int64_t>(block_x()) * kWarps + warp();
  int j = 0;
  const auto units = [&](int i) { return (args.jobs[i].groups + kPerWarp - 1) / kPerWarp; };
  const auto padded = [&](int i) { return (units(i) + kWarps - 1) / kWarps * kWarps; };
  while (j + 1 < args.num_jobs && unit >= padded(j)) unit -= padded(j++);
  const GemmJob& job = args.jobs[j];
  const int64_t first_row = static_cast<int64_t>(block_y()) * 8 * kFrags;
  if (unit >= units(j) || first_row >= job.rows) return;  // no barrier of the block follows
  const int g = lane() / 4, c = lane() % 4;
  TileSource source[kPerWarp];
  for (int i = 0; i < kPerWarp; ++i)  // an odd last group is computed twice
    source[i] = row_group(job.w, job.first_group + min_of(unit * kPerWarp + i, job.groups - 1));
  int64_t x_at[kFrags];
  for (int f = 0; f < kFrags; ++f) {
    const int64_t row = first_row + 8 * f + g;
    x_at[f] = row < job.rows ? row * job.x_stride : -1;
  }
  const DeviceView<const bf16, 1> x{job.x, {(job.rows - 1) * job.x_stride + job.w.k}};
  float sums[kPerWarp][kFrags][4] = {};
  warp_gemm<format, scale, kPerWarp, kFrags, kDepth<kFrags>>(source, static_cast<int>(job.w.k_tiles()),
                                                             static_cast<int>(job.w.scale_tiles), x, x_at, ring,
                                                             warp() * ring_bytes(kPerWarp, kDepth<kFrags>), sums);
  const DeviceView<float, 1> y{job.y, {(job.rows - 1) * job.y_stride + min_of(job.groups * 16, job.w.n)}};
  for (int i = 0; i < kPerWarp && unit * kPerWarp + i < job.groups; ++i)
    for (int f = 0; f < kFrags; ++f)
      for (int e = 0; e < 4; ++e) {
        const int64_t row = first_row + 8 * f + 2 * c + e % 2, n = (unit * kPerWarp + i) * 16 + g + e / 2 * 8;
        if (row < job.rows && job.first_group * 16 + n < job.w.n)
          y[row * job.y_stride + n] = job.round ? to_bf16(sums[i][f][e]) : sums[i][f][e];
      }
}

template <WeightFormat format, ScaleFormat scale, int kFrags>
void start(Stream& stream, const GemmArgs& args, const char* name, int64_t rows) {
  int64_t blocks = 0;
  for (int i = 0; i < args.num_jobs; ++i) {
    const int64_t units = (args.jobs[i].groups + kGroups<kFrags> - 1) / kGroups<kFrags>;
    blocks += (units + kWarps - 1) / kWarps;
  }
  launch(stream, name, gemm_kernel<format, scale, kFrags>, {blocks, (rows + 8 * kFrags - 1) / (8 * kFrags)},
         kWarps * 32, args, kWarps * ring_bytes(kGroups<kFrags>, kDepth<kFrags>));
}

template <WeightFormat format, ScaleFormat scale>
void start(Stream& stream, const GemmArgs& args, const char* name) {
  int64_t rows = 0;
  for (int i = 0; i < args.num_jobs; ++i) rows = args.jobs[i].rows > rows ? args.jobs[i].rows : rows;
  if (rows <= 8)
    start<format, scale, 1>(stream, args, name, rows);
  else if (rows <= 16)
    start<format, scale, 2>(stream, args, name, rows);
  else
    start<format, scale, 8>(stream, args, name, rows);
}

}  // namespace

void TC_BACKEND::gemm(Stream& stream, const GemmArgs& args) {
  if (args.num_jobs == 0) return;
  const DeviceMatrix& w = args.jobs[0].w;
  for (int i = 0; i < args.num_jobs; ++i) {
    TC_CHECK(args.jobs[i].w.format == w.format && args.jobs[i].w.scale == w.scale);
    TC_CHECK(args.jobs[i].w.k % 32 == 0 && args.jobs[i].x_stride % 8 == 0);
  }
  if (w.format == WeightFormat::bf16) return start<WeightFormat::bf16, ScaleFormat::none>(stream, args, "gemm_bf16");
  if (w.format == WeightFormat::fp8) return start<WeightFormat::fp8, ScaleFormat::f32_blocks>(stream, args, "gemm_fp8");
  TC_CHECK(w.format == WeightFormat::mxfp4);
  if (w.scale == ScaleFormat::e8m0_rows)
    return start<WeightFormat::mxfp4, ScaleFormat::e8m0_rows>(stream, args, "gemm_mxfp4");
  start<WeightFormat::mxfp4, ScaleFormat::f32_rows>(stream, args, "gemm_mxfp4_f32");
}

}  // namespace thermocline::gpu
