// The portable layer under every kernel: indices, barriers, warp collectives, atomics, async copies, tensor-core MMAs,
// shared arrays. nvcc maps it to instructions; the host compiler to the SIMT interpreter (kernels_gpu/simt). A kernel
// includes this and device_view.h, and no CUDA header.
//
// Rules that keep a kernel portable: blocks are a multiple of 32 threads; every lane of a mask reaches a collective;
// no thread returns before a barrier another one reaches; shared arrays are declared at the top of the kernel, before
// any branch; shared and device memory is read and written through (), [], load and store, never through a raw pointer.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include "kernels_gpu/device/simt_cuda.cuh"
#else
#include "kernels_gpu/device/simt_host.h"
#endif

namespace thermocline::gpu::dev {

inline constexpr uint32_t kFullMask = 0xffffffffu;

/// Sum over the warp in a fixed order (a butterfly): every lane gets it.
TC_DEVICE float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += shuffle_xor(kFullMask, x, offset);
  return x;
}
TC_DEVICE float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = max_of(x, shuffle_xor(kFullMask, x, offset));
  return x;
}
TC_DEVICE int warp_sum(int x) {
  for (int offset = 16; offset > 0; offset /= 2) x += shuffle_xor(kFullMask, x, offset);
  return x;
}

/// Sum over the block: warps by butterfly, then the warps' sums in order. `scratch` holds 33 floats; every thread gets
/// the sum. The order depends on the block size only.
template <class Shared>
TC_DEVICE float block_sum(float x, Shared& scratch) {
  x = warp_sum(x);
  if (lane() == 0) scratch[warp()] = x;
  block_sync();
  if (thread() == 0) {
    float sum = 0;
    for (int w = 0; w < block_threads() / 32; ++w) sum += static_cast<float>(scratch[w]);
    scratch[32] = sum;
  }
  block_sync();
  const float sum = scratch[32];
  block_sync();
  return sum;
}

}  // namespace thermocline::gpu::dev
