#include "runtime/server/api/logprobs.h"

#include <algorithm>
#include <cmath>

#include "runtime/text/utf8.h"

namespace thermocline::server {

Json finite_or_null(float value) { return std::isfinite(value) ? Json(value) : Json(); }

std::string token_text(const Tokenizer& tokenizer, int32_t id) { return to_valid_utf8(tokenizer.token_bytes(id)); }

namespace {

Json entry(const Tokenizer& tokenizer, int32_t id, float logprob) {
  Json bytes = Json::array();
  for (const char byte : tokenizer.token_bytes(id)) bytes.push_back(static_cast<unsigned char>(byte));
  return {{"token", token_text(tokenizer, id)}, {"logprob", finite_or_null(logprob)}, {"bytes", std::move(bytes)}};
}

// Of a part of a text: a character that is cut counts where it begins.
int64_t characters(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; });
}

}  // namespace

Json chat_logprob(const Tokenizer& tokenizer, const SampledToken& token) {
  Json json = entry(tokenizer, token.id, token.logprob);
  Json top = Json::array();
  for (const TokenLogprob& t : token.top) top.push_back(entry(tokenizer, t.id, t.logprob));
  json["top_logprobs"] = std::move(top);
  return json;
}

Json prompt_logprobs(const Tokenizer& tokenizer, const std::vector<SampledToken>& tokens) {
  Json list = Json::array();
  for (const SampledToken& token : tokens) {
    if (list.empty()) {
      list.push_back(nullptr);
      continue;
    }
    Json table = Json::object();
    const auto add = [&](int32_t id, float logprob, Json rank) {
      table[std::to_string(id)] = {{"logprob", finite_or_null(logprob)},
                                   {"rank", std::move(rank)},
                                   {"decoded_token", token_text(tokenizer, id)}};
    };
    add(token.id, token.logprob, nullptr);
    for (size_t i = 0; i < token.top.size(); ++i) add(token.top[i].id, token.top[i].logprob, i + 1);
    list.push_back(std::move(table));
  }
  return list;
}

// Two tokens may have one text (halves of characters): the likelier one keeps it. The chosen token is always listed.
void CompletionLogprobs::add(const SampledToken& token, const Token& what) {
  const std::string text = token_text(tokenizer_, token.id);
  tokens_.push_back(text);
  logprobs_.push_back(what.known ? finite_or_null(token.logprob) : Json());
  Json table;
  if (what.known && what.top) {
    table = Json::object();
    const auto list = [&](int32_t id, float logprob) {
      std::string name = token_text(tokenizer_, id);
      if (!table.contains(name)) table[std::move(name)] = finite_or_null(logprob);
    };
    for (const TokenLogprob& t : token.top) list(t.id, t.logprob);
    list(token.id, token.logprob);
  }
  top_.push_back(std::move(table));
  offsets_.push_back(offset_);
  if (what.in_text) offset_ += characters(tokenizer_.token_bytes(token.id));
}

Json CompletionLogprobs::take() {
  Json json = {{"tokens", std::move(tokens_)},
               {"token_logprobs", std::move(logprobs_)},
               {"top_logprobs", std::move(top_)},
               {"text_offset", std::move(offsets_)}};
  tokens_ = logprobs_ = top_ = offsets_ = Json::array();
  return json;
}

}  // namespace thermocline::server
