#include "runtime/server/api/generation.h"

#include <algorithm>
#include <cmath>

#include "runtime/base/log.h"
#include "runtime/server/wire/ids.h"
#include "runtime/server/wire/request_fields.h"

namespace thermocline::server {
namespace {

double seconds_since(std::chrono::steady_clock::time_point then) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - then).count();
}

}  // namespace

Json Usage::json() const {
  return {{"prompt_tokens", prompt},
          {"completion_tokens", completion},
          {"total_tokens", prompt + completion},
          {"prompt_tokens_details", {{"cached_tokens", cached}}},
          {"completion_tokens_details", {{"reasoning_tokens", reasoning}}}};
}

Json timings_json(const AnswerStats& s) {
  Json json = {{"cache_n", s.cached_tokens}};
  const auto part = [&](const std::string& name, int64_t tokens, double seconds) {
    const auto count = static_cast<double>(tokens);
    json[name + "_n"] = tokens;
    json[name + "_ms"] = 1000 * seconds;
    json[name + "_per_token_ms"] = tokens > 0 ? 1000 * seconds / count : 0;
    json[name + "_per_second"] = seconds > 0 ? count / seconds : 0;
  };
  part("prompt", s.prompt_tokens - s.cached_tokens, s.prefill_seconds);
  part("predicted", s.completion_tokens, s.decode_seconds);
  return json;
}

std::string event_of(const Json& json) { return "data: " + dump_json(json) + "\n\n"; }

const char* finish_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::stop:
      return "stop";
    case FinishReason::length:
      return "length";
    case FinishReason::cancelled:
      return "cancelled";
    case FinishReason::error:
      return "error";
  }
  return "";
}

Generation::Generation(Call call, Services& services)
    : services_(services), call_(std::move(call)), model_(*call_.model), entry_(call_.http.head) {
  entry_.key = call_.client.name;
}

// What the body really takes is settled by submit().
Outcome Generation::begin(const std::shared_ptr<Generation>& g) {
  Result<KeyPlace> place = g->call_.client.take_place();
  if (!place) return error_reply(place.error());
  g->place_ = std::move(*place);
  Result<QueueTicket> ticket = g->model_.backend->ticket(g->model_.estimate(g->call_.http.body.size()));
  if (!ticket) return error_reply(ticket.error());
  g->ticket_ = std::move(*ticket);
  g->services_.book.began(g->entry_, std::weak_ptr<const RequestInProgress>(g));
  g->services_.prep.run([g] { g->prepare(); });
  return std::static_pointer_cast<Exchange>(g);
}

// --- prep pool ---

Status Generation::wanted() const {
  if (cancelled_) return Error{ErrorCode::cancelled, "the client has gone"};
  return {};
}

void Generation::prepare() {
  const auto self = shared_from_this();
  try {
    if (Status status = wanted(); !status.ok()) return refuse(error_reply(status.error()));
    // Token ids of every prompt that fits are let through: 16 prompts of a whole context.
    const JsonLimits limits{.values = 65536 + 16 * static_cast<size_t>(model_.max_context)};
    Result<Json> body = parse_bounded_json(call_.http.body, limits);
    std::string().swap(call_.http.body);
    if (!body) return refuse(unreadable_body(body.error()));
    if (!body->is_object()) return refuse(error_reply(field_error("body", "should be a JSON object")));
    Result<std::vector<Request>> requests = read(*body);
    *body = nullptr;
    if (!requests) return refuse(error_reply(requests.error()));
    if (Status status = wanted(); !status.ok()) return refuse(error_reply(status.error()));
    int64_t prompt_tokens = 0, max_tokens = -1;
    int choices = 0;
    for (Request& request : *requests) {
      if (model_.request_timeout.count() > 0)
        request.deadline = std::min(request.deadline, arrived_ + model_.request_timeout);
      prompt_tokens += static_cast<int64_t>(request.prompt.size());
      max_tokens = request.max_tokens;  // the same for all
      choices += request.choices;
    }
    Result<std::vector<std::shared_ptr<RequestHandle>>> handles = submit(std::move(*requests));
    if (!handles) return refuse(error_reply(handles.error()));
    for (const auto& handle : *handles)
      handle->stream().on_ready([weak = weak_from_this()] {
        if (const auto generation = weak.lock()) generation->ready();
      });
    {
      const std::lock_guard lock(mutex_);
      handles_ = std::move(*handles);
      prompt_tokens_ = prompt_tokens;
      max_tokens_ = max_tokens;
      choices_ = choices;
    }
    if (cancelled_) cancel();
    ready();
  } catch (const std::exception& exception) {
    log_error("request {}: {}", call_.http.head.request_id, exception.what());
    refuse(error_reply({ErrorCode::internal, "the request could not be read"}));
  }
}

void Generation::refuse(Reply reply) {
  ticket_.release();
  {
    const std::lock_guard lock(mutex_);
    refusal_ = std::move(reply);
  }
  ready();
}

