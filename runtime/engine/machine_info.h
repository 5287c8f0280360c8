// The machine and build a number was measured on.
#pragma once

#include "runtime/engine/engine.h"
#include "runtime/io/json_document.h"

namespace thermocline {

/// CPU, instruction sets, cores, threads, NUMA nodes, memory, GPUs; program version, build type, CUDA.
Json machine_json(const Engine& engine, int threads);
Json build_json();

/// "AMD EPYC, avx512, 2 threads, 23.4 GiB"
std::string machine_line(const Engine& engine, int threads);

}  // namespace thermocline
