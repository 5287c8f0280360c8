// The STREAM-read peak of this machine, which every speed we print is a share of.
#pragma once

#include <cstdint>

#include "runtime/hw/numa_buffer.h"
#include "runtime/hw/worker_pool.h"

namespace thermocline {

/// Memory that every worker of a pool reads its share of.
class StreamRead {
 public:
  /// `bytes` should be more than the last-level cache holds; 0: twice of that, and no less than 256 MiB. Errors:
  /// out_of_memory, before any is touched where that much is not free (free_memory).
  static Result<StreamRead> create(WorkerPool& pool, uint64_t bytes = 0);
  /// The best bandwidth, in bytes per second, of `passes` passes that sum the memory. A GiB takes about 0.1 s.
  double measure(int passes = 3);

 private:
  explicit StreamRead(WorkerPool& pool) : pool_(&pool) {}
  WorkerPool* pool_;
  NumaBuffer buffer_;
  int64_t chunk_ = 0;
};

/// The peak resident size of this process so far, in bytes (VmHWM).
uint64_t peak_resident_bytes();

}  // namespace thermocline
