// How a launcher starts its kernel: as a grid on a CUDA stream, or queued for the SIMT interpreter. Launchers live in a
// namespace per backend, as every .cu is compiled once for each.
#pragma once

#include "kernels_gpu/device/simt.cuh"
#include "kernels_gpu/kernels.h"

#ifdef __CUDACC__
#include "kernels_gpu/cuda/cuda_stream.h"
#define TC_BACKEND cuda_backend
#else
#include "kernels_gpu/simt/simt_device.h"
#define TC_BACKEND simt_backend
#endif

namespace thermocline::gpu {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

/// Starts kernel(args) with `threads` a block, a multiple of 32, and `shared_bytes` for its TC_DYNAMIC_SHARED array. An
/// empty grid starts nothing.
template <class Args>
void launch(Stream& stream, const char* name, void (*kernel)(Args), const Grid& grid, int threads, const Args& args,
            size_t shared_bytes = 0) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef __CUDACC__
  cuda::CudaStream& s = static_cast<cuda::CudaStream&>(stream);
  if (!s.ok()) return;
  s.select();
  if (shared_bytes > 48 * 1024)
    s.note(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
           name);
  kernel<<<dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)), threads,
           shared_bytes, s.handle()>>>(args);
  s.note(cudaGetLastError(), name);
#else
  (void)shared_bytes;
  const simt::LaunchShape shape{
      name, {static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(grid.z)}, threads};
  static_cast<simt::SimtStream&>(stream).enqueue(shape, [kernel, args] { kernel(args); });
#endif
}

/// Threads for a row of `width` elements: about 16 a thread, whole warps, at most 256. Depends on the width alone, as
/// sums do on the number of threads.
inline int row_threads(int64_t width) {
  const int64_t warps = (width + 511) / 512;
  return static_cast<int>(warps < 1 ? 32 : warps > 8 ? 256 : warps * 32);
}

namespace TC_BACKEND {

void embed(Stream& stream, const EmbedArgs& args);
void hc_mix(Stream& stream, const HcMixArgs& args);
void hc_read(Stream& stream, const HcReadArgs& args);
void head_read(Stream& stream, const HeadReadArgs& args);
void hc_write(Stream& stream, const HcWriteArgs& args);
void linear_input(Stream& stream, const LinearInputArgs& args);
void norm_rows(Stream& stream, const NormRowsArgs& args);
void add_rows(Stream& stream, const AddRowsArgs& args);
void gemm(Stream& stream, const GemmArgs& args);
void rows(Stream& stream, const RowsArgs& args);
void queries(Stream& stream, const QueryArgs& args);
void index_queries(Stream& stream, const IndexQueryArgs& args);
void compress(Stream& stream, const CompressArgs& args);
void index_scores(Stream& stream, const IndexScoresArgs& args);
void select(Stream& stream, const SelectArgs& args);
void stage_rows(Stream& stream, const StageRowsArgs& args);
void attend(Stream& stream, const AttendArgs& args);
void attend_merge(Stream& stream, const AttendMergeArgs& args);
void route(Stream& stream, const RouteArgs& args);
void partition(Stream& stream, const PartitionArgs& args);
void publish(Stream& stream, const PublishArgs& args);
void tell(Stream& stream, const TellArgs& args);
void fetch(Stream& stream, const FetchArgs& args);
void gate_up(Stream& stream, const GateUpArgs& args);
void down(Stream& stream, const DownArgs& args);
void argmax(Stream& stream, const ArgmaxArgs& args);

}  // namespace TC_BACKEND
}  // namespace thermocline::gpu
