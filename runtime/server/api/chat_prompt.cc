#include "runtime/server/api/chat_prompt.h"

#include <algorithm>

#include "runtime/server/api/chat_translation.h"
#include "runtime/server/wire/request_fields.h"

namespace thermocline::server {
namespace {

constexpr size_t kMostMessages = 8192, kMostTools = 512;

Status check_tool(const Json& tool, const std::string& place) {
  if (!tool.is_object()) return field_error(place, "should be an object");
  TC_ASSIGN(const std::string type, Fields(tool, place + ".").text("type", "function"));
  if (type != "function") return not_offered(place, "is of type '" + type.substr(0, 60) + "': functions are offered");
  const Json* const function = Fields(tool).find("function");
  if (!function || !function->is_object()) return field_error(place + ".function", "should be an object");
  const Fields fields(*function, place + ".function.");
  TC_ASSIGN(const std::string name, fields.text("name", ""));
  if (name.empty()) return field_error(place + ".function.name", "is missing");
  TC_RETURN_IF_ERROR(fields.text("description", ""));
  const Json* const parameters = fields.find("parameters");
  if (parameters && !parameters->is_object()) return field_error(place + ".function.parameters", "should be an object");
  return {};
}

// Onto the system message, where the encoding wants them; one in front where there is none (`added`).
Status read_tools(const Json& body, Json& messages, ToolProperties& properties, bool& added) {
  const Fields fields(body);
  const Json* const tools = fields.find("tools");
  if (tools && (!tools->is_array() || tools->size() > kMostTools))
    return field_error("tools", "should be a list of at most " + std::to_string(kMostTools) + " tools");
  for (size_t i = 0; tools && i < tools->size(); ++i)
    TC_RETURN_IF_ERROR(check_tool((*tools)[i], "tools[" + std::to_string(i) + "]"));
  std::string choice = "auto";
  if (const Json* given = fields.find("tool_choice")) {
    if (given->is_object() || *given == "required")
      return not_offered("tool_choice", "that forces a call is not offered yet; auto and none are");
    if (*given != "auto" && *given != "none") return field_error("tool_choice", "should be auto or none");
    choice = given->get<std::string>();
  }
  if (!tools || tools->empty() || choice == "none") return {};
  added = !messages[0].is_object() || !messages[0].contains("role") || messages[0]["role"] != "system";
  if (added) messages.insert(messages.begin(), Json{{"role", "system"}, {"content", ""}});
  messages[0]["tools"] = *tools;
  // A wish to whoever serves it, no part of the tool: some clients always send it, and the model would read it.
  for (Json& tool : messages[0]["tools"]) tool["function"].erase("strict");
  properties = tool_properties(*tools);
  return {};
}

Result<Json> read_messages(const Json& body, ToolProperties& properties, bool& added) {
  const Json* const given = Fields(body).find("messages");
  if (!given) return field_error("messages", "is missing");
  if (!given->is_array() || given->empty() || given->size() > kMostMessages)
    return field_error("messages", "should be a list of 1 to " + std::to_string(kMostMessages) + " messages");
  Json messages = *given;
  TC_RETURN_IF_ERROR(read_tools(body, messages, properties, added));
  if (const Json* format = Fields(body).find("response_format")) {
    if (!format->is_object()) return field_error("response_format", "should be an object");
    TC_ASSIGN(const std::string type, Fields(*format, "response_format.").text("type", ""));
    if (type == "json_object" || type == "json_schema")
      return not_offered("response_format", "of type " + type + " is not offered yet: answers are not constrained");
    if (type != "text") return field_error("response_format.type", "should be text, not '" + type.substr(0, 60) + "'");
  }
  return messages;
}

constexpr std::string_view kEfforts[] = {"none", "minimal", "low", "medium", "high", "xhigh", "max"};

Result<ChatOptions> read_options(const Json& body, bool think) {
  const Fields fields(body);
  ChatOptions options;
  options.thinking = think;
  TC_ASSIGN(std::string effort, fields.text("reasoning_effort", ""));
  if (!effort.empty() && std::ranges::find(kEfforts, effort) == std::end(kEfforts))
    return field_error("reasoning_effort",
                       "should be none, minimal, low, medium, high, xhigh or max, not '" + effort.substr(0, 60) + "'");
  if (!effort.empty()) options.thinking = effort != "none" && effort != "minimal";
  if (effort == "none" || effort == "minimal") effort = "";
  if (effort == "medium") effort = "high";
  if (effort == "xhigh") effort = "max";
  options.reasoning_effort = effort;
  if (const Json* thinking = fields.find("thinking")) {
    if (!thinking->is_object()) return field_error("thinking", "should be an object with a type");
    TC_ASSIGN(const std::string type, Fields(*thinking, "thinking.").text("type", "enabled"));
    if (type != "enabled" && type != "disabled")
      return field_error("thinking.type", "should be enabled or disabled, not '" + type.substr(0, 60) + "'");
    options.thinking = type == "enabled";
  }
  if (const Json* kwargs = fields.find("chat_template_kwargs")) {
    if (!kwargs->is_object()) return field_error("chat_template_kwargs", "should be an object");
    for (const char* name : {"thinking", "enable_thinking"}) {
      TC_ASSIGN(options.thinking, Fields(*kwargs, "chat_template_kwargs.").boolean(name, options.thinking));
    }
  }
  TC_ASSIGN(options.continue_final_message, fields.boolean("continue_final_message", false));
  TC_ASSIGN(const bool add, fields.boolean("add_generation_prompt", !options.continue_final_message));
  if (add == options.continue_final_message)
    return field_error("add_generation_prompt", "and continue_final_message exclude each other, and one is needed");
  return options;
}

}  // namespace

Result<ChatPrompt> read_chat_prompt(const ServedModel& model, const Json& body) {
  if (!model.constants) return model.constants.error();
  ChatPrompt prompt;
  bool added = false;
  TC_ASSIGN(const Json messages, read_messages(body, prompt.tools, added));
  TC_ASSIGN(const ChatOptions options, read_options(body, model.think));
  TC_ASSIGN(prompt.reasoning_budget,
            Fields(body).integer("thinking_token_budget", model.reasoning_budget, 0, INT64_MAX));
  Result<RenderedPrompt> rendered = render_generation_prompt(*model.constants, messages, options);
  if (!rendered) return added ? without_first_message(std::move(rendered).error()) : std::move(rendered).error();
  prompt.rendered = std::move(*rendered);
  TC_RETURN_IF_ERROR(model.check_bytes(prompt.rendered.text.size(), "messages"));
  return prompt;
}

Result<std::vector<int32_t>> encode(const ServedModel& model, const ChatPrompt& prompt) {
  return model.tokenizer.encode(prompt.rendered.text, prompt.rendered.literal);
}

Status put_prompt(const ServedModel& model, const ChatPrompt& prompt, Request& request) {
  TC_ASSIGN(request.prompt, encode(model, prompt));
  for (const std::string& token : {model.constants->thinking_end, model.constants->dsml_token})
    if (const auto id = model.tokenizer.id_of(token)) request.shown_special.push_back(*id);
  const auto end = model.tokenizer.id_of(model.constants->thinking_end);
  if (!end || !prompt.rendered.in_reasoning) return {};
  request.reasoning_budget = prompt.reasoning_budget;
  request.reasoning_end = *end;
  return {};
}

}  // namespace thermocline::server
