#include "runtime/server/api/messages.h"

#include <sodium.h>

#include "runtime/server/api/anthropic_translation.h"
#include "runtime/server/wire/ids.h"
#include "runtime/server/wire/request_fields.h"

namespace thermocline::server {
namespace {

std::string event(const char* name, const Json& data) {
  return std::string("event: ") + name + "\ndata: " + dump_json(data) + "\n\n";
}

// Clients hand a thinking block back with its signature, and want one: of the text, and nobody has to check it.
std::string signature_of(const std::string& thinking) {
  unsigned char digest[crypto_generichash_BYTES];
  crypto_generichash(digest, sizeof digest, reinterpret_cast<const unsigned char*>(thinking.data()), thinking.size(),
                     nullptr, 0);
  char text[sodium_base64_ENCODED_LEN(sizeof digest, sodium_base64_VARIANT_ORIGINAL)];
  return sodium_bin2base64(text, sizeof text, digest, sizeof digest, sodium_base64_VARIANT_ORIGINAL);
}

Result<Json> count_tokens(const Call& call, const Json& body) {
  TC_ASSIGN(const ChatTranslation chat, translate_anthropic(body, call.model->think));
  Result<ChatPrompt> prompt = read_chat_prompt(*call.model, chat.body);
  if (!prompt) return anthropic_error(chat, std::move(prompt).error());
  TC_ASSIGN(const std::vector<int32_t> ids, encode(*call.model, *prompt));
  return Json{{"input_tokens", ids.size()}};
}

}  // namespace

Result<std::vector<Request>> MessagesGeneration::read(const Json& body) {
  TC_RETURN_IF_ERROR(read_common(body, "msg_"));
  TC_ASSIGN(const ChatTranslation chat, translate_anthropic(body, model_.think));
  const auto refused = [&](Error error) { return anthropic_error(chat, std::move(error)); };
  Result<Request> request = read_generation_fields(Fields(chat.body), model_.defaults, model_.vocab_size, arrived_);
  if (!request) return refused(std::move(request).error());
  if (request->max_tokens == 0) return field_error("max_tokens", "should be at least 1");
  Result<ChatPrompt> prompt = read_chat_prompt(model_, chat.body);
  if (!prompt) return refused(std::move(prompt).error());
  TC_RETURN_IF_ERROR(wanted());
  TC_RETURN_IF_ERROR(put_prompt(model_, *prompt, *request));
  stream_.emplace(*model_.constants, prompt->rendered.in_reasoning, std::move(prompt->tools));
  std::vector<Request> requests;
  requests.push_back(std::move(*request));
  return requests;
}

Error MessagesGeneration::told(Error error) const { return too_long_for_anthropic(Generation::told(std::move(error))); }

// --- network thread ---

Json MessagesGeneration::usage() const {
  return {{"input_tokens", usage_.prompt - usage_.cached},
          {"cache_creation_input_tokens", 0},
          {"cache_read_input_tokens", usage_.cached},
          {"output_tokens", usage_.completion}};
}

Json MessagesGeneration::message() const {
  return {{"id", id_},
          {"type", "message"},
          {"role", "assistant"},
          {"model", model_name_},
          {"content", blocks_},
          {"stop_reason", stop_reason_.empty() ? Json() : Json(stop_reason_)},
          {"stop_sequence", stop_sequence_},
          {"usage", usage()}};
}

void MessagesGeneration::on_event(size_t, const TokenEvent& token, std::string& out) {
  if (streams_ && !std::exchange(began_, true))
    out += event("message_start", {{"type", "message_start"}, {"message", message()}});
  const bool reasoned = stream_->in_reasoning();
  for (const auto& piece : stream_->push(token.text)) tell(piece, out);
  if (token.kind == TokenEvent::Kind::token && reasoned && stream_->in_reasoning()) ++usage_.reasoning;
  if (token.kind != TokenEvent::Kind::finish) return;
  for (const auto& piece : stream_->finish(token.reason != FinishReason::stop)) tell(piece, out);
  close_block(out);
  const bool calls = stream_->tool_calls() > 0;
  if (!token.stop.empty()) stop_sequence_ = token.stop;
  stop_reason_ = token.reason == FinishReason::length ? "max_tokens"
                 : calls                              ? "tool_use"
                 : !token.stop.empty()                ? "stop_sequence"
                                                      : "end_turn";
  entry_.finish = calls && token.reason == FinishReason::stop ? "tool_calls" : finish_name(token.reason);
}

void MessagesGeneration::tell(const CompletionStream::Event& piece, std::string& out) {
  using Kind = CompletionStream::Event::Kind;
  const auto append = [&](Json& block, const char* member, const char* type) {
    block[member].get_ref<std::string&>() += piece.text;
    delta({{"type", type}, {member, piece.text}}, out);
  };
  switch (piece.kind) {
    case Kind::reasoning:
      append(block("thinking", {{"thinking", ""}, {"signature", ""}}, out), "thinking", "thinking_delta");
      break;
    case Kind::content:
      append(block("text", {{"text", ""}}, out), "text", "text_delta");
      break;
    case Kind::tool_name:
      close_block(out);
      block("tool_use", {{"id", random_id("toolu_")}, {"name", piece.text}, {"input", Json::object()}}, out);
      break;
    case Kind::tool_arguments:
      if (Result<Json> input = parse_json(piece.text)) blocks_.back()["input"] = std::move(*input);
      delta({{"type", "input_json_delta"}, {"partial_json", piece.text}}, out);
      break;
  }
}

/// The open block, if it is of this type, else a new one.
Json& MessagesGeneration::block(const std::string& type, const Json& fresh, std::string& out) {
  if (open_ && blocks_.back()["type"] == type) return blocks_.back();
  close_block(out);
  Json start = {{"type", type}};
  start.update(fresh);
  blocks_.push_back(std::move(start));
  open_ = true;
  if (streams_)
    out += event("content_block_start",
                 {{"type", "content_block_start"}, {"index", blocks_.size() - 1}, {"content_block", blocks_.back()}});
  return blocks_.back();
}

void MessagesGeneration::delta(Json delta, std::string& out) const {
  if (!streams_) return;
  out += event("content_block_delta",
               {{"type", "content_block_delta"}, {"index", blocks_.size() - 1}, {"delta", std::move(delta)}});
}

void MessagesGeneration::close_block(std::string& out) {
  if (!std::exchange(open_, false)) return;
  Json& last = blocks_.back();
  if (last["type"] == "thinking") {
    last["signature"] = signature_of(last["thinking"].get_ref<const std::string&>());
    delta({{"type", "signature_delta"}, {"signature", last["signature"]}}, out);
  }
  if (streams_) out += event("content_block_stop", {{"type", "content_block_stop"}, {"index", blocks_.size() - 1}});
}

std::string MessagesGeneration::last_events() {
  const Json delta = {{"stop_reason", stop_reason_}, {"stop_sequence", stop_sequence_}};
  return event("message_delta", {{"type", "message_delta"}, {"delta", delta}, {"usage", usage()}}) +
         event("message_stop", {{"type", "message_stop"}});
}

Json MessagesGeneration::reply_body() { return message(); }

std::string MessagesGeneration::sign_of_life() { return event("ping", {{"type", "ping"}}); }

std::string MessagesGeneration::error_events(const Reply& reply) {
  return "event: error\ndata: " + reply.body + "\n\n";
}

std::vector<Endpoint> messages_endpoints(Services& services) {
  return {{.method = "POST",
           .path = "/v1/messages",
           .dialect = Dialect::anthropic,
           .queued = true,
           .answer =
               [&services](Call call) {
                 return Generation::begin(std::make_shared<MessagesGeneration>(std::move(call), services));
               }},
          {.method = "POST",
           .path = "/v1/messages/count_tokens",
           .dialect = Dialect::anthropic,
           .answer = [&services](Call call) { return prepared(services, std::move(call), count_tokens); }}};
}

}  // namespace thermocline::server
