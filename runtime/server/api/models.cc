#include "runtime/server/api/models.h"

#include <algorithm>

namespace thermocline::server {
namespace {

constexpr const char* kParameters[] = {"max_tokens",
                                       "max_completion_tokens",
                                       "temperature",
                                       "top_p",
                                       "top_k",
                                       "min_p",
                                       "repetition_penalty",
                                       "presence_penalty",
                                       "frequency_penalty",
                                       "seed",
                                       "stop",
                                       "logit_bias",
                                       "logprobs",
                                       "top_logprobs",
                                       "tools",
                                       "tool_choice",
                                       "reasoning_effort"};

Json model_json(const ServedModel& served, const std::string& name) {
  Json json = {{"id", name},
               {"object", "model"},
               {"created", served.created},
               {"owned_by", "thermocline"},
               {"root", served.name},
               {"parent", nullptr},
               {"max_model_len", served.max_context},
               {"context_length", served.max_context},
               {"supported_parameters", kParameters}};
  json["meta"] = {{"n_ctx_train", served.facts.trained_context},
                  {"n_params", served.facts.parameters},
                  {"size", served.facts.weight_bytes},
                  {"n_vocab", served.vocab_size}};
  return json;
}

// What Codex's `/models` reads: every field that it does not take as optional, and the context.
Json codex_json(const ServedModel& served, const std::string& name) {
  const auto level = [](const char* effort, const char* text) {
    return Json{{"effort", effort}, {"description", text}};
  };
  return {
      {"slug", name},
      {"display_name", name},
      {"description", "served by thermocline"},
      {"default_reasoning_level", served.think ? "high" : "none"},
      {"supported_reasoning_levels", Json::array({level("none", "answers at once"), level("low", "thinks briefly"),
                                                  level("high", "thinks"), level("xhigh", "thinks longest")})},
      {"shell_type", "shell_command"},
      {"visibility", "list"},
      {"supported_in_api", true},
      {"priority", 1},
      {"upgrade", nullptr},
      {"base_instructions",
       "You are a coding agent in the user's terminal. Read the code before you change it, make the smallest change "
       "that does what was asked, run what tests it, and say in a few sentences what you did."},
      {"supports_reasoning_summaries", true},
      {"support_verbosity", false},
      {"default_verbosity", nullptr},
      {"apply_patch_tool_type", "function"},
      {"truncation_policy", {{"mode", "tokens"}, {"limit", std::min<int64_t>(10'000, served.max_context / 8)}}},
      {"supports_parallel_tool_calls", true},
      {"context_window", served.max_context},
      {"auto_compact_token_limit", served.max_context / 10 * 9},
      {"experimental_supported_tools", Json::array()},
      {"input_modalities", {"text"}}};
}

// Clients fill their menus before a model of an hour's load is there.
Reply list_while_loading(const std::vector<std::string>& names) {
  if (names.empty()) return error_reply(Error{ErrorCode::unavailable, "the model is loading; see /health"});
  Json data = Json::array();
  for (const std::string& name : names)
    data.push_back({{"id", name}, {"object", "model"}, {"created", 0}, {"owned_by", "thermocline"}});
  return {200, dump_json(Json{{"object", "list"}, {"data", std::move(data)}, {"models", Json::array()}})};
}

Reply list(const Call& call, const std::vector<std::string>& names) {
  if (!call.model) return list_while_loading(names);
  Json data = Json::array(), models = Json::array();
  for (const std::string& name : call.model->names()) {
    data.push_back(model_json(*call.model, name));
    models.push_back(codex_json(*call.model, name));
  }
  return {200, dump_json(Json{{"object", "list"}, {"data", std::move(data)}, {"models", std::move(models)}})};
}

Reply one(const Call& call) {
  if (call.model->has_name(call.rest)) return {200, dump_json(model_json(*call.model, call.rest))};
  return error_reply(404, "not_found_error", "model_not_found",
                     "there is no model of this name here; this server has " + call.model->names_text(), "model");
}

}  // namespace

std::vector<Endpoint> models_endpoints(Services& services) {
  return {{.method = "GET",
           .path = "/v1/models",
           .model = false,
           .answer = [&services](const Call& call) -> Outcome { return list(call, services.names); }},
          {.method = "GET", .path = "/v1/models/*", .answer = [](const Call& call) -> Outcome { return one(call); }}};
}

}  // namespace thermocline::server
