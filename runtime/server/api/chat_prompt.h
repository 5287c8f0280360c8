// From a conversation, in the fields of /v1/chat/completions, to a prompt and what reads its answer. The other chat
// APIs translate their bodies to these fields first.
#pragma once

#include "runtime/server/api/served_model.h"
#include "runtime/text/chat_encoding.h"
#include "runtime/text/completion_parser.h"

namespace thermocline::server {

struct ChatPrompt {
  RenderedPrompt rendered;
  ToolProperties tools;
  int64_t reasoning_budget = -1;  // Request::reasoning_budget
};

/// Of `messages`, `tools`, `tool_choice`, `response_format`, `thinking`, `reasoning_effort`, `thinking_token_budget`,
/// `chat_template_kwargs`, `continue_final_message` and `add_generation_prompt`.
/// Errors: invalid_argument and unsupported, naming the field; context_length for text that no tokenising makes fit;
/// those of the checkpoint's templates.
Result<ChatPrompt> read_chat_prompt(const ServedModel& model, const Json& body);

/// Its token ids. Errors: those of Tokenizer::encode.
Result<std::vector<int32_t>> encode(const ServedModel& model, const ChatPrompt& prompt);

/// All of a request that comes of its prompt: token ids, the budget of its reasoning, and the special tokens that an
/// answer's text must show, as CompletionStream reads them as markup and shows nobody. Errors: those of encode().
Status put_prompt(const ServedModel& model, const ChatPrompt& prompt, Request& request);

}  // namespace thermocline::server
