#include "runtime/server/chat_api.h"

#include <chrono>
#include <random>

#include "runtime/text/chat_encoding.h"

namespace thermocline::server {
namespace {

constexpr size_t kMaxPrompts = 16;

int64_t unix_seconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

std::string random_id(const char* prefix) {
  static thread_local std::mt19937_64 random{std::random_device{}()};
  constexpr const char* kDigits = "0123456789abcdefghijklmnopqrstuv";
  std::string id = prefix;
  uint64_t bits = random();
  for (int i = 0; i < 24; ++i) {
    if (i == 12) bits = random();
    id += kDigits[bits & 31];
    bits >>= 5;
  }
  return id;
}

std::string event(const Json& json) { return "data: " + dump_json(json) + "\n\n"; }

const char* finish_name(FinishReason reason) { return reason == FinishReason::length ? "length" : "stop"; }

struct StatusRow {
  ErrorCode code;
  int status;
  const char* type;
  const char* name;
};
// One table from our codes to HTTP.
constexpr StatusRow kStatuses[] = {
    {ErrorCode::invalid_argument, 400, "invalid_request_error", "invalid_value"},
    {ErrorCode::corrupt, 400, "invalid_request_error", "invalid_json"},
    {ErrorCode::unsupported, 400, "invalid_request_error", "unsupported_value"},
    {ErrorCode::not_found, 501, "not_supported", "not_supported"},
    {ErrorCode::out_of_memory, 503, "unavailable_error", "out_of_memory"},
    {ErrorCode::io, 500, "server_error", "io_error"},
    {ErrorCode::cancelled, 503, "unavailable_error", "cancelled"},
    {ErrorCode::internal, 500, "server_error", "internal_error"},
};

}  // namespace

Reply error_reply(int status, const std::string& type, const std::string& code, const std::string& message,
                  const std::string& param) {
  const Json body = {
      {"error",
       {{"message", message}, {"type", type}, {"param", param.empty() ? Json() : Json(param)}, {"code", code}}}};
  return {status, dump_json(body)};
}

Reply error_reply(const Error& error) {
  for (const StatusRow& row : kStatuses)
    if (row.code == error.code) return error_reply(row.status, row.type, row.name, error.message, error.field);
  return error_reply(500, "server_error", "internal_error", error.message);
}

/// A request that was checked; the step thread turns it into an answer.
struct ChatApi::Call {
  GenerationRequest request;                  // prompt filled per choice
  std::vector<std::vector<int32_t>> prompts;  // one for a chat
  std::vector<std::string> echoes;            // completions with echo: the prompt's text
  std::string id, model;
  int64_t created = unix_seconds();
  bool stream = false, include_usage = false, thinking = false, echo = false;

