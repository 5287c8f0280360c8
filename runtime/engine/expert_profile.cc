#include "runtime/engine/expert_profile.h"

#include <cmath>

#include "runtime/io/file.h"
#include "runtime/io/json_document.h"

namespace thermocline {
namespace {

constexpr int64_t kMostLayers = 1024, kMostExperts = 1 << 15;
constexpr double kOldShare = 0.5;

Error bad(const std::string& what) { return Error{ErrorCode::corrupt, "the expert profile: " + what}; }

}  // namespace

std::string expert_profile_text(const ExpertProfile& p) {
  Json layers = Json::array();
  for (int layer = 0; layer < p.layers; ++layer) {
    Json uses = Json::array();
    for (int e = 0; e < p.experts; ++e) uses.push_back(p.uses[static_cast<size_t>(layer * p.experts + e)]);
    layers.push_back(std::move(uses));
  }
  return dump_json(Json{{"model_hash", std::to_string(p.model_hash)},
                        {"layers", p.layers},
                        {"experts", p.experts},
                        {"uses", std::move(layers)}}) +
         "\n";
}

Result<ExpertProfile> parse_expert_profile(std::string_view text) {
  TC_ASSIGN(const Json json, parse_json(text));
  if (!json.is_object()) return bad("no object");
  const auto size = [&](const char* key, int64_t most) -> Result<int> {
    const auto it = json.find(key);
    if (it == json.end() || !it->is_number_integer() || it->get<int64_t>() < 1 || it->get<int64_t>() > most)
      return bad(std::string(key) + " should be 1 to " + std::to_string(most));
    return static_cast<int>(it->get<int64_t>());
  };
  ExpertProfile p;
  TC_ASSIGN(p.layers, size("layers", kMostLayers));
  TC_ASSIGN(p.experts, size("experts", kMostExperts));
  const auto hash = json.find("model_hash");
  if (hash == json.end() || !hash->is_string()) return bad("model_hash should be a string of digits");
  const std::string& digits = hash->get_ref<const std::string&>();
  if (digits.empty() || digits.size() > 20 || digits.find_first_not_of("0123456789") != std::string::npos)
    return bad("model_hash should be a string of digits");
  p.model_hash = std::strtoull(digits.c_str(), nullptr, 10);
  const auto uses = json.find("uses");
  if (uses == json.end() || !uses->is_array() || static_cast<int>(uses->size()) != p.layers)
    return bad("uses should have " + std::to_string(p.layers) + " layers");
  for (const Json& layer : *uses) {
    if (!layer.is_array() || static_cast<int>(layer.size()) != p.experts)
      return bad("a layer should have " + std::to_string(p.experts) + " numbers");
    for (const Json& count : layer) {
      const double x = count.is_number() ? count.get<double>() : -1;
      if (!(x >= 0 && x <= 1e30)) return bad("a count should be a number, 0 or more");
      p.uses.push_back(x);
    }
  }
  return p;
}

Result<ExpertProfile> read_expert_profile(const std::filesystem::path& file, const ExpertProfile& model) {
  TC_ASSIGN(const std::string text, read_text_file(file));
  Result<ExpertProfile> profile = parse_expert_profile(text);
  if (!profile) return std::move(profile).error().with(file.string());
  if ((profile->model_hash != model.model_hash && profile->model_hash != 0) || profile->layers != model.layers ||
      profile->experts != model.experts)
    return invalid(file.string() + " is of another model (" + std::to_string(profile->layers) + " layers of " +
                   std::to_string(profile->experts) + " experts): give --expert-profile a file of its own");
  return profile;
}

Status save_expert_profile(const std::filesystem::path& file, const ExpertProfile& run) {
  ExpertProfile sum = run;
  if (const Result<ExpertProfile> old = read_expert_profile(file, run))
    for (size_t i = 0; i < sum.uses.size(); ++i) sum.uses[i] += kOldShare * old->uses[i];
  return write_text_file(file, expert_profile_text(sum));
}

}  // namespace thermocline
