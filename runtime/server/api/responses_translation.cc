#include "runtime/server/api/responses_translation.h"

#include "runtime/server/wire/request_fields.h"

namespace thermocline::server {
namespace {

const std::vector<std::string> kTextTypes = {"input_text", "output_text",  "text",
                                             "refusal",    "summary_text", "reasoning_text"};

bool has_calls(const ChatTranslation& chat) {
  const Json& messages = chat.body["messages"];
  return !messages.empty() && messages.back().contains("tool_calls");
}

Status add_message(const Fields& fields, const std::string& place, ChatTranslation& chat) {
  TC_ASSIGN(std::string role, fields.text("role", ""));
  const Json* const given = fields.find("content");
  if (!given) return field_error(place + ".content", "is missing");
  TC_ASSIGN(const std::string text, text_of_parts(*given, kTextTypes, place + ".content"));
  if (role == "assistant") {
    append_text(chat.assistant(place, !has_calls(chat)), "content", text);
    return {};
  }
  if (role == "developer") role = "system";
  if (role != "system" && role != "user")
    return field_error(place + ".role", "should be system, developer, user or assistant");
  chat.add({{"role", role}, {"content", text}}, place);
  return {};
}

// An item of its own: what it thought before what comes next.
Status add_reasoning(const Fields& fields, const std::string& place, ChatTranslation& chat) {
  std::string text;
  for (const char* member : {"summary", "content"}) {  // the latter where it has both
    const Json* const parts = fields.find(member);
    TC_ASSIGN(std::string given, text_of_parts(parts ? *parts : Json(), kTextTypes, place + "." + member));
    if (!given.empty()) text = std::move(given);
  }
  if (text.empty()) return {};
  const Json& messages = chat.body["messages"];
  const bool open = !messages.empty() && messages.back()["role"] == "assistant" && messages.back()["content"] == "" &&
                    !has_calls(chat);
  append_text(chat.assistant(place, open), "reasoning_content", text);
  return {};
}

Status add_call(const Fields& fields, const std::string& place, bool custom, ChatTranslation& chat) {
  TC_ASSIGN(const std::string name, fields.text("name", ""));
  TC_ASSIGN(const std::string id, fields.text("call_id", ""));
  if (name.empty()) return field_error(place + ".name", "is missing");
  if (id.empty()) return field_error(place + ".call_id", "is missing");
  TC_ASSIGN(std::string arguments, fields.text(custom ? "input" : "arguments", ""));
  if (custom) arguments = dump_json(Json{{"input", arguments}});
  chat.assistant(place, true)["tool_calls"].push_back(
      {{"id", id}, {"type", "function"}, {"function", {{"name", name}, {"arguments", arguments}}}});
  return {};
}

Status add_call_output(const Fields& fields, const std::string& place, ChatTranslation& chat) {
  TC_ASSIGN(const std::string id, fields.text("call_id", ""));
  if (id.empty()) return field_error(place + ".call_id", "is missing");
  const Json* const output = fields.find("output");
  TC_ASSIGN(const std::string text, text_of_parts(output ? *output : Json(), kTextTypes, place + ".output"));
  chat.add({{"role", "tool"}, {"tool_call_id", id}, {"content", text}}, place);
  return {};
}

Status add_item(const Json& item, const std::string& place, ChatTranslation& chat) {
  if (!item.is_object()) return field_error(place, "should be an object");
  const Fields fields(item, place + ".");
  TC_ASSIGN(const std::string type, fields.text("type", "message"));
  if (type == "message") return add_message(fields, place, chat);
  if (type == "reasoning") return add_reasoning(fields, place, chat);
  if (type == "function_call" || type == "custom_tool_call") return add_call(fields, place, type[0] == 'c', chat);
  if (type == "function_call_output" || type == "custom_tool_call_output") return add_call_output(fields, place, chat);
  if (type == "item_reference")
    return not_offered(place, "refers to an item by id: send the item, or previous_response_id");
  if (type.starts_with("input_")) return not_offered(place, "is of type '" + type.substr(0, 60) + "': text only");
  return {};  // of tools that run elsewhere
}

Status add_input(const Json& input, ChatTranslation& chat) {
  if (input.is_string()) {
    chat.add({{"role", "user"}, {"content", input}}, "input");
    return {};
  }
  if (!input.is_array()) return field_error("input", "should be a string or a list of items");
  for (size_t i = 0; i < input.size(); ++i)
    TC_RETURN_IF_ERROR(add_item(input[i], "input[" + std::to_string(i) + "]", chat));
  return {};
}

// A custom tool takes text: to the model it is a function of one string.
Json custom_parameters() {
  return {{"type", "object"}, {"properties", {{"input", {{"type", "string"}}}}}, {"required", Json::array({"input"})}};
}

Status add_tools(const Json& tools, ResponsesTranslation& chat) {
  if (!tools.is_array()) return field_error("tools", "should be a list");
  Json functions = Json::array();
  for (size_t i = 0; i < tools.size(); ++i) {
    const std::string place = "tools[" + std::to_string(i) + "]";
    if (!tools[i].is_object()) return field_error(place, "should be an object");
    const Fields fields(tools[i], place + ".");
    TC_ASSIGN(const std::string type, fields.text("type", ""));
    if (type != "function" && type != "custom") continue;  // those run elsewhere
    TC_ASSIGN(const std::string name, fields.text("name", ""));
    if (name.empty()) return field_error(place + ".name", "is missing");
    Json function = {{"name", name}};
    TC_ASSIGN(const std::string description, fields.text("description", ""));
    if (fields.find("description")) function["description"] = description;
    if (type == "custom") {
      chat.custom_tools.insert(name);
      function["parameters"] = custom_parameters();
    } else if (const Json* const parameters = fields.find("parameters")) {
      if (!parameters->is_object()) return field_error(place + ".parameters", "should be an object");
      function["parameters"] = *parameters;
    }
    functions.push_back({{"type", "function"}, {"function", std::move(function)}});
  }
  if (!functions.empty()) chat.body["tools"] = std::move(functions);
  return {};
}

Status check_offered(const Fields& fields) {
  for (const char* name : {"conversation", "prompt"})
    if (fields.find(name)) return not_offered(name, "is not offered: send the input");
  TC_ASSIGN(const bool background, fields.boolean("background", false));
  if (background) return not_offered("background", "is not offered: stream the response");
  TC_ASSIGN(const int64_t top, fields.integer("top_logprobs", 0, 0, 20));
  if (top > 0) return not_offered("top_logprobs", "are offered by /v1/chat/completions");
  const Json* const text = fields.find("text");
  if (text && !text->is_object()) return field_error("text", "should be an object");
  const Json* const format = text ? Fields(*text, "text.").find("format") : nullptr;
  if (!format) return {};
  if (!format->is_object()) return field_error("text.format", "should be an object");
  TC_ASSIGN(const std::string type, Fields(*format, "text.format.").text("type", "text"));
  if (type == "json_object" || type == "json_schema")
    return not_offered("text.format", "of type " + type + " is not offered yet: answers are not constrained");
  if (type != "text") return field_error("text.format.type", "should be text");
  return {};
}

}  // namespace

Result<ResponsesTranslation> translate_response(const Json& body, const Json& before) {
  const Fields fields(body);
  TC_RETURN_IF_ERROR(check_offered(fields));
  ResponsesTranslation chat;
  chat.list = "input";
  TC_ASSIGN(const std::string instructions, fields.text("instructions", ""));
  if (!instructions.empty()) chat.add({{"role", "system"}, {"content", instructions}}, "instructions");
  if (before.is_array())
    for (const Json& message : before) chat.add(message, "previous_response_id");
  if (const Json* const input = fields.find("input")) TC_RETURN_IF_ERROR(add_input(*input, chat));
  const Json& messages = chat.body["messages"];
  if (messages.empty() || messages.back()["role"] == "system")  // a probe without input
    chat.add({{"role", "user"}, {"content", ""}}, "input");
  if (messages.back()["role"] == "assistant" && !messages.back().contains("tool_calls"))
    chat.body["messages"].back()["prefix"] = true;
  if (const Json* const tools = fields.find("tools")) TC_RETURN_IF_ERROR(add_tools(*tools, chat));
  if (const Json* const choice = fields.find("tool_choice")) chat.body["tool_choice"] = *choice;
  if (const Json* const reasoning = fields.find("reasoning")) {
    if (!reasoning->is_object()) return field_error("reasoning", "should be an object");
    TC_ASSIGN(const std::string effort, Fields(*reasoning, "reasoning.").text("effort", ""));
    if (!effort.empty()) chat.body["reasoning_effort"] = effort;
  }
  for (const char* same : {"temperature", "top_p"})
    if (const Json* const value = fields.find(same)) chat.body[same] = *value;
  if (const Json* const most = fields.find("max_output_tokens")) chat.body["max_tokens"] = *most;
  return chat;
}

}  // namespace thermocline::server
