// What this machine can do, measured in the same process and interleaved with what it judges.
#pragma once

#include "kernels_cpu/kernel_table.h"
#include "runtime/base/timing.h"
#include "runtime/hw/memory_bandwidth.h"

namespace thermocline::cli {

struct Peaks {
  double read_bandwidth = 0;  // STREAM read, bytes/s
  double flops = 0;           // of the GEMM instruction on exact activations, all workers
  double int8_ops = 0;        // of the one on INT8 activations
  void raise(const Peaks& other);
};

class PeakMeter {
 public:
  /// Errors: out_of_memory.
  static Result<PeakMeter> create(WorkerPool& pool, const cpu::KernelTable& table);
  /// About 60 ms.
  Peaks measure();

 private:
  PeakMeter(WorkerPool& pool, const cpu::KernelTable& table, StreamRead stream)
      : pool_(&pool), table_(&table), stream_(std::move(stream)) {}
  WorkerPool* pool_;
  const cpu::KernelTable* table_;
  StreamRead stream_;
};

}  // namespace thermocline::cli
