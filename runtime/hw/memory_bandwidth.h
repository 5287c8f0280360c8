// The STREAM-read peak of this machine, which every speed we print is a share of.
#pragma once

#include <cstdint>

#include "runtime/hw/worker_pool.h"

namespace thermocline {

/// The best bandwidth, in bytes per second, of `rounds` passes in which every worker of the pool sums its share of
/// `bytes` of memory (more than the last-level cache, so it comes from RAM). Takes about 0.1 s a GiB and round.
/// Errors: out_of_memory.
Result<double> measure_read_bandwidth(WorkerPool& pool, uint64_t bytes = uint64_t{512} << 20, int rounds = 5);

/// The peak resident size of this process so far, in bytes (VmHWM).
uint64_t peak_resident_bytes();

}  // namespace thermocline
