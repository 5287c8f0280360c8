#include "runtime/server/api/server_info.h"

#include <algorithm>

namespace thermocline::server {
namespace {

// In llama.cpp's words where it has them. The folder's name alone: a path says who lives on this machine.
Reply props(const ServedModel& model) {
  const SamplingParams& s = model.defaults;
  const Json sampling = {{"temperature", s.temperature},
                         {"top_p", s.top_p},
                         {"top_k", s.top_k},
                         {"min_p", s.min_p},
                         {"repetition_penalty", s.repetition_penalty},
                         {"presence_penalty", s.presence_penalty},
                         {"frequency_penalty", s.frequency_penalty}};
  return {200, dump_json(Json{{"default_generation_settings", {{"n_ctx", model.max_context}, {"params", sampling}}},
                              {"total_slots", model.max_sequences},
                              {"n_ctx", model.max_context},
                              {"model_alias", model.name},
                              {"model_path", model.facts.folder},
                              {"chat_format", model.constants ? "deepseek-v4" : "none"},
                              {"chat_template", nullptr},
                              {"thinks", model.think},
                              {"modalities", {{"vision", false}, {"audio", false}}},
                              {"build_info", "thermocline " TC_VERSION}})};
}

// Requests that are answered now; none of their text.
Reply slots(const Services& services, const Call& call) {
  const auto asked = call.query.find("fail_on_no_slot");
  if (asked != call.query.end() && asked->second == "1" &&
      call.model->backend->stats().running >= call.model->max_sequences)
    return error_reply(Error{ErrorCode::unavailable, "all " + std::to_string(call.model->max_sequences) +
                                                         " sequences that run together are taken"});
  std::vector<RequestBook::Active> active = services.book.active();
  std::stable_sort(active.begin(), active.end(), [](const auto& a, const auto& b) { return a.seconds > b.seconds; });
  Json slots = Json::array();
  for (const RequestBook::Active& request : active) {
    if (!services.shows(call.client, request.key)) {
      slots.push_back({{"id", slots.size()}, {"is_processing", true}});
      continue;
    }
    slots.push_back({{"id", slots.size()},
                     {"id_task", request.id},
                     {"is_processing", true},
                     {"phase", request.look.phase},
                     {"n_ctx", call.model->max_context},
                     {"n_prompt_tokens", request.look.prompt_tokens},
                     {"n_cached_tokens", request.look.cached_tokens},
                     {"n_decoded", request.look.completion_tokens},
                     {"seconds", request.seconds}});
  }
  return {200, dump_json(slots)};
}

// vLLM's number, and what it is made of.
Reply load(const ServedModel& model) {
  const EngineStats s = model.backend->stats();
  return {200, dump_json(Json{{"server_load", s.running + s.waiting},
                              {"running", s.running},
                              {"waiting", s.waiting},
                              {"waiting_tokens", s.waiting_tokens},
                              {"kv_tokens_used", s.kv_tokens_used},
                              {"kv_tokens_total", s.kv_tokens_total}})};
}

// SGLang's: a line for each worker, of which there is one.
Reply get_load(const ServedModel& model) {
  const EngineStats s = model.backend->stats();
  return {200, dump_json(Json::array({Json{{"dp_rank", 0},
                                           {"num_reqs", s.running + s.waiting},
                                           {"num_waiting_reqs", s.waiting},
                                           {"num_tokens", s.kv_tokens_used + s.waiting_tokens}}}))};
}

}  // namespace

std::vector<Endpoint> server_info_endpoints(Services& services) {
  return {{.method = "GET", .path = "/props", .answer = [](const Call& call) -> Outcome { return props(*call.model); }},
          {.method = "GET",
           .path = "/slots",
           .answer = [&services](const Call& call) -> Outcome { return slots(services, call); }},
          {.method = "GET", .path = "/load", .answer = [](const Call& call) -> Outcome { return load(*call.model); }},
          {.method = "GET", .path = "/get_load", .answer = [](const Call& call) -> Outcome {
             return get_load(*call.model);
           }}};
}

}  // namespace thermocline::server
