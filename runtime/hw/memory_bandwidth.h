// The STREAM-read peak of this machine, which every speed we print is a share of.
#pragma once

#include <cstdint>
#include <string>

#include "runtime/hw/numa_buffer.h"
#include "runtime/hw/worker_pool.h"

namespace thermocline {

/// Memory that every worker of a pool reads its share of.
class StreamRead {
 public:
  /// `bytes` should be more than the last-level cache holds; 0: twice of that, and no less than 256 MiB, or half of
  /// what is free where that is less (note). Errors: out_of_memory, before any is touched where that much is not free
  /// (free_memory), and where half of it would be less than 16 MiB.
  static Result<StreamRead> create(WorkerPool& pool, uint64_t bytes = 0);
  /// The best bandwidth, in bytes per second, of `passes` passes that sum the memory. A GiB takes about 0.1 s.
  double measure(int passes = 3);
  /// Empty, or that caches may have helped: the memory is less than was wanted.
  const std::string& note() const { return note_; }

 private:
  explicit StreamRead(WorkerPool& pool) : pool_(&pool) {}
  WorkerPool* pool_;
  NumaBuffer buffer_;
  std::string note_;
  int64_t chunk_ = 0;
};

/// The peak resident size of this process so far, in bytes (VmHWM).
uint64_t peak_resident_bytes();

}  // namespace thermocline