  Json head(const char* object) const {
    return {{"id", id}, {"object", object}, {"created", created}, {"model", model}};
  }
};

namespace {

/// Counts over the choices of a call.
struct Usage {
  int64_t prompt = 0, completion = 0, reasoning = 0;
  void add(const GenerationResult& result) {
    prompt += result.prompt_tokens;
    completion += result.completion_tokens;
  }
  Json json() const {
    return {{"prompt_tokens", prompt},
            {"completion_tokens", completion},
            {"total_tokens", prompt + completion},
            {"prompt_tokens_details", {{"cached_tokens", 0}}},
            {"completion_tokens_details", {{"reasoning_tokens", reasoning}}}};
  }
};

// What happened after the status line was sent: the error, then the end.
void fail_stream(Exchange& exchange, const Error& error) {
  exchange.emit("data: " + error_reply(error).body + "\n\ndata: [DONE]\n\n");
  exchange.finish();
}

}  // namespace

ChatApi::ChatApi(Engine& engine, const Tokenizer& tokenizer, Result<ProseConstants> constants, SamplingParams defaults,
                 Options options)
    : engine_(engine),
      tokenizer_(tokenizer),
      constants_(std::move(constants)),
      defaults_(defaults),
      options_(std::move(options)),
      created_(unix_seconds()) {}

Outcome ChatApi::handle(const HttpRequest& request) {
  std::string path = request.target.substr(0, request.target.find('?'));
  if (path == "/health" || path == "/v1/health")
    path = "/health";
  else if (!path.starts_with("/v1/"))
    path = "/v1" + path;
  const bool is_get = path == "/health" || path == "/v1/models" || path.starts_with("/v1/models/");
  const bool is_post = path == "/v1/completions" || path == "/v1/chat/completions";
  if (!is_get && !is_post)
    return error_reply(
        404, "not_found_error", "not_found",
        "there is no " + request.target + "; see /v1/models, /v1/completions, /v1/chat/completions, /health");
  if (request.method != (is_get ? "GET" : "POST")) {
    Reply reply = error_reply(405, "invalid_request_error", "method_not_allowed",
                              request.target + " takes " + (is_get ? "GET" : "POST") + ", not " + request.method);
    reply.headers.emplace_back("Allow", is_get ? "GET" : "POST");
    return reply;
  }
  if (path == "/health") return Reply{200, dump_json(Json{{"status", "ok"}, {"waiting", queue_.waiting()}})};
  if (path == "/v1/models") return Reply{200, dump_json(Json{{"object", "list"}, {"data", Json::array({model()})}})};
  if (is_get) {
    if (path.substr(11) != options_.model_name)
      return error_reply(404, "not_found_error", "model_not_found",
                         "the only model here is '" + options_.model_name + "'", "model");
    return Reply{200, dump_json(model())};
  }
  if (!request.content_type.empty() && request.content_type.find("json") == std::string::npos)
    return error_reply(415, "invalid_request_error", "unsupported_media_type",
                       "the body should be application/json, not " + request.content_type);
  Result<Json> body = parse_json(request.body);
  if (!body) return error_reply(std::move(body).error().with("the body"));
  if (!body->is_object()) return error_reply(field_error("body", "should be a JSON object"));
  return path == "/v1/completions" ? completions(*body) : chat_completions(*body);
}

Json ChatApi::model() const {
  return {{"id", options_.model_name},
          {"object", "model"},
          {"created", created_},
          {"owned_by", "thermocline"},
          {"max_model_len", engine_.max_context()}};
}

Result<std::shared_ptr<ChatApi::Call>> ChatApi::read_call(const Json& body) const {
  auto call = std::make_shared<Call>();
  const Fields fields(body);
  TC_ASSIGN(call->request, read_generation_fields(fields, defaults_));
  TC_ASSIGN(call->model, fields.text("model", options_.model_name));
  TC_ASSIGN(call->stream, fields.boolean("stream", false));
  if (const Json* options = fields.find("stream_options")) {
    if (!options->is_object()) return field_error("stream_options", "should be an object");
    TC_ASSIGN(call->include_usage, Fields(*options).boolean("include_usage", false));
  }
  for (const char* name : {"logprobs", "top_logprobs", "prompt_logprobs", "logit_bias", "suffix"}) {
    const Json* value = fields.find(name);
    if (value && *value != false && *value != 0 && !(value->is_object() && value->empty()))
      return Error{ErrorCode::unsupported, std::string(name) + " is not supported", name};
  }
  return call;
}

Status ChatApi::check_length(const std::vector<int32_t>& prompt) const {
  if (prompt.empty()) return field_error("prompt", "should not be empty");
  const int64_t length = static_cast<int64_t>(prompt.size());
  if (length < engine_.max_context()) return {};
  return field_error("prompt", "has " + std::to_string(length) + " tokens; the context holds " +
                                   std::to_string(engine_.max_context()) + ", answer included");
}

// A string, a list of strings, token ids, or a list of such lists. Text gets a BOS in front unless it has one.
Result<std::vector<std::vector<int32_t>>> ChatApi::read_prompts(const Json& body) const {
  const Json* prompt = Fields(body).find("prompt");
  if (!prompt) return field_error("prompt", "is missing");
  const bool one = prompt->is_string() || (prompt->is_array() && !prompt->empty() && (*prompt)[0].is_number());
  const Json list = one ? Json::array({*prompt}) : *prompt;
  if (!list.is_array() || list.empty() || list.size() > kMaxPrompts)
    return field_error(
        "prompt", "should be a string, token ids, or a list of at most " + std::to_string(kMaxPrompts) + " of them");
  std::vector<std::vector<int32_t>> prompts;
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string where = one ? "prompt" : "prompt[" + std::to_string(i) + "]";
    std::vector<int32_t> ids;
    if (list[i].is_string()) {
      TC_ASSIGN(ids, tokenizer_.encode(list[i].get<std::string>()));
      const int32_t bos = engine_.geometry().bos_token_id;
      if (ids.empty() || ids[0] != bos) ids.insert(ids.begin(), bos);
    } else if (list[i].is_array()) {
      for (const Json& id : list[i]) {
        if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= engine_.geometry().vocab_size)
          return field_error(where + "[" + std::to_string(ids.size()) + "]",
                             "should be a token id below " + std::to_string(engine_.geometry().vocab_size));
        ids.push_back(id.get<int32_t>());
      }
    } else {
      return field_error(where, "should be a string or a list of token ids");
    }
    TC_RETURN_IF_ERROR(check_length(ids));
    prompts.push_back(std::move(ids));
  }
  return prompts;
}

