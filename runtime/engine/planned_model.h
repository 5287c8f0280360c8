// PlannedModel: what the planner and the simulator know of a model, by its config.json alone. Of architectures that
// this version does not compute they know as much: one file each.
#pragma once

#include <string>

#include "runtime/base/result.h"
#include "runtime/io/json_document.h"
#include "runtime/model/model_geometry.h"
#include "scheduler/cost/model_costs.h"

namespace thermocline {

struct PlannedModel {
  sched::ModelCosts costs;
  /// For the buffers of its steps: its own, or of what is not computed here a V4's with the same widths.
  ModelGeometry widths;
  std::string not_computed;  // the architecture, with what it has that V4 has not; empty: it is computed
};

/// "v4-flash", "v4-pro", "demo", "v3" and "v4.1-flash", of which the program knows the published sizes, or a folder
/// with a config.json of the same families, where no weights need to be. Errors: those of reading config.json.
Result<PlannedModel> planned_model(const std::string& name_or_folder);

namespace deepseek_v3 {
PlannedModel published();
/// Errors: corrupt, unsupported.
Result<PlannedModel> planned(const Json& config);
}  // namespace deepseek_v3

namespace deepseek_v41 {
PlannedModel published();
/// Errors: corrupt, unsupported.
Result<PlannedModel> planned(const Json& config);
}  // namespace deepseek_v41

}  // namespace thermocline
