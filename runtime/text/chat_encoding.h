// V4 message encoding: OpenAI-style messages to prompt text. Source: spec section 6.2 (module encoding_dsv4).
#pragma once

#include <string>
#include <vector>

#include "runtime/io/json_document.h"
#include "runtime/text/prose_constants.h"
#include "runtime/text/tokenizer.h"

namespace thermocline {

struct ChatOptions {
  bool thinking = false;
  std::string reasoning_effort;  // "", "low", "high", "max"
  bool drop_thinking = true;
};

/// A rendered prompt, and which parts of it users and tools wrote: no special token is recognised in those.
struct RenderedPrompt {
  std::string text;
  std::vector<TextSpan> literal;
};

/// Renders messages; `constants` come from the checkpoint.
/// Errors: invalid_argument, naming the message and field, for messages that cannot be rendered.
Result<RenderedPrompt> render_chat(const ProseConstants& constants, const Json& messages, const ChatOptions& options);

}  // namespace thermocline
