// Token ids back to text, as a stream: never half a UTF-8 character, never a lost byte.
#pragma once

#include "runtime/text/tokenizer.h"
#include "runtime/text/utf8.h"

namespace thermocline {

class Detokenizer {
 public:
  /// keep_special: print special tokens as they are written; otherwise they give no text.
  explicit Detokenizer(const Tokenizer& tokenizer, bool keep_special = true)
      : tokenizer_(tokenizer), keep_special_(keep_special) {}

  /// The text this token completes; may be empty.
  std::string push(int32_t id);
  /// The end: what is left of an open character becomes U+FFFD.
  std::string finish() { return utf8_.finish(); }

 private:
  const Tokenizer& tokenizer_;
  const bool keep_special_;
  Utf8Stream utf8_;
};

/// The text of all ids at once. Errors: invalid_argument for an id without a token.
Result<std::string> detokenize(const Tokenizer& tokenizer, std::span<const int32_t> ids);

}  // namespace thermocline
