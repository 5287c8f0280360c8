// The machine and build a number was measured on.
#pragma once

#include "runtime/engine/engine.h"
#include "runtime/io/json_document.h"

namespace thermocline {

/// What runs: the processor, the kernels chosen for it, the workers.
struct MachineInfo {
  const CpuFeatures& cpu;
  const Topology& topology;
  Isa kernels;
  int threads;
};
inline MachineInfo machine_of(Engine& engine) {
  return {engine.cpu(), engine.topology(), engine.kernels().isa, engine.pool().size()};
}

/// CPU, instruction sets, cores, threads, NUMA nodes, memory, GPUs; program version, build type, CUDA.
Json machine_json(const MachineInfo& machine);
Json build_json();

/// "AMD EPYC, avx512, 2 threads, 23.4 GiB"
std::string machine_line(const MachineInfo& machine);

}  // namespace thermocline
