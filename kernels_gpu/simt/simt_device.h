// A device made of host threads: kernels run on the SIMT interpreter, blocks in parallel over workers; every stream is
// an ordered queue with a thread of its own; device memory is an arena with a capacity. Copies and the accesses of
// checked kernels are held to the order that events and synchronisation really give (AccessLog).
#pragma once

#include <functional>

#include "kernels_gpu/simt/interpreter.h"
#include "runtime/hw/device.h"

namespace thermocline::gpu::simt {

struct SimtOptions {
  size_t memory_bytes = size_t{4} << 30;
  size_t pinned_bytes = size_t{4} << 30;
  int workers = 0;           // threads that run blocks; 0: one per hardware thread
  double copy_gb_per_s = 0;  // modelled bandwidth of h2d and d2h copies; 0: as fast as memcpy
};

/// Errors: out_of_memory (address space).
Result<std::unique_ptr<Device>> make_device(const SimtOptions& options, int index = 0);

/// A stream of such a device; what launches use.
class SimtStream : public Stream {
 public:
  /// Queues a kernel; body() is called once per thread.
  virtual void enqueue(const LaunchShape& shape, std::function<void()> body) = 0;
};

}  // namespace thermocline::gpu::simt
