#include "runtime/server/api/served_model.h"

#include <algorithm>

namespace thermocline::server {

size_t ServedModel::longest_token_of(const Tokenizer& tokenizer) {
  size_t longest = 1;
  for (int32_t id = 0; id < tokenizer.size(); ++id) longest = std::max(longest, tokenizer.token_bytes(id).size());
  return longest;
}

QueueCounters::Amount ServedModel::estimate(uint64_t body_bytes) const {
  const int64_t bytes = static_cast<int64_t>(std::min<uint64_t>(body_bytes, INT64_MAX));
  return {1, std::min(bytes / 4, max_context), bytes};
}

Status ServedModel::check_bytes(size_t text_bytes, const std::string& field) const {
  if (text_bytes <= most_text_bytes()) return {};
  const int64_t least = static_cast<int64_t>(text_bytes / longest_token);
  Error error{ErrorCode::context_length,
              field + " has " + std::to_string(text_bytes) + " bytes, at least " + std::to_string(least) +
                  " tokens; the context holds " + std::to_string(max_context) + ", answer included",
              field};
  error.counts = {{"n_prompt_tokens", least}, {"n_ctx", max_context}};
  return error;
}

}  // namespace thermocline::server
