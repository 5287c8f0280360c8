#include "runtime/server/api/anthropic_translation.h"

#include <fmt/format.h>

#include <algorithm>

#include "runtime/server/wire/request_fields.h"

namespace thermocline::server {
namespace {

constexpr std::string_view kBillingLine = "x-anthropic-billing-header:";

std::string index_of(const std::string& name, size_t i) { return name + "[" + std::to_string(i) + "]"; }

std::string without_billing_line(std::string text) {
  if (!text.starts_with(kBillingLine)) return text;
  const size_t end = text.find('\n');
  return end == std::string::npos ? "" : text.substr(end + 1);
}

Result<std::string> system_text(const Json& system, const std::string& place) {
  if (!system.is_array()) {
    TC_ASSIGN(std::string text, text_of_parts(system, {"text"}, place));
    return without_billing_line(std::move(text));
  }
  std::string all;
  for (size_t i = 0; i < system.size(); ++i) {
    TC_ASSIGN(std::string text, text_of_part(system[i], {"text"}, index_of(place, i)));
    text = without_billing_line(std::move(text));
    if (!text.empty()) all += (all.empty() ? "" : "\n\n") + text;
  }
  return all;
}

Status add_tool_result(const Json& block, const std::string& place, ChatTranslation& chat) {
  const Fields fields(block, place + ".");
  TC_ASSIGN(const std::string id, fields.text("tool_use_id", ""));
  if (id.empty()) return field_error(place + ".tool_use_id", "is missing");
  const Json* const content = fields.find("content");
  TC_ASSIGN(const std::string text, text_of_parts(content ? *content : Json(), {"text"}, place + ".content"));
  chat.add({{"role", "tool"}, {"tool_call_id", id}, {"content", text}}, place);
  return {};
}

// Blocks of text and tool results, each a message: the encoding makes one turn of them.
Status add_user(const Json& content, const std::string& place, ChatTranslation& chat) {
  if (!content.is_array()) {
    TC_ASSIGN(const std::string text, text_of_parts(content, {"text"}, place));
    chat.add({{"role", "user"}, {"content", text}}, place);
    return {};
  }
  for (size_t i = 0; i < content.size(); ++i) {
    const std::string where = index_of(place, i);
    const bool result = content[i].is_object() && content[i].value("type", Json()) == "tool_result";
    if (result) {
      TC_RETURN_IF_ERROR(add_tool_result(content[i], where, chat));
      continue;
    }
    TC_ASSIGN(const std::string text, text_of_part(content[i], {"text"}, where));
    chat.add({{"role", "user"}, {"content", text}}, where);
  }
  if (content.empty()) return field_error(place, "should not be empty");
  return {};
}

Status add_assistant_block(const Json& block, const std::string& place, Json& message) {
  if (!block.is_object()) return field_error(place, "should be an object with a type");
  const Fields fields(block, place + ".");
  TC_ASSIGN(const std::string type, fields.text("type", ""));
  const auto append = [&](const char* to, const std::string& text) { append_text(message, to, text); };
  if (type == "text") {
    TC_ASSIGN(const std::string text, fields.text("text", ""));
    append("content", text);
  } else if (type == "thinking") {  // whoever signed it
    TC_ASSIGN(const std::string text, fields.text("thinking", ""));
    append("reasoning_content", text);
  } else if (type == "tool_use") {
    TC_ASSIGN(const std::string id, fields.text("id", ""));
    TC_ASSIGN(const std::string name, fields.text("name", ""));
    if (name.empty()) return field_error(place + ".name", "is missing");
    const Json* const input = fields.find("input");
    if (input && !input->is_object()) return field_error(place + ".input", "should be an object");
    message["tool_calls"].push_back(
        {{"id", id},
         {"type", "function"},
         {"function", {{"name", name}, {"arguments", dump_json(input ? *input : Json::object())}}}});
  } else if (type != "redacted_thinking" && !type.starts_with("server_tool") && !type.ends_with("_tool_result")) {
    return not_offered(place,
                       "is of type '" + type.substr(0, 60) + "': an assistant's are text, thinking and tool_use");
  }
  return {};
}

Status add_assistant(const Json& content, const std::string& place, bool last, ChatTranslation& chat) {
  Json message = {{"role", "assistant"}, {"content", ""}};
  if (content.is_array()) {
    for (size_t i = 0; i < content.size(); ++i)
      TC_RETURN_IF_ERROR(add_assistant_block(content[i], index_of(place, i), message));
  } else {
    TC_ASSIGN(message["content"], text_of_parts(content, {"text"}, place));
  }
  if (last && !message.contains("tool_calls")) message["prefix"] = true;  // the answer goes on with it
  chat.add(std::move(message), place);
  return {};
}

Status add_messages(const Json& messages, ChatTranslation& chat) {
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string place = index_of("messages", i);
    if (!messages[i].is_object()) return field_error(place, "should be an object");
    const Fields fields(messages[i], place + ".");
    TC_ASSIGN(const std::string role, fields.text("role", ""));
    const Json* const given = fields.find("content");
    if (!given) return field_error(place + ".content", "is missing");
    if (role == "user") {
      TC_RETURN_IF_ERROR(add_user(*given, place + ".content", chat));
    } else if (role == "assistant") {
      TC_RETURN_IF_ERROR(add_assistant(*given, place + ".content", i + 1 == messages.size(), chat));
    } else if (role == "system") {
      TC_ASSIGN(const std::string text, system_text(*given, place + ".content"));
      chat.add({{"role", "system"}, {"content", text}}, place);
    } else {
      return field_error(place + ".role", "should be user, assistant or system");
    }
  }
  return {};
}

// Those with a schema of their own; tools that Anthropic's servers run have none and are not there.
Status add_tools(const Json& tools, Json& body) {
  if (!tools.is_array()) return field_error("tools", "should be a list");
  Json functions = Json::array();
  for (size_t i = 0; i < tools.size(); ++i) {
    const std::string place = index_of("tools", i);
    if (!tools[i].is_object()) return field_error(place, "should be an object");
    const Fields fields(tools[i], place + ".");
    TC_ASSIGN(const std::string type, fields.text("type", "custom"));
    if (type != "custom") continue;
    TC_ASSIGN(const std::string name, fields.text("name", ""));
    if (name.empty()) return field_error(place + ".name", "is missing");
    Json function = {{"name", name}};
    TC_ASSIGN(const std::string description, fields.text("description", ""));
    if (fields.find("description")) function["description"] = description;
    const Json* const schema = fields.find("input_schema");
    if (schema && !schema->is_object()) return field_error(place + ".input_schema", "should be an object");
    function["parameters"] = schema ? *schema : Json{{"type", "object"}, {"properties", Json::object()}};
    functions.push_back({{"type", "function"}, {"function", std::move(function)}});
  }
  if (!functions.empty()) body["tools"] = std::move(functions);
  return {};
}

Status add_tool_choice(const Fields& fields, Json& body) {
  const Json* const choice = fields.find("tool_choice");
  if (!choice) return {};
  if (!choice->is_object()) return field_error("tool_choice", "should be an object with a type");
  TC_ASSIGN(const std::string type, Fields(*choice, "tool_choice.").text("type", ""));
  if (type == "any" || type == "tool")
    return not_offered("tool_choice", "of type " + type + " is not offered yet; auto and none are");
  if (type != "auto" && type != "none") return field_error("tool_choice.type", "should be auto or none");
  body["tool_choice"] = type;
  return {};
}

Status add_thinking(const Fields& fields, bool think, Json& body) {
  if (const Json* const thinking = fields.find("thinking")) {
    if (!thinking->is_object()) return field_error("thinking", "should be an object with a type");
    TC_ASSIGN(const std::string type, Fields(*thinking, "thinking.").text("type", ""));
    if (type != "enabled" && type != "disabled" && type != "adaptive")
      return field_error("thinking.type", "should be enabled, disabled or adaptive");
    think = type != "disabled";
    TC_ASSIGN(const int64_t budget, Fields(*thinking, "thinking.").integer("budget_tokens", -1, 0, INT64_MAX));
    if (budget >= 0) body["thinking_token_budget"] = budget;
    body["thinking"] = {{"type", think ? "enabled" : "disabled"}};
  }
  const Json* const output = fields.find("output_config");
  if (!output) return {};
  if (!output->is_object()) return field_error("output_config", "should be an object");
  const Fields config(*output, "output_config.");
  if (config.find("format"))
    return not_offered("output_config.format", "is not offered yet: answers are not constrained");
  TC_ASSIGN(const std::string effort, config.text("effort", ""));
  if (effort.empty()) return {};
  constexpr const char* kEfforts[] = {"low", "medium", "high", "xhigh", "max"};
  if (std::find(std::begin(kEfforts), std::end(kEfforts), effort) == std::end(kEfforts))
    return field_error("output_config.effort", "should be low, medium, high, xhigh or max");
  if (think) body["reasoning_effort"] = effort;
  return {};
}

}  // namespace

