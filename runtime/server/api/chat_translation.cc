#include "runtime/server/api/chat_translation.h"

#include <algorithm>
#include <charconv>

#include "runtime/server/wire/request_fields.h"

namespace thermocline::server {
namespace {

// The number in "messages[N]" at the start of a text; `end` is behind the bracket.
std::optional<size_t> message_number(const std::string& text, size_t& end) {
  constexpr std::string_view kBefore = "messages[";
  if (!text.starts_with(kBefore)) return std::nullopt;
  size_t number = 0;
  const auto [stop, error] = std::from_chars(text.data() + kBefore.size(), text.data() + text.size(), number);
  end = static_cast<size_t>(stop - text.data()) + 1;
  if (error != std::errc() || end > text.size() || *stop != ']') return std::nullopt;
  return number;
}

template <class Fn>
Error renamed(Error error, const Fn& place, const std::string& list = "messages") {
  constexpr std::string_view kList = "messages";
  for (std::string* text : {&error.message, &error.field}) {
    size_t end = 0;
    if (const auto number = message_number(*text, end))
      *text = place(*number) + text->substr(end);
    else if (text->starts_with(kList))
      text->replace(0, kList.size(), list);
  }
  return error;
}

}  // namespace

void ChatTranslation::add(Json message, std::string place) {
  body["messages"].push_back(std::move(message));
  places.push_back(std::move(place));
}

Json& ChatTranslation::assistant(const std::string& place, bool open) {
  Json& messages = body["messages"];
  if (!open || messages.empty() || messages.back()["role"] != "assistant")
    add({{"role", "assistant"}, {"content", ""}}, place);
  return messages.back();
}

Error ChatTranslation::told(Error error) const {
  const auto place = [&](size_t i) { return i < places.size() ? places[i] : list; };
  return renamed(std::move(error), place, list);
}

void append_text(Json& message, const char* member, const std::string& text) {
  Json& value = message[member];
  if (!value.is_string()) value = "";
  value.get_ref<std::string&>() += text;
}

Error without_first_message(Error error) {
  return renamed(std::move(error), [](size_t i) { return "messages[" + std::to_string(i > 0 ? i - 1 : 0) + "]"; });
}

Result<std::string> text_of_parts(const Json& content, const std::vector<std::string>& types,
                                  const std::string& place) {
  if (content.is_null()) return std::string();
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) return field_error(place, "should be a string or a list of parts");
  std::string text;
  for (size_t i = 0; i < content.size(); ++i) {
    TC_ASSIGN(const std::string piece, text_of_part(content[i], types, place + "[" + std::to_string(i) + "]"));
    text += (i ? "\n\n" : "") + piece;
  }
  return text;
}

Result<std::string> text_of_part(const Json& part, const std::vector<std::string>& types, const std::string& place) {
  if (part.is_string()) return part.get<std::string>();
  if (!part.is_object()) return field_error(place, "should be an object with a type");
  const Fields fields(part, place + ".");
  TC_ASSIGN(const std::string type, fields.text("type", ""));
  if (std::find(types.begin(), types.end(), type) == types.end())
    return not_offered(place, "is of type '" + type.substr(0, 60) + "': this model reads text only");
  return fields.text(type == "refusal" ? "refusal" : "text", "");
}

}  // namespace thermocline::server
