#include "runtime/text/chat_encoding.h"

#include <algorithm>
#include <optional>
#include <unordered_map>

#include "runtime/text/python_json.h"

namespace thermocline {
namespace {

constexpr const char* kUser = "<｜User｜>";
constexpr const char* kAssistant = "<｜Assistant｜>";
constexpr const char* kReminder = "<｜latest_reminder｜>";
constexpr const char* kTasks[] = {"action", "query", "authority", "domain", "title", "read_url"};

struct Block {
  enum class Kind { text, tool_result } kind = Kind::text;
  std::string text;
  std::string call_id;
};

struct Message {
  std::string role;
  std::string content;
  std::vector<Block> blocks;  // user messages
  std::string reasoning, task;
  const Json* tools = nullptr;
  const Json* response_format = nullptr;
  const Json* tool_calls = nullptr;
  bool without_eos = false, prefix = false;
};

Error at(size_t index, const std::string& field, const std::string& what) {
  Error error = invalid("messages[" + std::to_string(index) + "]" + (field.empty() ? "" : "." + field) + " " + what);
  error.field = "messages[" + std::to_string(index) + "]" + (field.empty() ? "" : "." + field);
  return error;
}

// How parts of content that are not text are met: the published encoder writes a note in their place.
enum class OtherParts { noted, refused };

// A string, null, or a list of parts whose texts are joined by blank lines.
Result<std::string> text_of(const Json& message, const char* field, size_t index, OtherParts other) {
  if (!message.contains(field) || message[field].is_null()) return std::string();
  const Json& content = message[field];
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) return at(index, field, "should be a string, null or a list of parts");
  std::string text;
  for (size_t i = 0; i < content.size(); ++i) {
    const Json& part = content[i];
    const std::string where = std::string(field) + "[" + std::to_string(i) + "]";
    if (!part.is_object() || !part.contains("type") || !part["type"].is_string())
      return at(index, where, "should be an object with a type");
    const std::string type = part["type"].get<std::string>();
    if (type == "text" && (!part.contains("text") || !part["text"].is_string()))
      return at(index, where + ".text", "should be a string");
    if (type != "text" && other == OtherParts::refused)
      return at(index, where,
                "is of type '" + type + "': " + (type.find("image") == std::string::npos ? "such parts" : "images") +
                    " are not supported, text is");
    if (i > 0) text += "\n\n";
    text += type == "text" ? part["text"].get_ref<const std::string&>() : "[Unsupported " + type + "]";
  }
  return text;
}

Result<Message> read_message(const Json& json, size_t index, OtherParts other) {
  if (!json.is_object()) return at(index, "", "should be an object");
  if (!json.contains("role") || !json["role"].is_string()) return at(index, "role", "should be a string");
  Message message;
  message.role = json["role"].get<std::string>();
  static constexpr const char* kRoles[] = {"system", "developer", "user", "assistant", "tool", "latest_reminder"};
  if (std::find(std::begin(kRoles), std::end(kRoles), message.role) == std::end(kRoles))
    return at(index, "role",
              "is '" + message.role + "'; system, developer, user, assistant, tool and latest_reminder are known");
  TC_ASSIGN(message.content, text_of(json, "content", index, other));
  const char* const reasoning =
      json.contains("reasoning_content") || !json.contains("reasoning") ? "reasoning_content" : "reasoning";
  TC_ASSIGN(message.reasoning, text_of(json, reasoning, index, other));
  const auto array = [&](const char* name, const Json*& out) -> Status {
    if (!json.contains(name) || json[name].is_null()) return {};
    if (!json[name].is_array()) return at(index, name, "should be a list");
    if (!json[name].empty()) out = &json[name];
    return {};
  };
  TC_RETURN_IF_ERROR(array("tools", message.tools));
  TC_RETURN_IF_ERROR(array("tool_calls", message.tool_calls));
  if (json.contains("response_format") && !json["response_format"].is_null())
    message.response_format = &json["response_format"];
  if (json.contains("wo_eos")) message.without_eos = json["wo_eos"] == true;
  if (json.contains("prefix") && !json["prefix"].is_null()) {
    if (!json["prefix"].is_boolean()) return at(index, "prefix", "should be true or false");
    message.prefix = json["prefix"].get<bool>();
  }
  if (json.contains("task") && !json["task"].is_null()) {
    if (!json["task"].is_string()) return at(index, "task", "should be a string");
    message.task = json["task"].get<std::string>();
    if (std::find(std::begin(kTasks), std::end(kTasks), message.task) == std::end(kTasks))
      return at(index, "task", "is '" + message.task + "', which is unknown");
  }
  if (message.role == "user") message.blocks.push_back({Block::Kind::text, message.content, ""});
  if (message.role == "tool") {
    const auto id = json.find("tool_call_id");
    const bool given = id != json.end() && !id->is_null();
    if (given && !id->is_string()) return at(index, "tool_call_id", "should be a string");
    message.blocks.push_back({Block::Kind::tool_result, message.content, given ? id->get<std::string>() : ""});
  }
  return message;
}

// Tool results join the user message before them, or start one; user messages in a row become one (a task of a message
// that joins is lost, as in the official code).
std::vector<Message> merge_messages(std::vector<Message> messages) {
  std::vector<Message> merged;
  for (Message& message : messages) {
    const bool after_user = !merged.empty() && merged.back().role == "user";
    const bool joins = after_user && (message.role == "tool" || (message.role == "user" && merged.back().task.empty()));
    if (message.role == "tool") message.role = "user";
    if (joins)
      std::move(message.blocks.begin(), message.blocks.end(), std::back_inserter(merged.back().blocks));
    else
      merged.push_back(std::move(message));
  }
  return merged;
}

// Tool results of one user message take the order of the calls they answer; other blocks keep their places.
void sort_tool_results(std::vector<Message>& messages) {
  std::unordered_map<std::string, size_t> order;
  for (Message& message : messages) {
    if (message.role == "assistant" && message.tool_calls) {
      order.clear();
      for (size_t k = 0; k < message.tool_calls->size(); ++k) {
        const Json& call = (*message.tool_calls)[k];
        const bool named = call.is_object() && call.contains("id") && call["id"].is_string();
        order.try_emplace(named ? call["id"].get<std::string>() : "", k);
      }
    }
    if (message.role != "user" || order.empty()) continue;
    std::vector<std::pair<size_t, Block>> results;
    for (Block& block : message.blocks) {
      if (block.kind != Block::Kind::tool_result) continue;
      const auto rank = order.find(block.call_id);
      results.emplace_back(rank == order.end() ? 0 : rank->second, std::move(block));
    }
    std::stable_sort(results.begin(), results.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    size_t next = 0;
    for (Block& block : message.blocks)
      if (block.kind == Block::Kind::tool_result) block = std::move(results[next++].second);
  }
}

int64_t last_user_index(const std::vector<Message>& messages) {
  for (size_t i = messages.size(); i-- > 0;)
    if (messages[i].role == "user" || messages[i].role == "developer") return static_cast<int64_t>(i);
  return -1;
}

// Thinking of turns before the last question is not shown again.
void drop_old_thinking(std::vector<Message>& messages) {
  const int64_t last = last_user_index(messages);
  std::vector<Message> kept;
  for (size_t i = 0; i < messages.size(); ++i) {
    Message& message = messages[i];
    if (static_cast<int64_t>(i) < last) {
      if (message.role == "developer") continue;
      if (message.role == "assistant") message.reasoning.clear();
    }
    kept.push_back(std::move(message));
  }
  messages = std::move(kept);
}

/// Writes the prompt. Text of users and tools goes through `literal`. `generates`: the prompt is to be answered, so
/// every answer has its marker; `continues`: the last message is not over.
class Renderer {
 public:
  Renderer(const ProseConstants& constants, const ChatOptions& options, bool generates, bool continues)
      : c_(constants), o_(options), generates_(generates), continues_(continues) {}

  Result<RenderedPrompt> render(std::vector<Message> messages) {
    messages = merge_messages(std::move(messages));
    sort_tool_results(messages);
    bool drop = o_.drop_thinking;
    for (const Message& message : messages) drop &= message.tools == nullptr;
    if (o_.thinking && drop) drop_old_thinking(messages);
    const int64_t last_user = last_user_index(messages);
    prompt_.text = c_.bos;
    if (o_.thinking)
      prompt_.text += o_.reasoning_effort == "max"    ? c_.effort_max
                      : o_.reasoning_effort == "high" ? c_.effort_high
                                                      : "";
    for (size_t i = 0; i < messages.size(); ++i) {
      const bool think = o_.thinking && (!drop || static_cast<int64_t>(i) > last_user);
      if (generates_ && messages[i].role == "assistant") begin_answer(think);
      if (continues_ && i + 1 == messages.size()) return continued(messages, think);
      TC_RETURN_IF_ERROR(body(messages, i, think));
      transition(messages, i, o_.thinking && (!drop || static_cast<int64_t>(i) >= last_user));
    }
    if (generates_) begin_answer(o_.thinking);
    return std::move(prompt_);
  }

 private:
  void literal(const std::string& text) {
    if (!text.empty()) prompt_.literal.push_back({prompt_.text.size(), prompt_.text.size() + text.size()});
    prompt_.text += text;
  }

  Status body(const std::vector<Message>& messages, size_t i, bool think) {
    const Message& m = messages[i];
    if (m.role != "latest_reminder") in_answer_ = false;  // a reminder may stand inside the answer it is for
    if (m.role == "system") {
      literal(m.content);
      return blocks_of_prose(m);
    }
    if (m.role == "developer") {
      prompt_.text += kUser;
      literal(m.content);
      return blocks_of_prose(m);
    }
    if (m.role == "latest_reminder") {
      prompt_.text += kReminder;
      literal(m.content);
      return {};
    }
    if (m.role == "user") {
      prompt_.text += kUser;
      for (size_t b = 0; b < m.blocks.size(); ++b) {
        if (b > 0) prompt_.text += "\n\n";
        const bool result = m.blocks[b].kind == Block::Kind::tool_result;
        if (result) prompt_.text += "<tool_result>";
        literal(m.blocks[b].text);
        if (result) prompt_.text += "</tool_result>";
      }
      return {};
    }
    if (think && (i == 0 || messages[i - 1].task.empty())) {
      literal(m.reasoning);
      prompt_.text += c_.thinking_end;
    }
    literal(m.content);
    if (m.tool_calls) TC_RETURN_IF_ERROR(tool_calls(*m.tool_calls, i));
    if (!m.without_eos) prompt_.text += c_.eos;
    return {};
  }

  Status blocks_of_prose(const Message& m) {
    if (m.tools) {
      std::string schemas;
      for (size_t t = 0; t < m.tools->size(); ++t) {
        const Json& tool = (*m.tools)[t];
        if (!tool.is_object() || !tool.contains("function") || !tool["function"].is_object()) {
          Error error = invalid("tools[" + std::to_string(t) + "].function should be an object");
          error.field = "tools[" + std::to_string(t) + "].function";
          return error;
        }
        if (t > 0) schemas += "\n";
        schemas += python_dumps(tool["function"]);
      }
      TC_RETURN_IF_ERROR(prose(c_.tools_template, "tool_schemas", schemas));
    }
    if (m.response_format)
      TC_RETURN_IF_ERROR(prose(c_.response_format_template, "schema", python_dumps(*m.response_format)));
    return {};
  }

  // A block of prose around what the request brought, after a blank line. The template's own tags are tags.
  Status prose(const std::string& text, const std::string& placeholder, const std::string& from_request) {
    prompt_.text += "\n\n";
    TC_ASSIGN(const std::vector<TemplatePart> parts, template_parts(text));
    for (const TemplatePart& part : parts) {
      if (!part.placeholder)
        prompt_.text += part.text;
      else if (part.text == placeholder)
        literal(from_request);
      else if (part.text == "dsml_token")
        prompt_.text += c_.dsml_token;
      else if (part.text == "thinking_start_token")
        prompt_.text += c_.thinking_start;
      else if (part.text == "thinking_end_token")
        prompt_.text += c_.thinking_end;
      else
        return corrupt("a template of the checkpoint's encoding_dsv4.py names '{" + part.text +
                       "}', for which there is no value");
    }
    return {};
  }

  Status tool_calls(const Json& calls, size_t index) {
    const std::string& dsml = c_.dsml_token;
    prompt_.text += "\n\n<" + dsml + "tool_calls>\n";
    for (size_t k = 0; k < calls.size(); ++k) {
      const std::string field = "tool_calls[" + std::to_string(k) + "].function";
      const Json* function = calls[k].is_object() && calls[k].contains("function") ? &calls[k]["function"] : nullptr;
      if (!function || !function->is_object()) return at(index, field, "should be an object");
      const Json& call = calls[k];
      if (call.contains("id") && !call["id"].is_null() && !call["id"].is_string())
        return at(index, "tool_calls[" + std::to_string(k) + "].id", "should be a string");
      if (!function->contains("name") || !(*function)["name"].is_string())
        return at(index, field + ".name", "should be a string");
      prompt_.text += std::string(k ? "\n" : "") + "<" + dsml + "invoke name=\"";
      literal((*function)["name"].get<std::string>());
      prompt_.text += "\">\n";
      const std::vector<PythonMember> members = arguments(*function);
      for (size_t p = 0; p < members.size(); ++p) {
        prompt_.text += std::string(p ? "\n" : "") + "<" + dsml + "parameter name=\"";
        literal(members[p].key);
        prompt_.text += std::string("\" string=\"") + (members[p].is_string ? "true" : "false") + "\">";
        literal(members[p].value);
        prompt_.text += "</" + dsml + "parameter>";
      }
      prompt_.text += "\n</" + dsml + "invoke>";
    }
    prompt_.text += "\n</" + dsml + "tool_calls>";
    return {};
  }

  // Arguments come as JSON text; what does not parse to an object is sent whole, as one parameter.
  static std::vector<PythonMember> arguments(const Json& function) {
    if (!function.contains("arguments") || function["arguments"].is_null()) return {};
    const Json& value = function["arguments"];
    const std::string text = value.is_string() ? value.get<std::string>() : dump_json(value);
    Result<std::vector<PythonMember>> members = python_members(text);
    if (members) return std::move(*members);
    return {{"arguments", text, true}};
  }

  void transition(const std::vector<Message>& messages, size_t i, bool think) {
    const bool last = i + 1 == messages.size();
    if (!last && messages[i + 1].role != "assistant" && messages[i + 1].role != "latest_reminder") return;
    const Message& m = messages[i];
    if (m.task == "action") {
      prompt_.text += std::string(kAssistant) + (o_.thinking ? c_.thinking_start : c_.thinking_end) + "<｜action｜>";
    } else if (!m.task.empty()) {
      prompt_.text += "<｜" + m.task + "｜>";
    } else if (m.role == "user" || m.role == "developer") {
      begin_answer(think);
    }
    if (!m.task.empty()) in_answer_ = true, prompt_.in_reasoning = false;
  }

  // The marker of an answer, unless it stands there.
  void begin_answer(bool think) {
    if (std::exchange(in_answer_, true)) return;
    prompt_.text += kAssistant + (think ? c_.thinking_start : c_.thinking_end);
    prompt_.in_reasoning = think;
  }

  // The last message, the assistant's, up to where it goes on.
  RenderedPrompt continued(const std::vector<Message>& messages, bool think) {
    const Message& m = messages.back();
    if (think && (messages.size() == 1 || messages[messages.size() - 2].task.empty())) {
      literal(m.reasoning);
      prompt_.in_reasoning = m.content.empty();
      if (!m.content.empty()) prompt_.text += c_.thinking_end;
    }
    literal(m.content);
    return std::move(prompt_);
  }

  const ProseConstants& c_;
  const ChatOptions& o_;
  const bool generates_, continues_;
  bool in_answer_ = false;  // the marker of the answer that is next has been written
  RenderedPrompt prompt_;
};

// Whether the last message is to be continued.
Result<bool> continues_last(const std::vector<Message>& messages, const ChatOptions& options) {
  const size_t i = messages.size() - 1;
  const Message& last = messages[i];
  const bool asked = options.continue_final_message || last.prefix;
  if (last.role != "assistant") {
    if (asked) return at(i, "role", "is '" + last.role + "': only an assistant's last message can be continued");
    return false;
  }
  if (last.tool_calls)
    return at(i, "tool_calls", "have no answers: add a message of role tool for each call before the next answer");
  if (asked && !last.task.empty()) return at(i, "task", "cannot stand on a message that is to be continued");
  if (asked && !options.thinking && last.content.empty() && !last.reasoning.empty())
    return at(i, "reasoning_content", "cannot be continued with thinking off: enable it, or give content to continue");
  if (asked || last.without_eos) return true;
  if (!last.task.empty()) return false;
  return at(i, "",
            "is the assistant's and the last: set \"prefix\": true on it, or continue_final_message in the request, to "
            "have it continued, or end with a message of role user or tool to have that answered");
}

Result<std::vector<Message>> read_messages(const Json& messages, const ChatOptions& options, OtherParts other) {
  if (!messages.is_array() || messages.empty()) {
    Error error = invalid("messages should be a list with at least one message");
    error.field = "messages";
    return error;
  }
  if (!options.reasoning_effort.empty() && options.reasoning_effort != "low" && options.reasoning_effort != "high" &&
      options.reasoning_effort != "max") {
    Error error = invalid("reasoning_effort is '" + options.reasoning_effort + "'; low, high and max are known");
    error.field = "reasoning_effort";
    return error;
  }
  std::vector<Message> read;
  for (size_t i = 0; i < messages.size(); ++i) {
    TC_ASSIGN(Message message, read_message(messages[i], i, other));
    read.push_back(std::move(message));
  }
  return read;
}

}  // namespace

Result<RenderedPrompt> render_chat(const ProseConstants& constants, const Json& messages, const ChatOptions& options) {
  TC_ASSIGN(std::vector<Message> read, read_messages(messages, options, OtherParts::noted));
  return Renderer(constants, options, false, false).render(std::move(read));
}

Result<RenderedPrompt> render_generation_prompt(const ProseConstants& constants, const Json& messages,
                                                const ChatOptions& options) {
  TC_ASSIGN(std::vector<Message> read, read_messages(messages, options, OtherParts::refused));
  TC_ASSIGN(const bool continues, continues_last(read, options));
  return Renderer(constants, options, true, continues).render(std::move(read));
}

}  // namespace thermocline