// All or none: prompts of one body that find no place take the others with them.
Result<std::vector<std::shared_ptr<RequestHandle>>> Generation::submit(std::vector<Request> requests) {
  std::vector<std::shared_ptr<RequestHandle>> handles;
  for (Request& request : requests) {
    if (ticket_.held()) request.ticket = std::move(ticket_);
    request.id = call_.http.head.request_id;
    request.key = call_.client.name;
    request.cache_scope = call_.client.cache_salt;
    auto handle = model_.backend->submit(std::move(request));
    if (!handle) {
      for (const auto& other : handles) other->cancel();
      return told(std::move(handle).error());
    }
    handles.push_back(std::move(*handle));
  }
  return handles;
}

Error Generation::told(Error error) const {
  if (error.field == "prompt") error.field = prompt_field();
  return error;
}

Status Generation::read_common(const Json& body, const char* id_prefix) {
  const Fields fields(body);
  id_ = random_id(id_prefix);
  created_ =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  TC_ASSIGN(model_name_, fields.text("model", ""));
  if (model_name_.empty()) model_name_ = model_.name;
  TC_RETURN_IF_ERROR(model_.check_name(model_name_));
  {
    const std::lock_guard lock(mutex_);
    name_headers_ = model_.name_headers(model_name_);
  }
  TC_ASSIGN(const bool stream, fields.boolean("stream", false));
  if (const Json* options = fields.find("stream_options")) {
    if (!options->is_object()) return field_error("stream_options", "should be an object");
    const Fields stream_options(*options, "stream_options.");
    TC_ASSIGN(include_usage_, stream_options.boolean("include_usage", false));
    TC_ASSIGN(continuous_usage_, stream_options.boolean("continuous_usage_stats", false));
  }
  streams_ = stream;
  return {};
}

Status Generation::check_fields(const Json& body, std::span<const char* const> own) const {
  static constexpr const char* kCommon[] = {"model", "stream", "stream_options"};
  static constexpr const char* kWithoutEffect[] = {
      "user", "metadata", "store", "parallel_tool_calls", "service_tier", "safety_identifier", "prompt_cache_key"};
  const auto asked = call_.query.find("strict");
  if (!model_.strict_fields && (asked == call_.query.end() || asked->second == "0")) return {};
  for (const auto& [name, value] : body.items())
    if (const auto is = [&name = name](const char* known) { return name == known; };
        !std::ranges::any_of(own, is) && !std::ranges::any_of(kCommon, is) &&
        !std::ranges::any_of(generation_fields(), is) && !std::ranges::any_of(kWithoutEffect, is))
      return field_error(name.substr(0, 256), "is not a field of this endpoint");
  return {};
}

Status Generation::read_extras(const Fields& fields, Request& request) {
  TC_ASSIGN(const bool wanted, fields.boolean("return_progress", false));
  request.report_progress = wanted && streams_;
  TC_ASSIGN(return_ids_, fields.boolean("return_token_ids", false));
  TC_ASSIGN(timings_, fields.boolean("timings_per_token", false));
  const Json* const logprobs = fields.find("prompt_logprobs");
  if (!logprobs || *logprobs == false) return {};
  TC_ASSIGN(const int64_t top, fields.integer("prompt_logprobs", -1, 0, 20));
  if (streams_) return field_error("prompt_logprobs", "cannot be streamed");
  prompt_logprobs_ = true;
  request.prompt_top_logprobs = static_cast<int>(top);
  return {};
}

Json Generation::head(const char* object) const {
  return {{"id", id_},
          {"object", object},
          {"created", created_},
          {"model", model_name_},
          {"system_fingerprint", "thermocline-" TC_VERSION}};
}

// --- network thread ---

ServedModel::Headers Generation::headers() const {
  ServedModel::Headers headers;
  {
    const std::lock_guard lock(mutex_);
    headers = name_headers_;
  }
  if (call_.dialect == Dialect::openai)
    headers.emplace_back("openai-processing-ms", std::to_string(std::llround(1000 * seconds_since(arrived_))));
  return headers;
}

Exchange::Output Generation::take() {
  Output out;
  if (over_) return out;
  std::vector<std::shared_ptr<RequestHandle>> handles;
  std::optional<Reply> refusal;
  {
    const std::lock_guard lock(mutex_);
    refusal = std::exchange(refusal_, std::nullopt);
    handles = handles_;
    usage_.prompt = prompt_tokens_;
    entry_.max_tokens = max_tokens_;
    entry_.choices = choices_;
  }
  read_ = read_ || refusal || !handles.empty();
  if (refusal) return end_with(std::move(*refusal));
  bool finished = !handles.empty();
  for (size_t i = 0; i < handles.size(); ++i) {
    TokenStream& stream = handles[i]->stream();
    for (const TokenEvent& event : stream.take()) {
      count(i, event);
      if (event.kind == TokenEvent::Kind::progress) {
        out.bytes += progress(event);
        continue;
      }
      if (event.kind == TokenEvent::Kind::finish) {
        if (event.reason == FinishReason::error) return fail(event.error, out.bytes);
        if (event.reason == FinishReason::cancelled)
          return fail({ErrorCode::cancelled, "the answer was given up, as nobody took it"}, out.bytes);
      }
      on_event(i, event, out.bytes);
    }
    finished = finished && stream.finished();
  }
  if (finished) {
    over_ = out.finished = true;
    if (streams_)
      out.bytes += last_events() + end_of_stream();
    else
      out.reply = Reply{200, dump_json(reply_body()), headers()};
  }
  bytes_sent_ = bytes_sent_ || !out.bytes.empty();
  return out;
}

