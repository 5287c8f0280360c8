// What an engine will take of every memory, known from the config and the headers of the weights before one is read;
// and with it how many tokens the KV cache holds within its bytes, and of how many sequences.
#pragma once

#include <memory>
#include <vector>

#include "runtime/engine/engine.h"
#include "scheduler/plan/memory_plan.h"

namespace thermocline {

struct EngineMemory {
  KvOptions kv;
  ExecOptions exec;  // no sequence is longer than what the cache holds, so no buffer is
  int64_t prefix_cache_bytes = 0;
  sched::MemoryPlan plan;
};

/// Of an engine with these options, a settled max_context among them. `host` is what the process may still take.
/// Errors: invalid_argument for kv_tokens that hold less than they should, and for a byte budget that does not hold one
/// sequence and a step, with the smallest that does; out_of_memory with the table.
Result<EngineMemory> plan_engine_memory(const EngineOptions& options, const ModelGeometry& geometry,
                                        const deepseek_v4::WeightLoader& weights, cpu::CpuContext cpu,
                                        const ExecOptions& exec,
                                        const std::vector<std::unique_ptr<gpu::Device>>& devices,
                                        const MemoryBudget& host);

}  // namespace thermocline
