#include "runtime/server/request_fields.h"

#include <cmath>

#include "runtime/io/file.h"

namespace thermocline::server {

Error field_error(const std::string& field, const std::string& what) {
  return {ErrorCode::invalid_argument, field + " " + what, field};
}

Result<double> Fields::number(const char* name, double fallback) const {
  const Json* value = find(name);
  if (!value) return fallback;
  if (!value->is_number() || !std::isfinite(value->get<double>())) return field_error(name, "should be a number");
  return value->get<double>();
}

Result<int64_t> Fields::integer(const char* name, int64_t fallback, int64_t low, int64_t high) const {
  const Json* value = find(name);
  if (!value) return fallback;
  const bool fits = value->is_number_integer() && (!value->is_number_unsigned() || value->get<uint64_t>() <= INT64_MAX);
  if (!fits || value->get<int64_t>() < low || value->get<int64_t>() > high)
    return field_error(name, "should be an integer from " + std::to_string(low) + " to " + std::to_string(high));
  return value->get<int64_t>();
}

Result<bool> Fields::boolean(const char* name, bool fallback) const {
  const Json* value = find(name);
  if (!value) return fallback;
  if (!value->is_boolean()) return field_error(name, "should be true or false");
  return value->get<bool>();
}

Result<std::string> Fields::text(const char* name, const std::string& fallback) const {
  const Json* value = find(name);
  if (!value) return fallback;
  if (!value->is_string()) return field_error(name, "should be a string");
  return value->get<std::string>();
}

Result<std::vector<std::string>> Fields::stops() const {
  const Json* value = find("stop");
  if (!value) return std::vector<std::string>();
  const Json list = value->is_string() ? Json::array({*value}) : *value;
  if (!list.is_array() || list.size() > 16) return field_error("stop", "should be a string or a list of at most 16");
  std::vector<std::string> stops;
  for (size_t i = 0; i < list.size(); ++i) {
    if (!list[i].is_string() || list[i].get<std::string>().empty())
      return field_error("stop[" + std::to_string(i) + "]", "should be a string that is not empty");
    stops.push_back(list[i].get<std::string>());
  }
  return stops;
}

Result<GenerationRequest> read_generation_fields(const Fields& fields, const SamplingParams& defaults) {
  GenerationRequest request;
  SamplingParams& s = request.sampling;
  s = defaults;
  TC_ASSIGN(s.temperature, fields.number("temperature", s.temperature));
  TC_ASSIGN(s.top_p, fields.number("top_p", s.top_p));
  TC_ASSIGN(s.top_k, fields.integer("top_k", s.top_k, -1, 1'000'000'000));
  TC_ASSIGN(s.min_p, fields.number("min_p", s.min_p));
  TC_ASSIGN(s.repetition_penalty, fields.number("repetition_penalty", s.repetition_penalty));
  TC_ASSIGN(s.presence_penalty, fields.number("presence_penalty", s.presence_penalty));
  TC_ASSIGN(s.frequency_penalty, fields.number("frequency_penalty", s.frequency_penalty));
  if (fields.find("seed")) {
    TC_ASSIGN(const int64_t seed, fields.integer("seed", 0, INT64_MIN, INT64_MAX));
    s.seed = static_cast<uint64_t>(seed);
    s.has_seed = true;
  }
  TC_RETURN_IF_ERROR(s.check());
  TC_ASSIGN(request.max_tokens, fields.integer("max_tokens", -1, 1, INT64_MAX));
  TC_ASSIGN(request.max_tokens, fields.integer("max_completion_tokens", request.max_tokens, 1, INT64_MAX));
  TC_ASSIGN(request.min_tokens, fields.integer("min_tokens", 0, 0, INT64_MAX));
  TC_ASSIGN(request.ignore_eos, fields.boolean("ignore_eos", false));
  TC_ASSIGN(request.stop, fields.stops());
  TC_RETURN_IF_ERROR(fields.integer("n", 1, 1, 1));
  return request;
}

Result<SamplingParams> read_sampling_defaults(const std::filesystem::path& model) {
  SamplingParams params;
  const std::filesystem::path path = model / "generation_config.json";
  Result<std::string> text = read_text_file(path, 1 << 20);
  if (!text) return params;
  const auto read = [&]() -> Status {
    TC_ASSIGN(const Json json, parse_json(*text));
    if (!json.is_object()) return corrupt("not a JSON object");
    const Fields fields(json);
    TC_ASSIGN(params.temperature, fields.number("temperature", params.temperature));
    TC_ASSIGN(params.top_p, fields.number("top_p", params.top_p));
    TC_ASSIGN(params.top_k, fields.integer("top_k", params.top_k, -1, 1'000'000'000));
    TC_ASSIGN(const bool sample, fields.boolean("do_sample", true));
    if (!sample) params.temperature = 0;
    return params.check();
  };
  Status status = read();
  if (!status.ok()) return std::move(status).error().with(path.string());
  return params;
}

}  // namespace thermocline::server