Outcome ChatApi::start(std::shared_ptr<Call> call, void (ChatApi::*work)(Call&, Exchange&)) {
  auto exchange = std::make_shared<Exchange>();
  exchange->stream = call->stream;
  exchange->work = [this, call = std::move(call), work](Exchange& self) { (this->*work)(*call, self); };
  queue_.submit(exchange);
  return exchange;
}

Outcome ChatApi::completions(const Json& body) {
  Result<std::shared_ptr<Call>> call = read_call(body);
  if (!call) return error_reply(call.error());
  Result<std::vector<std::vector<int32_t>>> prompts = read_prompts(body);
  if (!prompts) return error_reply(prompts.error());
  Result<bool> echo = Fields(body).boolean("echo", false);
  if (!echo) return error_reply(echo.error());
  if (*echo)
    for (const std::vector<int32_t>& ids : *prompts) {
      const bool has_bos = ids[0] == engine_.geometry().bos_token_id;
      std::string text;
      for (const int32_t id : std::span(ids).subspan(has_bos)) text += tokenizer_.token_bytes(id);
      (*call)->echoes.push_back(std::move(text));
    }
  (*call)->id = random_id("cmpl-");
  (*call)->prompts = std::move(*prompts);
  return start(std::move(*call), &ChatApi::run_completions);
}

Result<GenerationResult> ChatApi::generate_one(const GenerationRequest& request, Exchange& exchange,
                                               const TextSink& sink) {
  TC_ASSIGN(const std::unique_ptr<Sequence> sequence, engine_.new_sequence());
  return generate(engine_, tokenizer_, *sequence, request, exchange.cancel, sink);
}

void ChatApi::run_completions(Call& call, Exchange& exchange) {
  Usage usage;
  Json choices = Json::array();
  const auto choice = [](size_t index, const std::string& text, Json reason) {
    return Json{{"text", text}, {"index", index}, {"logprobs", nullptr}, {"finish_reason", std::move(reason)}};
  };
  const auto send = [&](const Json& one) {
    Json chunk = call.head("text_completion");
    chunk["choices"] = Json::array({one});
    exchange.emit(event(chunk));
  };
  for (size_t i = 0; i < call.prompts.size(); ++i) {
    call.request.prompt = call.prompts[i];
    std::string text = call.echoes.empty() ? "" : call.echoes[i];
    if (call.stream && !text.empty()) send(choice(i, text, nullptr));
    Result<GenerationResult> result = generate_one(call.request, exchange, [&](const std::string& piece, int32_t) {
      text += piece;
      if (call.stream && !piece.empty()) send(choice(i, piece, nullptr));
      return true;
    });
    if (!result)
      return call.stream ? fail_stream(exchange, result.error()) : exchange.finish(error_reply(result.error()));
    usage.add(*result);
    if (result->reason == FinishReason::cancelled) return exchange.finish();
    if (call.stream)
      send(choice(i, "", finish_name(result->reason)));
    else
      choices.push_back(choice(i, text, finish_name(result->reason)));
  }
  Json body = call.head("text_completion");
  body["choices"] = choices;
  body["usage"] = usage.json();
  if (!call.stream) return exchange.finish({200, dump_json(body)});
  if (call.include_usage) exchange.emit(event(body));
  exchange.emit("data: [DONE]\n\n");
  exchange.finish();
}