Result<ChatTranslation> translate_anthropic(const Json& body, bool think) {
  const Fields fields(body);
  ChatTranslation chat;
  if (const Json* const system = fields.find("system")) {
    TC_ASSIGN(const std::string text, system_text(*system, "system"));
    if (!text.empty()) chat.add({{"role", "system"}, {"content", text}}, "system");
  }
  const Json* const messages = fields.find("messages");
  if (!messages) return field_error("messages", "is missing");
  if (!messages->is_array() || messages->empty()) return field_error("messages", "should be a list with a message");
  TC_RETURN_IF_ERROR(add_messages(*messages, chat));
  if (const Json* const tools = fields.find("tools")) TC_RETURN_IF_ERROR(add_tools(*tools, chat.body));
  TC_RETURN_IF_ERROR(add_tool_choice(fields, chat.body));
  TC_RETURN_IF_ERROR(add_thinking(fields, think, chat.body));
  for (const char* same : {"max_tokens", "temperature", "top_p", "top_k"})
    if (const Json* const value = fields.find(same)) chat.body[same] = *value;
  if (const Json* const stops = fields.find("stop_sequences")) {
    if (!stops->is_array()) return field_error("stop_sequences", "should be a list of strings");
    chat.body["stop"] = *stops;
  }
  return chat;
}

Error anthropic_error(const ChatTranslation& chat, Error error) {
  for (std::string* text : {&error.message, &error.field})
    if (text->starts_with("stop") && !text->starts_with("stop_sequences")) text->replace(0, 4, "stop_sequences");
  return too_long_for_anthropic(chat.told(std::move(error)));
}

Error too_long_for_anthropic(Error error) {
  if (error.code != ErrorCode::context_length) return error;
  const auto count = [&](std::string_view name) {
    const auto it = std::ranges::find(error.counts, name, [](const auto& named) { return named.first; });
    return it == error.counts.end() ? 0 : it->second;
  };
  const int64_t exact = count("n_prompt_tokens"), least = count("n_prompt_tokens_min");
  error.message = fmt::format("prompt is too long: {}{} tokens > {} maximum", exact > 0 ? "" : "at least ",
                              std::max(exact, least), count("n_ctx") - 1);
  return error;
}

}  // namespace thermocline::server