// In llama.cpp's words; without choices, so that nobody takes it for a token.
std::string Generation::progress(const TokenEvent& event) const {
  Json json = head(chunk_object());
  json["choices"] = Json::array();
  json["prompt_progress"] = {{"total", event.stats.prompt_tokens},
                             {"cache", event.stats.cached_tokens},
                             {"processed", event.processed_tokens},
                             {"time_ms", std::llround(1000 * event.stats.prefill_seconds)}};
  return event_of(json);
}

void Generation::count(size_t prompt, const TokenEvent& event) {
  if (event.kind == TokenEvent::Kind::token) {
    if (usage_.completion++ == 0) entry_.first_token_seconds = seconds_since(arrived_);
    answered_ = usage_.completion;
  }
  if (event.choice == 0) {  // from its first token on, and again with each: a stream may begin with it
    cached_of_.resize(std::max(cached_of_.size(), prompt + 1));
    usage_.cached += event.stats.cached_tokens - std::exchange(cached_of_[prompt], event.stats.cached_tokens);
    cached_ = usage_.cached;
  }
  if (event.kind == TokenEvent::Kind::finish) count_times(event.stats);
}

void Generation::count_times(const AnswerStats& stats) {
  entry_.queue_seconds = std::max(entry_.queue_seconds, stats.queue_seconds);
  entry_.prefill_seconds = std::max(entry_.prefill_seconds, stats.prefill_seconds);
  entry_.decode_seconds = std::max(entry_.decode_seconds, stats.decode_seconds);
}

// Of answers whose end nobody took: as the engine told it, or up to now where it has not yet.
void Generation::count_untaken_times() {
  const std::lock_guard lock(mutex_);
  for (const auto& handle : handles_) {
    const bool ended = handle->stream().ended();
    for (const TokenEvent& event : handle->stream().take())
      if (event.kind == TokenEvent::Kind::finish) count_times(event.stats);
    if (!ended) count_times(handle->times(std::chrono::steady_clock::now()));
  }
}

// `before`: of a stream, what was not sent yet.
Exchange::Output Generation::fail(const Error& error, const std::string& before) {
  cancel();
  entry_.finish = error.code == ErrorCode::cancelled ? "cancelled" : "error";
  Output out = end_with(error_reply(error));
  if (!out.reply) out.bytes.insert(0, before);
  return out;
}

// An error as a reply where nothing was sent, else as an event and the stream's end.
Exchange::Output Generation::end_with(Reply reply) {
  over_ = true;
  entry_.answered(reply);
  Output out;
  out.finished = true;
  if (bytes_sent_)
    out.bytes = error_events(shaped(std::move(reply)));
  else
    out.reply = shaped(std::move(reply));
  return out;
}

void Generation::cancel() {
  cancelled_ = true;
  const std::lock_guard lock(mutex_);
  for (const auto& handle : handles_) handle->cancel();
}

Exchange::Output Generation::abort(const Error& error) {
  if (over_) return {};
  return fail(error, "");
}

bool Generation::ended() const {
  const std::lock_guard lock(mutex_);
  return refusal_ || (!handles_.empty() &&
                      std::ranges::all_of(handles_, [](const auto& handle) { return handle->stream().ended(); }));
}

void Generation::closed(bool complete, int status) {
  if (!complete) cancel();
  count_untaken_times();
  entry_.status = status;
  entry_.complete = complete;
  entry_.prompt_tokens = usage_.prompt;
  entry_.cached_tokens = usage_.cached;
  entry_.completion_tokens = usage_.completion;
  if (!complete && entry_.finish.empty()) entry_.finish = "cancelled";
  entry_.total_seconds = seconds_since(arrived_);
  place_ = KeyPlace();
  services_.book.ended(entry_);
}

Reply Generation::shaped(Reply reply) const {
  return in_dialect(std::move(reply), call_.dialect, call_.http.head.request_id);
}

RequestInProgress::Look Generation::look() const {
  const std::lock_guard lock(mutex_);
  Look look{"preparing", prompt_tokens_, cached_, answered_};
  for (const auto& handle : handles_) {
    const RequestPhase phase = handle->phase();
    if (phase == RequestPhase::finished && &handle != &handles_.back()) continue;
    look.phase = phase == RequestPhase::waiting ? "waiting" : phase == RequestPhase::prefill ? "prefill" : "decode";
    break;
  }
  return look;
}

}  // namespace thermocline::server
