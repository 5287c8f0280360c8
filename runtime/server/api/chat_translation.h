// What the Anthropic and the Responses API translate their bodies to: the fields of /v1/chat/completions, and where
// each message stood, so that an error names what the client sent.
#pragma once

#include <string>
#include <vector>

#include "runtime/io/json_document.h"
#include "runtime/server/api/chat_prompt.h"

namespace thermocline::server {

struct ChatTranslation {
  Json body = {{"messages", Json::array()}};
  std::vector<std::string> places = {};  // of each message: "messages[2].content[1]", "system"
  std::string list = "messages";         // the field that they come from

  void add(Json message, std::string place);
  /// The message that an assistant's next piece joins: the last, where it is the assistant's and `open`, else a new
  /// one.
  Json& assistant(const std::string& place, bool open);
  /// An error of reading `body` in the words of the request.
  Error told(Error error) const;
};

/// Text of a string or of a list of parts of the types named; a blank line between them. Errors: invalid_argument
/// and unsupported, naming the part.
Result<std::string> text_of_parts(const Json& content, const std::vector<std::string>& types, const std::string& place);

/// Text of one part; `place` is the part's own.
Result<std::string> text_of_part(const Json& part, const std::vector<std::string>& types, const std::string& place);

/// Appends to a text of a message, which need not be there yet.
void append_text(Json& message, const char* member, const std::string& text);

/// Takes a message that was put in front of the client's own out of the numbers an error names.
Error without_first_message(Error error);

}  // namespace thermocline::server
