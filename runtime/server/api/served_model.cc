#include "runtime/server/api/served_model.h"

#include <algorithm>

#include "runtime/server/wire/request_fields.h"

namespace thermocline::server {
namespace {

constexpr size_t kLongestName = 256;

}  // namespace

size_t ServedModel::longest_token_of(const Tokenizer& tokenizer) {
  size_t longest = 1;
  for (int32_t id = 0; id < tokenizer.size(); ++id) longest = std::max(longest, tokenizer.token_bytes(id).size());
  return longest;
}

QueueCounters::Amount ServedModel::estimate(uint64_t body_bytes) const {
  const int64_t bytes = static_cast<int64_t>(std::min<uint64_t>(body_bytes, INT64_MAX));
  return {1, std::min(bytes / 4, max_context), bytes};
}

std::vector<std::string> ServedModel::names() const {
  std::vector<std::string> names = {name};
  names.insert(names.end(), aliases.begin(), aliases.end());
  return names;
}

bool ServedModel::has_name(const std::string& asked) const {
  return asked == name || std::find(aliases.begin(), aliases.end(), asked) != aliases.end();
}

std::string ServedModel::names_text() const {
  std::string text;
  for (const std::string& one : names()) text += (text.empty() ? "'" : ", '") + one + "'";
  return text;
}

Status ServedModel::check_name(const std::string& asked) const {
  // Every chunk repeats it.
  if (asked.size() > kLongestName)
    return field_error("model", "should have at most " + std::to_string(kLongestName) + " bytes");
  if (!strict_name || has_name(asked)) return {};
  return Error{ErrorCode::not_found,
               "there is no model '" + asked.substr(0, 256) + "' here; this server has " + names_text(), "model"};
}

// Without the name that was asked for: clients choose its bytes.
ServedModel::Headers ServedModel::name_headers(const std::string& asked) const {
  if (has_name(asked)) return {};
  std::string text = "the model of the request is not one of this server's; answered by " + names_text();
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return {{"x-thermocline-warning", text}};
}

Status ServedModel::check_bytes(size_t text_bytes, const std::string& field) const {
  if (text_bytes <= most_text_bytes()) return {};
  const int64_t least = static_cast<int64_t>(text_bytes / longest_token);
  Error error{ErrorCode::context_length,
              field + " has " + std::to_string(text_bytes) + " bytes, at least " + std::to_string(least) +
                  " tokens; the context holds " + std::to_string(max_context) + ", answer included",
              field};
  error.counts = {{"n_prompt_tokens_min", least}, {"n_ctx", max_context}};
  return error;
}

}  // namespace thermocline::server