// Messages with tools and response format where the encoding wants them: on the system message.
Status ChatApi::read_chat(const Json& body, Call& call) const {
  const Fields fields(body);
  const Json* given = fields.find("messages");
  if (!given) return field_error("messages", "is missing");
  if (!given->is_array() || given->empty())
    return field_error("messages", "should be a list with at least one message");
  Json messages = *given;
  const auto system = [&]() -> Json& {
    if (!messages[0].is_object() || !messages[0].contains("role") || messages[0]["role"] != "system")
      messages.insert(messages.begin(), Json{{"role", "system"}, {"content", ""}});
    return messages[0];
  };
  std::string choice = "auto";
  if (const Json* tool_choice = fields.find("tool_choice")) {
    choice = tool_choice->is_string() ? tool_choice->get<std::string>() : "a named function";
    if (choice != "auto" && choice != "none")
      return Error{ErrorCode::unsupported, "tool_choice '" + choice + "' is not supported; auto and none are",
                   "tool_choice"};
  }
  if (const Json* tools = fields.find("tools")) {
    if (!tools->is_array()) return field_error("tools", "should be a list");
    if (!tools->empty() && choice != "none") system()["tools"] = *tools;
  }
  if (const Json* format = fields.find("response_format")) {
    if (!format->is_object()) return field_error("response_format", "should be an object");
    TC_ASSIGN(const std::string type, Fields(*format).text("type", "text"));
    if (type != "text" && type != "json_object" && type != "json_schema")
      return field_error("response_format.type", "is '" + type + "'; text, json_object and json_schema are known");
    if (type != "text") system()["response_format"] = *format;
  }

  ChatOptions options;
  options.thinking = options_.think;
  TC_ASSIGN(std::string effort, fields.text("reasoning_effort", ""));
  if (!effort.empty()) options.thinking = effort != "none" && effort != "minimal";
  if (effort == "none" || effort == "minimal") effort = "";
  if (effort == "medium") effort = "high";
  if (effort == "xhigh") effort = "max";
  options.reasoning_effort = effort;
  if (const Json* thinking = fields.find("thinking")) {
    if (!thinking->is_object()) return field_error("thinking", "should be an object with a type");
    TC_ASSIGN(const std::string type, Fields(*thinking).text("type", "enabled"));
    if (type != "enabled" && type != "disabled")
      return field_error("thinking.type", "is '" + type + "'; enabled and disabled are known");
    options.thinking = type == "enabled";
  }
  if (const Json* kwargs = fields.find("chat_template_kwargs")) {
    if (!kwargs->is_object()) return field_error("chat_template_kwargs", "should be an object");
    for (const char* name : {"thinking", "enable_thinking"}) {
      TC_ASSIGN(options.thinking, Fields(*kwargs).boolean(name, options.thinking));
    }
  }
  TC_ASSIGN(const RenderedPrompt prompt, render_chat(*constants_, messages, options));
  TC_ASSIGN(std::vector<int32_t> ids, tokenizer_.encode(prompt.text, prompt.literal));
  if (Status status = check_length(ids); !status.ok()) {
    Error error = std::move(status).error();
    error.field = "messages";
    return error;
  }
  call.thinking = options.thinking;
  call.request.prompt = std::move(ids);
  return {};
}

Outcome ChatApi::chat_completions(const Json& body) {
  if (!constants_) return error_reply(constants_.error());
  Result<std::shared_ptr<Call>> call = read_call(body);
  if (!call) return error_reply(call.error());
  if (Status status = read_chat(body, **call); !status.ok()) return error_reply(status.error());
  (*call)->id = random_id("chatcmpl-");
  return start(std::move(*call), &ChatApi::run_chat);
}

