// A CUDA stream as launches see it. Included by .cu files only.
#pragma once

#include <cuda_runtime.h>

#include "runtime/hw/device.h"

namespace thermocline::gpu::cuda {

class CudaStream : public Stream {
 public:
  cudaStream_t handle() const { return handle_; }
  /// Makes the stream's card the calling thread's: launches, copies and events go to the current one.
  void select() const { cudaSetDevice(device_index_); }
  bool ok() const { return fault_.empty(); }
  /// Keeps the first error.
  void note(cudaError_t error, const char* what) const {
    if (error != cudaSuccess && fault_.empty()) fault_ = std::string(what) + ": " + cudaGetErrorString(error);
  }

 protected:
  cudaStream_t handle_ = nullptr;
  int device_index_ = 0;
  mutable std::string fault_;
};

}  // namespace thermocline::gpu::cuda
