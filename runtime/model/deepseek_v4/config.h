// config.json of a DeepSeek-V4 checkpoint -> ModelGeometry. Source: spec section 1.3.
#pragma once

#include <filesystem>
#include <string_view>

#include "runtime/base/result.h"
#include "runtime/model/model_geometry.h"

namespace thermocline::deepseek_v4 {

/// Reads `folder`/config.json.
/// Errors: not_found; corrupt for a missing field, one of the wrong type, a value out of range or ratios that do not
/// fit the layers; unsupported for another architecture or a variant this code does not compute. All name file and
/// field.
Result<ModelGeometry> read_config(const std::filesystem::path& folder);
Result<ModelGeometry> parse_config(std::string_view json_text);

/// The config.json of a geometry, in the published layout, for checkpoints we write ourselves.
std::string config_json(const ModelGeometry& geometry);

}  // namespace thermocline::deepseek_v4
