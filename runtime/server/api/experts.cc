#include "runtime/server/api/experts.h"

#include <algorithm>
#include <cmath>

namespace thermocline::server {
namespace {

// Little-endian, whatever the machine. Where a count does not fit, all become smaller by one factor.
std::string u16_of(const ExpertMap& map) {
  constexpr uint64_t kMost = 65535;
  const uint64_t most = map.tokens.empty() ? 0 : *std::max_element(map.tokens.begin(), map.tokens.end());
  std::string bytes;
  bytes.reserve(2 * map.tokens.size());
  for (const uint64_t count : map.tokens) {
    const uint64_t scaled =
        most > kMost ? static_cast<uint64_t>(static_cast<double>(count) * kMost / static_cast<double>(most)) : count;
    bytes += static_cast<char>(scaled & 0xff);
    bytes += static_cast<char>(scaled >> 8 & 0xff);
  }
  return bytes;
}

// "[[1,2],[3,4]]": thousands of numbers, without a document of them in between.
template <class Number>
std::string rows_of(const ExpertMap& map, const Number& number) {
  std::string out = "[";
  for (int layer = 0; layer < map.layers; ++layer) {
    out += layer > 0 ? ",[" : "[";
    for (int expert = 0; expert < map.experts; ++expert) {
      if (expert > 0) out += ',';
      out += std::to_string(
          number(static_cast<size_t>(layer) * static_cast<size_t>(map.experts) + static_cast<size_t>(expert)));
    }
    out += ']';
  }
  return out + "]";
}

std::string json_of(const ExpertMap& map) {
  Json tiers = Json::array();
  for (int layer = 0; layer < map.layers; ++layer) {
    std::string letters;
    for (int expert = 0; expert < map.experts; ++expert)
      letters +=
          map.on_device[static_cast<size_t>(layer) * static_cast<size_t>(map.experts) + static_cast<size_t>(expert)]
              ? 'g'
              : 'c';
    tiers.push_back(std::move(letters));
  }
  const double most = map.recent.empty() ? 0 : *std::max_element(map.recent.begin(), map.recent.end());
  const auto use = [&](size_t i) { return most > 0 ? std::lround(255 * map.recent[i] / most) : 0L; };
  std::string head = dump_json(
      Json{{"layers", map.layers}, {"experts", map.experts}, {"first_layer", 0}, {"tiers", std::move(tiers)}});
  head.pop_back();  // its }
  return head + ",\"use\":" + rows_of(map, use) +
         ",\"tokens\":" + rows_of(map, [&](size_t i) { return map.tokens[i]; }) + "}";
}

Reply loading() { return error_reply(Error{ErrorCode::unavailable, "the model is loading; see /health"}); }

Reply experts(const Call& call) {
  if (!call.model) return loading();
  const auto format = call.query.find("fmt");
  const std::string name = format == call.query.end() ? "json" : format->second;
  if (name == "json") return {200, json_of(call.model->backend->experts())};
  if (name == "u16")
    return {200, u16_of(call.model->backend->experts()), {{"Content-Type", "application/octet-stream"}}};
  return error_reply(400, "invalid_request_error", "invalid_value", "should be json or u16", "fmt");
}

Reply plan(const Call& call) {
  if (!call.model) return loading();
  if (!call.model->plan.empty()) return {200, call.model->plan};
  return error_reply(404, "not_found_error", "no_plan", "the planner has nothing to say of this model on this box");
}

}  // namespace

std::vector<Endpoint> experts_endpoints(Services&) {
  return {{.method = "GET",
           .path = "/v1/experts",
           .model = false,
           .answer = [](const Call& call) -> Outcome { return experts(call); }},
          {.method = "GET", .path = "/v1/plan", .model = false, .answer = [](const Call& call) -> Outcome {
             return plan(call);
           }}};
}

}  // namespace thermocline::server
