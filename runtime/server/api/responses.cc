#include "runtime/server/api/responses.h"

#include "runtime/server/api/responses_translation.h"
#include "runtime/server/wire/ids.h"
#include "runtime/server/wire/request_fields.h"

namespace thermocline::server {
namespace {

constexpr size_t kLongestEcho = 16 << 10;  // every response of a stream repeats it

Json usage_json(const Usage& usage) {
  return {{"input_tokens", usage.prompt},
          {"input_tokens_details", {{"cached_tokens", usage.cached}}},
          {"output_tokens", usage.completion},
          {"output_tokens_details", {{"reasoning_tokens", usage.reasoning}}},
          {"total_tokens", usage.prompt + usage.completion}};
}

Error in_words_of_responses(const ChatTranslation& chat, Error error) {
  for (std::string* text : {&error.message, &error.field}) {
    if (text->starts_with("max_tokens")) text->replace(0, 10, "max_output_tokens");
    if (text->starts_with("reasoning_effort")) text->replace(0, 16, "reasoning.effort");
  }
  return chat.told(std::move(error));
}

Reply no_response(const std::string& id) {
  return error_reply(404, "not_found_error", "not_found",
                     "there is no response '" + id.substr(0, 100) +
                         "' (any more): they are kept in memory, the longest unused "
                         "go first");
}

}  // namespace

Result<std::vector<Request>> ResponsesGeneration::read(const Json& body) {
  TC_RETURN_IF_ERROR(read_common(body, "resp_"));
  const Fields fields(body);
  TC_ASSIGN(stored_, fields.boolean("store", true));
  Json before;
  TC_ASSIGN(const std::string previous, fields.text("previous_response_id", ""));
  if (!previous.empty()) {
    const auto kept = store_.find(call_.client.name, previous);
    if (!kept || kept->messages.empty())
      return field_error("previous_response_id", "'" + previous.substr(0, 100) + "' is not there (any more)");
    TC_ASSIGN(before, parse_json(kept->messages));
  }
  TC_ASSIGN(ResponsesTranslation chat, translate_response(body, before));
  const auto refused = [&](Error error) { return in_words_of_responses(chat, std::move(error)); };
  Result<Request> request = read_generation_fields(Fields(chat.body), model_.defaults, model_.vocab_size, arrived_);
  if (!request) return refused(std::move(request).error());
  if (request->max_tokens == 0) return field_error("max_output_tokens", "should be at least 1");
  Result<ChatPrompt> prompt = read_chat_prompt(model_, chat.body);
  if (!prompt) return refused(std::move(prompt).error());
  TC_RETURN_IF_ERROR(wanted());
  TC_RETURN_IF_ERROR(put_prompt(model_, *prompt, *request));
  stream_.emplace(*model_.constants, prompt->rendered.in_reasoning, std::move(prompt->tools));
  custom_tools_ = std::move(chat.custom_tools);
  echo_fields(body, *request);
  if (stored_) {
    Json& messages = chat.body["messages"];
    if (fields.find("instructions") && !messages.empty()) messages.erase(0);  // they are this response's alone
    history_ = dump_json(messages);
    history_.pop_back();
    store_.put(call_.client.name, id_, {dump_json(response("in_progress")), "", weak_from_this()});
  }
  std::vector<Request> requests;
  requests.push_back(std::move(*request));
  return requests;
}

void ResponsesGeneration::echo_fields(const Json& body, const Request& request) {
  const auto given = [&](const char* name, const Json& otherwise) {
    const Json* const value = Fields(body).find(name);
    return value && dump_json(*value).size() <= kLongestEcho ? *value : otherwise;
  };
  echoed_ = {{"background", false},
             {"instructions", given("instructions", nullptr)},
             {"max_output_tokens", given("max_output_tokens", nullptr)},
             {"metadata", given("metadata", Json::object())},
             {"model", model_name_},
             {"parallel_tool_calls", given("parallel_tool_calls", true)},
             {"previous_response_id", given("previous_response_id", nullptr)},
             {"reasoning", given("reasoning", {{"effort", nullptr}, {"summary", nullptr}})},
             {"service_tier", "default"},
             {"store", stored_},
             {"temperature", request.sampling.temperature},
             {"text", given("text", {{"format", {{"type", "text"}}}})},
             {"tool_choice", given("tool_choice", "auto")},
             {"tools", given("tools", Json::array())},
             {"top_p", request.sampling.top_p},
             {"truncation", "disabled"},
             {"user", given("user", nullptr)}};
}

Json ResponsesGeneration::response(const char* status) const {
  Json json = {{"id", id_}, {"object", "response"}, {"created_at", created_}, {"status", status}, {"error", nullptr}};
  const bool incomplete = status == std::string_view("incomplete");
  json["incomplete_details"] = incomplete ? Json{{"reason", "max_output_tokens"}} : Json();
  if (echoed_.is_object()) json.update(echoed_);
  json["output"] = items_;
  const bool over = status != std::string_view("in_progress");
  json["usage"] = over ? usage_json(usage_) : Json();
  return json;
}

// --- network thread ---

std::string ResponsesGeneration::event(const std::string& type, const Json& members) {
  Json json = {{"type", "response." + type}, {"sequence_number", sequence_++}};
  json.update(members);
  return "event: response." + type + "\ndata: " + dump_json(json) + "\n\n";
}

void ResponsesGeneration::begin(std::string& out) {
  if (!streams_ || std::exchange(began_, true)) return;
  out += event("created", {{"response", response("in_progress")}});
  out += event("in_progress", {{"response", response("in_progress")}});
}

void ResponsesGeneration::on_event(size_t, const TokenEvent& token, std::string& out) {
  begin(out);
  const bool reasoned = stream_->in_reasoning();
  for (const auto& piece : stream_->push(token.text)) tell(piece, out);
  if (token.kind == TokenEvent::Kind::token && reasoned && stream_->in_reasoning()) ++usage_.reasoning;
  if (token.kind != TokenEvent::Kind::finish) return;
  for (const auto& piece : stream_->finish(token.reason != FinishReason::stop)) tell(piece, out);
  if (token.reason == FinishReason::length) status_ = "incomplete";
  close_item(status_, out);
  entry_.finish =
      stream_->tool_calls() > 0 && token.reason == FinishReason::stop ? "tool_calls" : finish_name(token.reason);
}

void ResponsesGeneration::tell(const CompletionStream::Event& piece, std::string& out) {
  using Kind = CompletionStream::Event::Kind;
  const auto grows = [&](const char* type) { return open_ && items_.back()["type"] == type; };
  switch (piece.kind) {
    case Kind::reasoning:
      if (!grows("reasoning")) {
        open_item(
            {{"id", random_id("rs_")}, {"type", "reasoning"}, {"summary", Json::array()}, {"content", Json::array()}},
            out);
        open_part("reasoning_text", out);
      }
      grow("reasoning_text.delta", piece.text, items_.back()["content"][0]["text"].get_ref<std::string&>(), out);
      break;
    case Kind::content:
      if (!grows("message")) {
        open_item({{"id", random_id("msg_")}, {"type", "message"}, {"role", "assistant"}, {"content", Json::array()}},
                  out);
        open_part("output_text", out);
      }
      grow("output_text.delta", piece.text, items_.back()["content"][0]["text"].get_ref<std::string&>(), out);
      break;
    case Kind::tool_name:
      call_name_ = piece.text;
      break;
    case Kind::tool_arguments:
      add_call(piece, out);
      break;
  }
}

Json ResponsesGeneration::place() const {
  return {{"item_id", items_.back()["id"]}, {"output_index", items_.size() - 1}};
}

void ResponsesGeneration::open_item(Json item, std::string& out) {
  close_item("completed", out);
  item["status"] = "in_progress";
  items_.push_back(std::move(item));
  open_ = true;
  if (streams_) out += event("output_item.added", {{"output_index", items_.size() - 1}, {"item", items_.back()}});
}

void ResponsesGeneration::open_part(const char* type, std::string& out) {
  Json part = {{"type", type}, {"text", ""}};
  if (type == std::string_view("output_text"))
    part.update({{"annotations", Json::array()}, {"logprobs", Json::array()}});
  items_.back()["content"].push_back(part);
  Json members = place();
  members.update({{"content_index", 0}, {"part", std::move(part)}});
  if (streams_) out += event("content_part.added", members);
}

void ResponsesGeneration::grow(const char* type, const std::string& piece, std::string& text, std::string& out) {
  text += piece;
  if (!streams_) return;
  Json members = place();
  members.update({{"content_index", 0}, {"delta", piece}});
  if (type == std::string_view("output_text.delta")) members["logprobs"] = Json::array();
  out += event(type, members);
}

void ResponsesGeneration::close_item(const char* status, std::string& out) {
  if (!std::exchange(open_, false)) return;
  Json& item = items_.back();
  item["status"] = status;
  if (!streams_) return;
  if (item.contains("content")) {
    const Json& part = item["content"][0];
    Json members = place();
    members["content_index"] = 0;
    Json done = members;
    done["text"] = part["text"];
    const bool text = part["type"] == "output_text";
    if (text) done["logprobs"] = Json::array();
    out += event(text ? "output_text.done" : "reasoning_text.done", done);
    members["part"] = part;
    out += event("content_part.done", members);
  }
  out += event("output_item.done", {{"output_index", items_.size() - 1}, {"item", item}});
}

// A call comes whole: its arguments, or the text of a custom tool, are one delta.
void ResponsesGeneration::add_call(const CompletionStream::Event& piece, std::string& out) {
  const bool custom = custom_tools_.contains(call_name_);
  const char* const member = custom ? "input" : "arguments";
  std::string value = piece.text;
  if (custom) {
    const Result<Json> arguments = parse_json(piece.text);
    const bool one = arguments && arguments->is_object() && arguments->size() == 1 && arguments->begin()->is_string();
    if (one) value = arguments->begin()->get<std::string>();
  }
  open_item({{"id", random_id(custom ? "ctc_" : "fc_")},
             {"type", custom ? "custom_tool_call" : "function_call"},
             {"call_id", random_id("call_")},
             {"name", call_name_},
             {member, ""}},
            out);
  items_.back()[member] = value;
  if (streams_) {
    const std::string type = custom ? "custom_tool_call_input" : "function_call_arguments";
    Json delta = place(), done = place();
    delta["delta"] = value;
    done.update({{member, value}});
    if (!custom) done["name"] = call_name_;
    out += event(type + ".delta", delta);
    out += event(type + ".done", done);
  }
  close_item("completed", out);
}

std::string ResponsesGeneration::last_events() {
  keep(status_);
  return event(status_, {{"response", response(status_)}});
}

Json ResponsesGeneration::reply_body() {
  keep(status_);
  return response(status_);
}

// What the model said, as a message of the next prompt.
std::string ResponsesGeneration::assistant_message() const {
  Json message = {{"role", "assistant"}, {"content", ""}};
  for (const Json& item : items_) {
    const std::string type = item["type"];
    if (type == "message") {
      message["content"] = message["content"].get<std::string>() + item["content"][0]["text"].get<std::string>();
    } else if (type == "reasoning") {
      message["reasoning_content"] =
          message.value("reasoning_content", "") + item["content"][0]["text"].get<std::string>();
    } else {
      const bool custom = type == "custom_tool_call";
      const std::string arguments =
          custom ? dump_json(Json{{"input", item["input"]}}) : item["arguments"].get<std::string>();
      message["tool_calls"].push_back({{"id", item["call_id"]},
                                       {"type", "function"},
                                       {"function", {{"name", item["name"]}, {"arguments", arguments}}}});
    }
  }
  return dump_json(message);
}

void ResponsesGeneration::keep(const char* status) {
  if (!stored_) return;
  const std::string messages = history_ + (history_.size() > 1 ? "," : "") + assistant_message() + "]";
  kept_ = true;
  store_.update(call_.client.name, id_, {dump_json(response(status)), messages});
}

// Whose client left, or whose reply is an error.
void ResponsesGeneration::closed(bool complete, int status) {
  Generation::closed(complete, status);
  if (!read_ || !stored_ || kept_ || echoed_.is_null()) return;
  const bool failed = complete && entry_.finish != "cancelled";
  store_.update(call_.client.name, id_, {dump_json(response(failed ? "failed" : "cancelled"))});
}

// Codex counts events alone as life.
std::string ResponsesGeneration::sign_of_life() {
  std::string out;
  if (!read_) return Generation::sign_of_life();
  if (!began_) {
    begin(out);
    return out;
  }
  return event("in_progress", {{"response", response("in_progress")}});
}

std::string ResponsesGeneration::error_events(const Reply& reply) {
  const Result<Json> body = parse_json(reply.body);
  std::string code = body ? body->value(Json::json_pointer("/error/code"), "server_error") : "server_error";
  std::string message = body ? body->value(Json::json_pointer("/error/message"), "") : "";
  if (reply.status == 429) {  // the words by which Codex comes again
    code = "rate_limit_exceeded";
    message += "; try again in 5s";
  }
  const bool cancelled = entry_.finish == "cancelled";
  Json failed = {{"id", random_id("resp_")}, {"object", "response"}, {"status", "failed"}, {"output", Json::array()}};
  if (read_) failed = response(cancelled ? "cancelled" : "failed");
  failed["error"] = {{"code", code}, {"message", message}};
  if (!read_) return event("failed", {{"response", std::move(failed)}});
  kept_ = true;
  if (stored_ && !echoed_.is_null()) store_.update(call_.client.name, id_, {dump_json(failed)});
  std::string out;
  begin(out);
  return out + event("failed", {{"response", std::move(failed)}});
}

namespace {

// One that nobody answers any more, as its client left before it was read, was cancelled.
std::optional<ResponseStore::Kept> find_kept(ResponseStore& store, const Call& call) {
  auto kept = store.find(call.client.name, call.rest);
  if (!kept || kept->running.lock()) return kept;
  Json response = parse_json(kept->response).value();
  if (response["status"] != "in_progress") return kept;
  response["status"] = "cancelled";
  kept->response = dump_json(response);
  return kept;
}

Reply kept_reply(ResponseStore& store, const Call& call) {
  const auto kept = find_kept(store, call);
  return kept ? Reply{200, kept->response} : no_response(call.rest);
}

Reply delete_reply(ResponseStore& store, const Call& call) {
  if (!store.erase(call.client.name, call.rest)) return no_response(call.rest);
  return {200, dump_json(Json{{"id", call.rest}, {"object", "response.deleted"}, {"deleted", true}})};
}

// One that is answered ends; of others the answer is how they ended.
Reply cancel_reply(ResponseStore& store, const Call& call) {
  auto kept = find_kept(store, call);
  if (!kept) return no_response(call.rest);
  const std::shared_ptr<Exchange> running = kept->running.lock();
  if (!running) return {200, kept->response};
  running->cancel();
  Json response = parse_json(kept->response).value();
  response["status"] = "cancelled";
  kept->response = dump_json(response);
  kept->running.reset();
  Reply reply{200, kept->response};
  store.update(call.client.name, call.rest, std::move(*kept));
  return reply;
}

}  // namespace

std::vector<Endpoint> responses_endpoints(Services& services) {
  const auto store = std::make_shared<ResponseStore>(ResponseStore::Caps());
  const auto replies = [store](Reply (*reply)(ResponseStore&, const Call&)) {
    return [store, reply](const Call& call) -> Outcome { return reply(*store, call); };
  };
  return {{.method = "POST",
           .path = "/v1/responses",
           .queued = true,
           .answer =
               [&services, store](Call call) {
                 return Generation::begin(std::make_shared<ResponsesGeneration>(std::move(call), services, *store));
               }},
          {.method = "POST", .path = "/v1/responses/*/cancel", .answer = replies(cancel_reply)},
          {.method = "GET", .path = "/v1/responses/*", .answer = replies(kept_reply)},
          {.method = "DELETE", .path = "/v1/responses/*", .answer = replies(delete_reply)}};
}

}  // namespace thermocline::server
