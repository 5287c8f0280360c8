#include "runtime/engine/planned_model.h"

#include "runtime/engine/model_costs.h"
#include "runtime/io/file.h"
#include "runtime/model/deepseek_v4/config.h"
#include "runtime/model/deepseek_v4/synthesize.h"

namespace thermocline {
namespace {

using PlannedBy = Result<PlannedModel> (*)(const Json&);

// Who knows an architecture that is not computed here, by a config.json's model_type; null: nobody.
PlannedBy planned_by(const Json& config) {
  if (!config.is_object() || !config.contains("model_type")) return nullptr;
  if (config["model_type"] == "deepseek_v3") return deepseek_v3::planned;
  if (config["model_type"] == "deepseek_v41") return deepseek_v41::planned;
  return nullptr;
}

Result<PlannedModel> planned_v4(Result<ModelGeometry> geometry) {
  if (!geometry) return std::move(geometry).error();
  return PlannedModel{model_costs(*geometry), *geometry, ""};
}

Result<PlannedModel> planned_folder(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "config.json";
  TC_ASSIGN(const std::string text, read_text_file(path, 16 << 20));
  const Result<Json> json = parse_json(text, true);
  const PlannedBy planned = json ? planned_by(*json) : nullptr;
  if (!planned) return planned_v4(deepseek_v4::read_config(folder));
  Result<PlannedModel> model = planned(*json);
  if (!model) return std::move(model).error().with(path.string());
  return model;
}

}  // namespace

Result<PlannedModel> planned_model(const std::string& name) {
  if (name == "v4-flash" || name == "v4-pro" || name == "demo")
    return planned_v4(deepseek_v4::published_geometry(name, 0));
  if (name == "v3") return deepseek_v3::published();
  if (name == "v4.1-flash") return deepseek_v41::published();
  return planned_folder(name);
}

}  // namespace thermocline