namespace {

/// A chat answer as it grows: the message of a plain reply, or deltas.
class ChatAnswer {
 public:
  using Send = std::function<void(Json delta)>;
  ChatAnswer(const ProseConstants& constants, bool thinking, Send send)
      : stream_(constants, thinking), send_(std::move(send)) {}

  void push(const std::string& text) { take(stream_.push(text)); }
  void finish() { take(stream_.finish()); }
  bool in_reasoning() const { return content_.empty() && calls_.empty() && !reasoning_.empty(); }
  bool has_calls() const { return !calls_.empty(); }

  Json message() const {
    Json message = {{"role", "assistant"}, {"content", calls_.empty() || !content_.empty() ? Json(content_) : Json()}};
    if (!reasoning_.empty()) message["reasoning_content"] = reasoning_;
    if (!calls_.empty()) message["tool_calls"] = calls_;
    return message;
  }

 private:
  void take(const std::vector<CompletionStream::Event>& events) {
    using Kind = CompletionStream::Event::Kind;
    for (const auto& event : events) {
      Json delta;
      switch (event.kind) {
        case Kind::reasoning:
          reasoning_ += event.text;
          delta["reasoning_content"] = event.text;
          break;
        case Kind::content:
          content_ += event.text;
          delta["content"] = event.text;
          break;
        case Kind::tool_name: {
          Json call = {{"id", random_id("call_")},
                       {"type", "function"},
                       {"function", {{"name", event.text}, {"arguments", ""}}}};
          calls_.push_back(call);
          Json first = {{"index", event.index}};
          first.update(call);
          delta["tool_calls"] = Json::array({first});
          break;
        }
        case Kind::tool_arguments: {
          Json& arguments = calls_[static_cast<size_t>(event.index)]["function"]["arguments"];
          arguments = arguments.get<std::string>() + event.text;
          delta["tool_calls"] = Json::array({Json{{"index", event.index}, {"function", {{"arguments", event.text}}}}});
          break;
        }
      }
      if (first_) {
        Json with_role = {{"role", "assistant"}};
        with_role.update(delta);
        delta = with_role;
        first_ = false;
      }
      send_(delta);
    }
  }

  CompletionStream stream_;
  Send send_;
  std::string reasoning_, content_;
  Json calls_ = Json::array();
  bool first_ = true;
};

}  // namespace

void ChatApi::run_chat(Call& call, Exchange& exchange) {
  const auto chunk = [&](Json delta, Json reason) {
    Json json = call.head("chat.completion.chunk");
    json["choices"] = Json::array(
        {Json{{"index", 0}, {"delta", std::move(delta)}, {"logprobs", nullptr}, {"finish_reason", std::move(reason)}}});
    return event(json);
  };
  Usage usage;
  ChatAnswer answer(*constants_, call.thinking, [&](Json delta) {
    if (call.stream) exchange.emit(chunk(std::move(delta), nullptr));
  });
  Result<GenerationResult> result = generate_one(call.request, exchange, [&](const std::string& piece, int32_t) {
    answer.push(piece);
    usage.reasoning += answer.in_reasoning();
    return true;
  });
  if (!result)
    return call.stream ? fail_stream(exchange, result.error()) : exchange.finish(error_reply(result.error()));
  if (result->reason == FinishReason::cancelled) return exchange.finish();
  answer.finish();
  usage.add(*result);
  const std::string reason =
      answer.has_calls() && result->reason == FinishReason::stop ? "tool_calls" : finish_name(result->reason);
  if (!call.stream) {
    Json body = call.head("chat.completion");
    body["choices"] = Json::array(
        {Json{{"index", 0}, {"message", answer.message()}, {"logprobs", nullptr}, {"finish_reason", reason}}});
    body["usage"] = usage.json();
    return exchange.finish({200, dump_json(body)});
  }
  exchange.emit(chunk(Json::object(), reason));
  if (call.include_usage) {
    Json last = call.head("chat.completion.chunk");
    last["choices"] = Json::array();
    last["usage"] = usage.json();
    exchange.emit(event(last));
  }
  exchange.emit("data: [DONE]\n\n");
  exchange.finish();
}

}  // namespace thermocline::server
