#include "runtime/text/detokenizer.h"

namespace thermocline {

std::string Detokenizer::push(int32_t id) {
  if (!keep_special_ && tokenizer_.is_special(id)) return "";
  return utf8_.push(tokenizer_.token_bytes(id));
}

Result<std::string> detokenize(const Tokenizer& tokenizer, std::span<const int32_t> ids) {
  Detokenizer detokenizer(tokenizer);
  std::string text;
  for (const int32_t id : ids) {
    if (tokenizer.token_bytes(id).empty()) return invalid("id " + std::to_string(id) + " has no token");
    text += detokenizer.push(id);
  }
  return text + detokenizer.finish();
}

}  // namespace thermocline
