// CpuContext: what a kernel family's driver works with. The pool computes, the table holds the micro-kernels.
#pragma once

#include "kernels_cpu/kernel_table.h"
#include "runtime/hw/worker_pool.h"

namespace thermocline::cpu {

struct CpuContext {
  WorkerPool& pool;
  const KernelTable& table;
};

}  // namespace thermocline::cpu
