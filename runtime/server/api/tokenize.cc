#include "runtime/server/api/tokenize.h"

#include "runtime/server/api/render.h"
#include "runtime/server/wire/request_fields.h"
#include "runtime/text/utf8.h"

namespace thermocline::server {
namespace {

bool is_text(std::string_view bytes) {
  while (!bytes.empty()) {
    const int length = utf8_length(bytes);
    if (length < 1) return false;
    bytes.remove_prefix(static_cast<size_t>(length));
  }
  return true;
}

// A text, or a list of bytes that are none by themselves.
Json piece_json(std::string_view bytes) {
  if (is_text(bytes)) return std::string(bytes);
  Json numbers = Json::array();
  for (const char byte : bytes) numbers.push_back(static_cast<unsigned char>(byte));
  return numbers;
}

// Ids of a text; BOS in front if it is asked for and not there.
Result<std::vector<int32_t>> encode_text(const ServedModel& model, const std::string& text, bool bos, bool special) {
  const TextSpan all{0, text.size()};
  TC_ASSIGN(std::vector<int32_t> ids, model.tokenizer.encode(text, std::span(&all, special ? 0 : 1)));
  if (bos && (ids.empty() || ids[0] != model.bos_token_id)) ids.insert(ids.begin(), model.bos_token_id);
  return ids;
}

// llama.cpp's: {content, add_special, parse_special, with_pieces} -> {tokens}.
Result<Json> tokenize_content(const ServedModel& model, const Json& body) {
  const Fields fields(body);
  TC_ASSIGN(const std::string content, fields.required_text("content"));
  TC_ASSIGN(const bool bos, fields.boolean("add_special", false));
  TC_ASSIGN(const bool special, fields.boolean("parse_special", true));
  TC_ASSIGN(const bool pieces, fields.boolean("with_pieces", false));
  TC_ASSIGN(const std::vector<int32_t> ids, encode_text(model, content, bos, special));
  if (!pieces) return Json{{"tokens", ids}};
  Json tokens = Json::array();
  for (const int32_t id : ids)
    tokens.push_back(Json{{"id", id}, {"piece", piece_json(model.tokenizer.token_bytes(id))}});
  return Json{{"tokens", std::move(tokens)}};
}

// vLLM's answer, with the tokens' texts where they are asked for.
Result<Json> counted_tokens(const ServedModel& model, const Json& body, const std::vector<int32_t>& ids) {
  TC_ASSIGN(const bool strings, Fields(body).boolean("return_token_strs", false));
  Json out = {{"count", ids.size()}, {"max_model_len", model.max_context}, {"tokens", ids}, {"token_strs", nullptr}};
  if (strings) {
    out["token_strs"] = Json::array();
    for (const int32_t id : ids) out["token_strs"].push_back(std::string(model.tokenizer.token_bytes(id)));
  }
  return out;
}

// vLLM's: {prompt, add_special_tokens, return_token_strs} -> {count, max_model_len, tokens, token_strs}.
Result<Json> tokenize_prompt(const ServedModel& model, const Json& body) {
  const Fields fields(body);
  TC_ASSIGN(const std::string prompt, fields.required_text("prompt"));
  TC_ASSIGN(const bool bos, fields.boolean("add_special_tokens", true));
  TC_ASSIGN(const bool special, fields.boolean("parse_special", true));
  TC_ASSIGN(const std::vector<int32_t> ids, encode_text(model, prompt, bos, special));
  return counted_tokens(model, body, ids);
}

// Both names of the text: llama.cpp's and vLLM's.
Result<Json> detokenize(const Call& call, const Json& body) {
  const ServedModel& model = *call.model;
  if (!Fields(body).find("tokens")) return field_error("tokens", "is missing");
  const size_t most = 16 * static_cast<size_t>(model.max_context);
  TC_ASSIGN(const std::vector<int32_t> ids, Fields(body).token_ids("tokens", model.vocab_size, most));
  const std::string text = text_of(model, ids);
  return Json{{"content", text}, {"prompt", text}};
}

// What lm-eval's tokenizer of a remote server reads, in the words of tokenizer_config.json.
Reply tokenizer_info(const ServedModel& model) {
  const ModelFacts& facts = model.facts;
  const auto or_null = [](const std::string& text) { return text.empty() ? Json() : Json(text); };
  return {200, dump_json(Json{{"tokenizer_class", or_null(facts.tokenizer_class)},
                              {"bos_token", or_null(facts.bos_token)},
                              {"bos_token_id", model.bos_token_id},
                              {"eos_token", or_null(facts.eos_token)},
                              {"eos_token_id", facts.eos_token_id},
                              {"pad_token", or_null(facts.pad_token)},
                              {"unk_token", nullptr},
                              {"add_bos_token", true},
                              {"add_eos_token", false},
                              {"chat_template", nullptr},
                              {"model_max_length", model.max_context},
                              {"vocab_size", model.vocab_size}})};
}

Result<Json> tokenize(Services& services, const Call& call, const Json& body) {
  const Fields fields(body);
  if (fields.find("content")) return tokenize_content(*call.model, body);
  if (!fields.find("messages")) return tokenize_prompt(*call.model, body);
  Json chat = body;
  for (const char* own : {"add_special_tokens", "return_token_strs"}) chat.erase(own);  // no fields of a chat
  TC_ASSIGN(const std::vector<int32_t> ids, chat_prompt_ids(services, call, chat));
  return counted_tokens(*call.model, body, ids);
}

}  // namespace

std::vector<Endpoint> tokenize_endpoints(Services& services) {
  const auto tokenizes = [&services](Call asked) {
    return prepared(services, std::move(asked),
                    [&services](const Call& call, const Json& body) { return tokenize(services, call, body); });
  };
  const auto detokenizes = [&services](Call asked) { return prepared(services, std::move(asked), detokenize); };
  return {{.method = "POST", .path = "/tokenize", .answer = tokenizes},
          {.method = "POST", .path = "/detokenize", .answer = detokenizes},
          {.method = "GET", .path = "/tokenizer_info", .answer = [](const Call& call) -> Outcome {
             return tokenizer_info(*call.model);
           }}};
}

}  // namespace thermocline::server
