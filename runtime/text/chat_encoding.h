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
  bool continue_final_message = false;  // render_generation_prompt only: go on with the last message, the assistant's
};

/// A rendered prompt, and which parts of it users and tools wrote: no special token is recognised in those.
struct RenderedPrompt {
  std::string text;
  std::vector<TextSpan> literal;  // rising, disjoint
  bool in_reasoning = false;      // of render_generation_prompt: what comes next is reasoning, until </think>
};

/// Renders messages as the published encoder does, whatever comes last; `constants` come from the checkpoint.
/// Errors: invalid_argument, naming the message and field, for messages that cannot be rendered.
Result<RenderedPrompt> render_chat(const ProseConstants& constants, const Json& messages, const ChatOptions& options);

/// Renders messages as a prompt to generate from. It differs from render_chat where that prompt would not do:
///  - every assistant message and the answer to come stand behind an <｜Assistant｜>, also after a system message;
///  - a last assistant message with `"prefix": true` (or `"wo_eos": true`, or options.continue_final_message) is
///    continued: the prompt ends with its text and has no EOS. With thinking, a message without content continues its
///    reasoning, one with content has its reasoning closed first;
///  - parts of content that are not text are refused.
/// Errors: those of render_chat; invalid_argument for a last assistant message that is not to be continued or has tool
/// calls, naming it, and for a continuation where the last message is another role's.
Result<RenderedPrompt> render_generation_prompt(const ProseConstants& constants, const Json& messages,
                                                const ChatOptions& options);

}  // namespace thermocline
