// The body of POST /v1/responses in the fields of /v1/chat/completions.
#pragma once

#include <set>

#include "runtime/server/api/chat_translation.h"

namespace thermocline::server {

struct ResponsesTranslation : ChatTranslation {
  std::set<std::string> custom_tools = {};  // whose input is text: `custom`, as Codex's apply_patch
};

/// `before`: the messages of the response that this one follows (null: none).
/// Developer messages become the system's: the encoding would drop them with the thinking of old turns. Tools and items
/// of kinds that run elsewhere are left out.
/// Errors: invalid_argument and unsupported, naming the field.
Result<ResponsesTranslation> translate_response(const Json& body, const Json& before);

}  // namespace thermocline::server
