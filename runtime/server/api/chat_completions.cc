#include "runtime/server/api/chat_completions.h"

#include "runtime/server/api/chat_prompt.h"
#include "runtime/server/api/logprobs.h"
#include "runtime/server/wire/ids.h"
#include "runtime/server/wire/request_fields.h"

namespace thermocline::server {

Result<std::vector<Request>> ChatGeneration::read(const Json& body) {
  TC_RETURN_IF_ERROR(read_common(body, "chatcmpl-"));
  const Fields fields(body);
  static constexpr const char* kOwn[] = {"messages",
                                         "tools",
                                         "tool_choice",
                                         "response_format",
                                         "reasoning_effort",
                                         "thinking",
                                         "logprobs",
                                         "chat_template_kwargs",
                                         "continue_final_message",
                                         "add_generation_prompt",
                                         "top_logprobs",
                                         "thinking_token_budget",
                                         "return_progress",
                                         "prompt_logprobs",
                                         "return_token_ids",
                                         "timings_per_token"};
  TC_RETURN_IF_ERROR(check_fields(body, kOwn));
  std::vector<Request> requests;
  TC_ASSIGN(Request request, read_generation_fields(fields, model_.defaults, model_.vocab_size, arrived_));
  if (request.max_tokens == 0) return field_error("max_tokens", "should be at least 1");
  TC_RETURN_IF_ERROR(read_logprobs(body, request));
  TC_ASSIGN(const ChatPrompt prompt, read_chat_prompt(model_, body));
  TC_RETURN_IF_ERROR(wanted());
  TC_RETURN_IF_ERROR(put_prompt(model_, prompt, request));
  TC_RETURN_IF_ERROR(read_extras(fields, request));
  if (return_ids_) prompt_ids_ = request.prompt;
  for (int i = 0; i < request.choices; ++i)
    choices_.push_back({CompletionStream(*model_.constants, prompt.rendered.in_reasoning, prompt.tools)});
  requests.push_back(std::move(request));
  return requests;
}

Status ChatGeneration::read_logprobs(const Json& body, Request& request) const {
  const Fields fields(body);
  TC_ASSIGN(const bool logprobs, fields.boolean("logprobs", false));
  TC_ASSIGN(const int64_t top, fields.integer("top_logprobs", logprobs ? 0 : -1, 0, 20));
  if (!logprobs && top > 0) return field_error("top_logprobs", "needs logprobs: true");
  if (logprobs) request.top_logprobs = static_cast<int>(top);
  return {};
}

// --- network thread ---

void ChatGeneration::on_event(size_t, const TokenEvent& event, std::string& out) {
  if (event.kind == TokenEvent::Kind::prompt) {
    prompt_scores_ = prompt_logprobs(model_.tokenizer, event.prompt_logprobs);
    return;
  }
  Choice& choice = choices_[static_cast<size_t>(event.choice)];
  if (return_ids_ && event.kind == TokenEvent::Kind::token) choice.ids.push_back(event.id);
  if (event.logprobs) {
    logprobs_ = true;
    choice.logprobs.push_back(chat_logprob(model_.tokenizer, *event.logprobs));
  }
  const bool reasoned = choice.stream.in_reasoning();
  const std::vector<CompletionStream::Event> events = choice.stream.push(event.text);
  // The token that closes the reasoning is none of it.
  if (event.kind == TokenEvent::Kind::token && reasoned && choice.stream.in_reasoning()) ++usage_.reasoning;
  tell(event.choice, events, out);
  if (event.kind == TokenEvent::Kind::finish) finish(event.choice, event, out);
}

void ChatGeneration::tell(int index, const std::vector<CompletionStream::Event>& events, std::string& out) {
  using Kind = CompletionStream::Event::Kind;
  Choice& choice = choices_[static_cast<size_t>(index)];
  for (const auto& event : events) {
    Json delta = Json::object();
    if (!choice.began) delta["role"] = "assistant";
    choice.began = true;
    switch (event.kind) {
      case Kind::reasoning:
        choice.reasoning += event.text;
        delta["reasoning_content"] = event.text;
        if (model_.reasoning_twice) delta["reasoning"] = event.text;
        break;
      case Kind::content:
        choice.content += event.text;
        delta["content"] = event.text;
        break;
      case Kind::tool_name: {
        const Json call = {
            {"id", random_id("call_")}, {"type", "function"}, {"function", {{"name", event.text}, {"arguments", ""}}}};
        choice.calls.push_back(call);
        Json first = {{"index", event.index}};
        first.update(call);
        delta["tool_calls"] = Json::array({first});
        break;
      }
      case Kind::tool_arguments:
        choice.calls[static_cast<size_t>(event.index)]["function"]["arguments"].get_ref<std::string&>() += event.text;
        delta["tool_calls"] = Json::array({Json{{"index", event.index}, {"function", {{"arguments", event.text}}}}});
        break;
    }
    if (streams_) out += chunk(index, std::move(delta), nullptr);
  }
}

// Log-probabilities go with the next chunk that is told: tokens may have no text of their own.
std::string ChatGeneration::chunk(int index, Json delta, Json reason, const AnswerStats* stats) {
  Choice& choice = choices_[static_cast<size_t>(index)];
  Json json = head(chunk_object());
  Json logprobs;
  if (logprobs_) logprobs = {{"content", std::exchange(choice.logprobs, Json::array())}};
  json["choices"] = Json::array({Json{{"index", index},
                                      {"delta", std::move(delta)},
                                      {"logprobs", std::move(logprobs)},
                                      {"finish_reason", std::move(reason)}}});
  if (return_ids_) json["choices"][0]["token_ids"] = std::exchange(choice.ids, {});
  if (!prompt_ids_.empty()) json["prompt_token_ids"] = std::exchange(prompt_ids_, {});
  if (stats) json["timings"] = timings_json(*stats);
  if (continuous_usage_) json["usage"] = usage_.json();
  return event_of(json);
}

void ChatGeneration::finish(int index, const TokenEvent& event, std::string& out) {
  Choice& choice = choices_[static_cast<size_t>(index)];
  tell(index, choice.stream.finish(event.reason != FinishReason::stop), out);
  choice.finish =
      event.reason == FinishReason::stop && !choice.calls.empty() ? "tool_calls" : finish_name(event.reason);
  if (entry_.finish.empty() || entry_.finish == "stop") entry_.finish = choice.finish;
  if (timings_) last_timings_ = timings_json(event.stats);
  if (!streams_) return;
  Json last = Json::object();
  if (!choice.began) last = {{"role", "assistant"}, {"content", ""}};  // an answer without a word
  choice.began = true;
  out += chunk(index, std::move(last), choice.finish, timings_ ? &event.stats : nullptr);
}

std::string ChatGeneration::last_events() {
  if (!include_usage_) return "";
  Json last = head(chunk_object());
  last["choices"] = Json::array();
  last["usage"] = usage_.json();
  return event_of(last);
}

Json ChatGeneration::reply_body() {
  Json body = head("chat.completion");
  Json choices = Json::array();
  for (size_t i = 0; i < choices_.size(); ++i) {
    Choice& c = choices_[i];
    Json message = {{"role", "assistant"},
                    {"content", c.calls.empty() || !c.content.empty() ? Json(c.content) : Json()}};
    if (!c.reasoning.empty()) message["reasoning_content"] = c.reasoning;
    if (!c.reasoning.empty() && model_.reasoning_twice) message["reasoning"] = c.reasoning;
    if (!c.calls.empty()) message["tool_calls"] = c.calls;
    Json logprobs;
    if (logprobs_) logprobs = {{"content", c.logprobs}};
    choices.push_back({{"index", i},
                       {"message", std::move(message)},
                       {"logprobs", std::move(logprobs)},
                       {"finish_reason", c.finish}});
    if (return_ids_) choices.back()["token_ids"] = c.ids;
  }
  body["choices"] = std::move(choices);
  body["usage"] = usage_.json();
  if (return_ids_) body["prompt_token_ids"] = prompt_ids_;
  if (prompt_logprobs_) body["prompt_logprobs"] = prompt_scores_;
  if (timings_) body["timings"] = last_timings_;
  return body;
}

std::vector<Endpoint> chat_completions_endpoints(Services& services) {
  return {{.method = "POST", .path = "/v1/chat/completions", .queued = true, .answer = [&services](Call call) {
             return Generation::begin(std::make_shared<ChatGeneration>(std::move(call), services));
           }}};
}

}  // namespace thermocline::server
