// What the planner wants to know of a model beside its costs, by its config.json alone.
#pragma once

#include <vector>

#include "runtime/model/model_geometry.h"
#include "scheduler/plan/box_plan.h"

namespace thermocline {

/// Buffers of steps of 512, 2,048 and 8,192 tokens, no longer than the context and no shorter than the batch.
///   threads  workers of the CPU
///   device   attention runs on one: buffers are there and, by estimate, what its misses need on the host
std::vector<sched::ChunkBuffers> chunk_buffers(const ModelGeometry& geometry, int64_t context, int batch, int threads,
                                               bool device);

}  // namespace thermocline
