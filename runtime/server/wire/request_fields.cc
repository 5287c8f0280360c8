#include "runtime/server/wire/request_fields.h"

#include <charconv>
#include <cmath>

#include "runtime/io/file.h"

namespace thermocline::server {

Error field_error(const std::string& field, const std::string& what) {
  return {ErrorCode::invalid_argument, field + " " + what, field};
}

Error not_offered(const std::string& field, const std::string& what) {
  return {ErrorCode::unsupported, field + " " + what, field};
}

std::optional<int64_t> integer_of(const Json& value) {
  constexpr double kMost = 0x1p63;
  if (value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX) return std::nullopt;
  if (value.is_number_integer()) return value.get<int64_t>();
  if (!value.is_number_float()) return std::nullopt;
  const double number = value.get<double>();
  if (!(number >= -kMost && number < kMost) || number != std::trunc(number)) return std::nullopt;
  return static_cast<int64_t>(number);
}

std::optional<int32_t> token_id_of(const Json& value, int64_t vocab) {
  const std::optional<int64_t> id = integer_of(value);
  if (!id || *id < 0 || *id >= vocab) return std::nullopt;
  return static_cast<int32_t>(*id);
}

Result<double> Fields::number(const char* name, double fallback) const {
  const Json* value = find(name);
  if (!value) return fallback;
  if (!value->is_number() || !std::isfinite(value->get<double>())) return error(name, "should be a number");
  return value->get<double>();
}

Result<int64_t> Fields::integer(const char* name, int64_t fallback, int64_t low, int64_t high) const {
  const Json* value = find(name);
  if (!value) return fallback;
  const std::optional<int64_t> number = integer_of(*value);
  if (!number || *number < low || *number > high)
    return error(name, "should be an integer from " + std::to_string(low) + " to " + std::to_string(high));
  return *number;
}

Result<bool> Fields::boolean(const char* name, bool fallback) const {
  const Json* value = find(name);
  if (!value) return fallback;
  if (!value->is_boolean()) return error(name, "should be true or false");
  return value->get<bool>();
}

Result<std::string> Fields::text(const char* name, const std::string& fallback) const {
  const Json* value = find(name);
  if (!value) return fallback;
  if (!value->is_string()) return error(name, "should be a string");
  return value->get<std::string>();
}

Result<std::string> Fields::required_text(const char* name) const {
  if (!find(name)) return error(name, "is missing");
  return text(name, "");
}

Result<std::vector<std::string>> Fields::stops() const {
  constexpr size_t kMost = 16, kLongest = 4096;
  const Json* value = find("stop");
  if (!value) return std::vector<std::string>();
  const Json one = Json::array({*value});
  const Json& list = value->is_string() ? one : *value;
  if (!list.is_array() || list.size() > kMost)
    return field_error("stop", "should be a string or a list of at most " + std::to_string(kMost));
  std::vector<std::string> stops;
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string* const stop = list[i].get_ptr<const std::string*>();
    if (!stop || stop->empty() || stop->size() > kLongest)
      return field_error("stop[" + std::to_string(i) + "]",
                         "should be a string of 1 to " + std::to_string(kLongest) + " bytes");
    stops.push_back(*stop);
  }
  return stops;
}

Result<std::vector<int32_t>> Fields::token_ids(const char* name, int64_t vocab, size_t most) const {
  std::vector<int32_t> ids;
  const Json* value = find(name);
  if (!value) return ids;
  if (!value->is_array() || value->size() > most)
    return field_error(name, "should be a list of at most " + std::to_string(most) + " token ids");
  for (const Json& id : *value) {
    const std::optional<int32_t> token = token_id_of(id, vocab);
    if (!token)
      return field_error(std::string(name) + "[" + std::to_string(ids.size()) + "]",
                         "should be a token id below " + std::to_string(vocab));
    ids.push_back(*token);
  }
  return ids;
}

