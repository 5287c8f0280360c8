// The body of Anthropic's POST /v1/messages in the fields of /v1/chat/completions.
#pragma once

#include "runtime/server/api/chat_translation.h"

namespace thermocline::server {

/// `think`: whether an answer thinks when the request does not say. A system message in the middle stays in its place;
/// the line that Claude Code changes with every request is taken out, lest no prompt ever begins like another.
/// Errors: invalid_argument and unsupported, naming the field in Anthropic's words.
Result<ChatTranslation> translate_anthropic(const Json& body, bool think);

/// An error of a translated request in Anthropic's words.
Error anthropic_error(const ChatTranslation& chat, Error error);
/// A prompt over the context in the words by which clients of Anthropic's know to make theirs shorter. The maximum is
/// of the prompt: an answer has a token at least. Other errors as they are.
Error too_long_for_anthropic(Error error);

}  // namespace thermocline::server
