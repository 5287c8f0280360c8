// The table of a backend: its launchers.
#include "kernels_gpu/launch.h"

namespace thermocline::gpu {

#ifdef __CUDACC__
const KernelTable& cuda_kernels() {
#else
const KernelTable& simt_kernels() {
#endif
  using namespace TC_BACKEND;
  static const KernelTable table = {
      embed, hc_mix,    hc_read,       head_read, hc_write,     linear_input, norm_rows,  add_rows, gemm,
      rows,  queries,   index_queries, compress,  index_scores, select,       stage_rows, attend,   attend_merge,
      route, partition, publish,       tell,      fetch,        gate_up,      down,       argmax};
  return table;
}

}  // namespace thermocline::gpu
