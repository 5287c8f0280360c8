// The costs of a model by its config.json alone.
#pragma once

#include "runtime/kv/kv_layout.h"
#include "scheduler/cost/model_costs.h"

namespace thermocline {

/// Parallel regions of a layer on the CPU, counted in a step: five products and attention's two, and what compressed
/// rows and an index add. Those of the experts, the streams and the rows are in what these cost.
constexpr int kLayerRegions = 7, kCompressedRegions = 2, kIndexRegions = 3;

/// Of the weights in the published layout and formats, and rows as the cache keeps them.
sched::ModelCosts model_costs(const ModelGeometry& geometry, bool fp8_rows = true);

}  // namespace thermocline
