// The costs of a model by its config.json alone.
#pragma once

#include "runtime/kv/kv_layout.h"
#include "scheduler/cost/model_costs.h"

namespace thermocline {

/// Of the weights in the published layout and formats, and rows as the cache keeps them.
sched::ModelCosts model_costs(const ModelGeometry& geometry, bool fp8_rows = true);

}  // namespace thermocline
