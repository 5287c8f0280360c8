#include "runtime/server/api/models.h"

namespace thermocline::server {
namespace {

Json model_json(const ServedModel& served) {
  return {{"id", served.name},
          {"object", "model"},
          {"created", served.created},
          {"owned_by", "thermocline"},
          {"max_model_len", served.max_context}};
}

Reply list(const Call& call) {
  return {200, dump_json(Json{{"object", "list"}, {"data", Json::array({model_json(*call.model)})}})};
}

Reply one(const Call& call) {
  if (call.rest == call.model->name) return {200, dump_json(model_json(*call.model))};
  return error_reply(404, "not_found_error", "model_not_found", "the only model here is '" + call.model->name + "'",
                     "model");
}

}  // namespace

std::vector<Endpoint> models_endpoints(Services&) {
  return {{.method = "GET", .path = "/v1/models", .answer = [](Call call) -> Outcome { return list(call); }},
          {.method = "GET", .path = "/v1/models/*", .answer = [](Call call) -> Outcome { return one(call); }}};
}

}  // namespace thermocline::server