namespace {

// {"token id": bias}
Result<std::vector<std::pair<int32_t, float>>> read_logit_bias(const Fields& fields) {
  std::vector<std::pair<int32_t, float>> bias;
  const Json* const value = fields.find("logit_bias");
  if (!value) return bias;
  if (!value->is_object() || value->size() > 1024)
    return field_error("logit_bias", "should be an object of at most 1,024 token ids");
  for (const auto& [key, number] : value->items()) {
    const std::string field = "logit_bias[" + key.substr(0, 60) + "]";
    int32_t id = -1;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (error != std::errc() || end != key.data() + key.size() || id < 0)
      return field_error(field, "should be named by a token id");
    if (!number.is_number() || !std::isfinite(number.get<float>()))
      return field_error(field, "should be a number from -100 to 100");
    bias.emplace_back(id, number.get<float>());
  }
  return bias;
}

Status read_sampling(const Fields& fields, int64_t vocab, SamplingParams& s) {
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
  TC_ASSIGN(s.logit_bias, read_logit_bias(fields));
  return s.check(vocab);
}

constexpr size_t kMissing = 14;
constexpr const char* kFields[] = {
    // Those that are missing come first.
    "suffix", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar",
    "json_schema", "functions", "bad_words", "allowed_token_ids", "use_beam_search", "prompt_embeds",
    "truncate_prompt_tokens",
    // read_sampling
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "logit_bias",
    // read_generation_fields
    "max_tokens", "max_completion_tokens", "min_tokens", "ignore_eos", "stop", "include_stop_str_in_output",
    "stop_token_ids", "skip_special_tokens", "n", "priority", "cache_salt", "timeout"};

// What would change the answer and is not there: refused by name, never ignored. An empty or switched-off one is fine,
// but for the schema {}: it asks for JSON.
Status refuse_missing_features(const Fields& fields) {
  for (const std::string_view name : std::span(kFields).first(kMissing)) {
    const Json* const value = fields.find(name.data());
    if (!value || *value == false || *value == "") continue;
    const bool schema = value->is_object() && (name == "guided_json" || name == "json_schema");
    if (value->is_structured() && value->empty() && !schema) continue;
    return not_offered(std::string(name), "is not offered by this server");
  }
  return {};
}

}  // namespace

std::span<const char* const> generation_fields() { return kFields; }

Result<Request> read_generation_fields(const Fields& fields, const SamplingParams& defaults, int64_t vocab,
                                       Request::Clock::time_point arrived) {
  Request request;
  request.sampling = defaults;
  TC_RETURN_IF_ERROR(refuse_missing_features(fields));
  TC_RETURN_IF_ERROR(read_sampling(fields, vocab, request.sampling));
  TC_ASSIGN(request.max_tokens, fields.integer("max_tokens", -1, 0, INT64_MAX));
  TC_ASSIGN(request.max_tokens, fields.integer("max_completion_tokens", request.max_tokens, 0, INT64_MAX));
  TC_ASSIGN(request.min_tokens, fields.integer("min_tokens", 0, 0, INT64_MAX));
  TC_ASSIGN(request.ignore_eos, fields.boolean("ignore_eos", false));
  TC_ASSIGN(request.stop, fields.stops());
  TC_ASSIGN(request.include_stop, fields.boolean("include_stop_str_in_output", false));
  TC_ASSIGN(request.stop_token_ids, fields.token_ids("stop_token_ids", vocab, 128));
  TC_ASSIGN(request.skip_special_tokens, fields.boolean("skip_special_tokens", true));
  TC_ASSIGN(const int64_t choices, fields.integer("n", 1, 1, 16));
  request.choices = static_cast<int>(choices);
  TC_ASSIGN(const int64_t priority, fields.integer("priority", 0, -100, 100));
  request.priority = static_cast<int>(priority);
  TC_ASSIGN(request.cache_salt, fields.text("cache_salt", ""));
  if (request.cache_salt.size() > 256) return field_error("cache_salt", "should be at most 256 bytes");
  if (fields.find("timeout")) {
    TC_ASSIGN(const double seconds, fields.number("timeout", 0));
    if (seconds <= 0 || seconds > 1e6) return field_error("timeout", "should be a number of seconds, more than 0");
    request.deadline =
        arrived + std::chrono::duration_cast<Request::Clock::duration>(std::chrono::duration<double>(seconds));
  }
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
