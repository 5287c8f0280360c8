// The text side of the demo model, read once a program.
#pragma once
#include <memory>

#include "runtime/text/chat_encoding.h"
#include "runtime/text/tokenizer.h"
#include "tests/support/fixtures.h"

namespace thermocline::test {

inline const Tokenizer& demo_tokenizer() {
  static const std::unique_ptr<Tokenizer> tokenizer = Tokenizer::load(demo_model()).value();
  return *tokenizer;
}

inline const ProseConstants& demo_prose() {
  static const ProseConstants prose = read_prose_constants(demo_model()).value();
  return prose;
}

}  // namespace thermocline::test
