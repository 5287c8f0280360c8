#include "runtime/text/completion_parser.h"

#include <algorithm>
#include <array>
#include <optional>

#include "runtime/text/python_json.h"

namespace thermocline {
namespace {

constexpr size_t npos = std::string_view::npos;

/// A cursor that reads up to the nearest of several markers, as the official parser does.
class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  struct Part {
    std::string_view text;
    int marker = -1;  // which one ended it; -1: none, the text is over
  };
  template <size_t N>
  Part until(const std::array<std::string, N>& markers) {
    Part part;
    size_t best = npos;
    for (size_t i = 0; i < N; ++i) {
      const size_t found = text_.find(markers[i], at_);
      if (found < best) best = found, part.marker = static_cast<int>(i);
    }
    part.text = text_.substr(at_, best == npos ? npos : best - at_);
    at_ = best == npos ? text_.size() : best + markers[static_cast<size_t>(part.marker)].size();
    return part;
  }
  std::string_view rest() const { return text_.substr(at_); }
  Error fail(const std::string& what) const { return invalid("byte " + std::to_string(at_) + ": " + what); }

 private:
  std::string_view text_;
  size_t at_ = 0;
};

struct Parameter {
  std::string name;
  bool is_string;
  std::string value;
};

// ` name="NAME" string="true|false">VALUE<`, the earliest end of NAME that fits.
std::optional<Parameter> match_parameter(std::string_view text) {
  constexpr std::string_view kName = " name=\"", kString = "\" string=\"";
  if (!text.starts_with(kName)) return std::nullopt;
  if (text.ends_with("<\n")) text.remove_suffix(1);
  if (!text.ends_with("<")) return std::nullopt;
  text.remove_suffix(1);
  for (size_t at = text.find(kString, kName.size()); at != npos; at = text.find(kString, at + 1)) {
    const std::string_view rest = text.substr(at + kString.size());
    for (const std::string_view flag : {std::string_view("true\">"), std::string_view("false\">")})
      if (rest.starts_with(flag))
        return Parameter{std::string(text.substr(kName.size(), at - kName.size())), flag[0] == 't',
                         std::string(rest.substr(flag.size()))};
  }
  return std::nullopt;
}

// `name="NAME">` and a line break, after optional white space.
std::optional<std::string> match_invoke_name(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of(" \t\r\n\f\v"), text.size()));
  if (!text.starts_with("name=\"")) return std::nullopt;
  text.remove_prefix(6);
  if (text.ends_with("\">\n\n")) text.remove_suffix(1);  // no parameters: an empty line
  if (!text.ends_with("\">\n")) return std::nullopt;
  return std::string(text.substr(0, text.size() - 3));
}

std::string argument_text(const std::string& name, bool is_string, const std::string& value) {
  return python_dumps_string(name) + ": " + (is_string ? python_dumps_string(value) : value);
}

/// The strict parser: one method per element of the grammar.
class StrictParser {
 public:
  StrictParser(const ProseConstants& constants, std::string_view text) : c_(constants), reader_(text) {}

  Result<ParsedCompletion> parse(bool thinking) {
    ParsedCompletion parsed;
    const std::string block_start = "\n\n<" + c_.dsml_token + "tool_calls";
    if (thinking) {
      const Reader::Part part = reader_.until(std::array{c_.thinking_end, block_start});
      if (part.marker != 0) return reader_.fail("the reasoning has no " + c_.thinking_end);
      parsed.reasoning = part.text;
    }
    const Reader::Part part = reader_.until(std::array{c_.eos, block_start});
    if (part.marker < 0) return reader_.fail("the end-of-sentence token is missing");
    parsed.content = part.text;
    if (part.marker == 1) {
      TC_RETURN_IF_ERROR(tool_calls(parsed.tool_calls));
      if (reader_.until(std::array{c_.eos}).text != "") return reader_.fail("text after the tool calls");
    }
    if (!reader_.rest().empty()) return reader_.fail("text after the end-of-sentence token");
    for (const std::string& special : {c_.bos, c_.eos, c_.thinking_start, c_.thinking_end, c_.dsml_token})
      for (const std::string* where : {&parsed.reasoning, &parsed.content})
        if (where->find(special) != npos) return reader_.fail("'" + special + "' inside the text");
    return parsed;
  }

 private:
  Status tool_calls(std::vector<ToolCall>& calls) {
    const std::string invoke = "<" + c_.dsml_token + "invoke", invoke_end = "</" + c_.dsml_token + "invoke",
                      parameter = "<" + c_.dsml_token + "parameter";
    const std::array between = {invoke, "</" + c_.dsml_token + "tool_calls>"};
    while (true) {
      const Reader::Part gap = reader_.until(between);
      if (gap.marker < 0) return reader_.fail("the tool calls do not end");
      if (gap.text != ">\n") return reader_.fail("'>' and a line break expected before a call");
      if (gap.marker == 1) return has_eos();
      Reader::Part part = reader_.until(std::array{parameter, invoke_end});
      const auto name = match_invoke_name(part.text);
      if (!name || part.marker < 0) return reader_.fail("a call needs name=\"...\"> and a line break");
      std::vector<std::string> seen;
      std::string arguments = "{";
      while (part.marker == 0) {
        const Reader::Part body = reader_.until(std::array{"/" + c_.dsml_token + "parameter"});
        const auto match = match_parameter(body.text);
        if (!match || body.marker < 0)
          return reader_.fail("a parameter needs name=\"...\" string=\"true|false\">value");
        if (std::find(seen.begin(), seen.end(), match->name) != seen.end())
          return reader_.fail("the parameter '" + match->name + "' comes twice");
        arguments += (seen.empty() ? "" : ", ") + argument_text(match->name, match->is_string, match->value);
        seen.push_back(match->name);
        part = reader_.until(std::array{parameter, invoke_end});
        if (part.text != ">\n" || part.marker < 0)
          return reader_.fail("'>' and a line break expected after a parameter");
      }
      calls.push_back({*name, arguments + "}"});
    }
  }

  Status has_eos() {
    if (reader_.rest().find(c_.eos) == npos) return reader_.fail("the end-of-sentence token is missing");
    return {};
  }

  const ProseConstants& c_;
  Reader reader_;
};

// The length of the longest suffix of `text` that is a proper prefix of `marker`.
size_t suffix_prefix(std::string_view text, std::string_view marker) {
  for (size_t n = std::min(text.size(), marker.size() - 1); n > 0; --n)
    if (text.substr(text.size() - n) == marker.substr(0, n)) return n;
  return 0;
}

}  // namespace

Result<ParsedCompletion> parse_completion(const ProseConstants& constants, std::string_view text, bool thinking) {
  return StrictParser(constants, text).parse(thinking);
}

CompletionStream::CompletionStream(const ProseConstants& constants, bool thinking)
    : dsml_(constants.dsml_token),
      think_end_(constants.thinking_end),
      eos_(constants.eos),
      state_(thinking ? State::reasoning : State::content) {}

std::vector<CompletionStream::Event> CompletionStream::push(std::string_view text) {
  buffer_ += text;
  std::vector<Event> events;
  while (advance(events, false)) {
  }
  return events;
}

std::vector<CompletionStream::Event> CompletionStream::finish() {
  std::vector<Event> events;
  while (advance(events, true)) {
  }
  close_call(events);
  return events;
}

// One step; false when more text is needed.
bool CompletionStream::advance(std::vector<Event>& events, bool last) {
  switch (state_) {
    case State::reasoning:
    case State::content:
      return text_state(events, last);
    case State::tools:
      return tools_state(last);
    case State::invoke:
      return invoke_state(events, last);
    case State::parameter:
      return parameter_state(events, last);
    case State::done:
      buffer_.clear();
      return false;
  }
  return false;
}

void CompletionStream::emit_text(std::vector<Event>& events, std::string text) {
  if (text.empty()) return;
  events.push_back({state_ == State::reasoning ? Event::Kind::reasoning : Event::Kind::content, std::move(text), 0});
}

// How many bytes at the end of the buffer may be the start of a marker.
size_t CompletionStream::held_back(bool last) const {
  if (last) return 0;
  size_t held = std::max(suffix_prefix(buffer_, think_end_ + ">"), suffix_prefix(buffer_, eos_ + ">"));
  for (const std::string name : {"tool_calls", "function_calls"}) {
    held = std::max(held, suffix_prefix(buffer_, "\n\n<" + dsml_ + name));
    held = std::max(held, suffix_prefix(buffer_, "\n<" + dsml_ + name));
    const size_t bare = suffix_prefix(buffer_, "<" + dsml_ + name);
    if (bare > 1) held = std::max(held, bare);  // a lone '<' is ordinary text
  }
  // A lone '<' may also begin </think>, but that is one token of the vocabulary and never comes in parts.
  if (held == 1 && buffer_.ends_with("<")) held = 0;
  return held;
}

bool CompletionStream::text_state(std::vector<Event>& events, bool last) {
  const size_t think = buffer_.find(think_end_), eos = buffer_.find(eos_);
  size_t block = npos, block_end = npos;
  for (const std::string name : {"tool_calls", "function_calls"}) {
    const std::string marker = dsml_ + name;
    if (const size_t at = buffer_.find(marker); at < block) block = at, block_end = at + marker.size();
  }
  if (const size_t first = std::min({think, eos, block}); first == npos) {
    const size_t keep = held_back(last);
    emit_text(events, buffer_.substr(0, buffer_.size() - keep));
    buffer_.erase(0, buffer_.size() - keep);
    return false;
  } else if (first == think) {
    emit_text(events, buffer_.substr(0, think));
    buffer_.erase(0, think + think_end_.size());
    state_ = State::content;  // a repeated </think> changes nothing
  } else if (first == eos) {
    emit_text(events, buffer_.substr(0, eos));
    state_ = State::done;
  } else {
    std::string text = buffer_.substr(0, block);
    if (text.ends_with("<")) text.pop_back();
    for (int i = 0; i < 2 && text.ends_with("\n"); ++i) text.pop_back();
    emit_text(events, std::move(text));
    buffer_.erase(0, block_end);
    state_ = State::tools;
  }
  return true;
}

// Between calls: the next invoke, the end of the block, or the end of the completion.
bool CompletionStream::tools_state(bool last) {
  const std::string invoke = "<" + dsml_ + "invoke";
  const size_t next = buffer_.find(invoke);
  size_t end = std::min(buffer_.find("</" + dsml_ + "tool_calls"), buffer_.find("</" + dsml_ + "function_calls"));
  end = std::min(end, buffer_.find(eos_));
  if (next == npos && end == npos) {
    if (last) state_ = State::done;
    return last;
  }
  if (end < next) {
    state_ = State::done;
    return true;
  }
  buffer_.erase(0, next + invoke.size());
  state_ = State::invoke;
  return true;
}

// Inside a call: its name once, then parameters until the end tag.
bool CompletionStream::invoke_state(std::vector<Event>& events, bool last) {
  if (!open_call_) {
    const size_t begin = buffer_.find("name=\""), end = begin == npos ? npos : buffer_.find("\">", begin + 6);
    if (end == npos) {
      if (last) state_ = State::done;
      return last;
    }
    open_call_ = first_parameter_ = true;
    events.push_back({Event::Kind::tool_name, buffer_.substr(begin + 6, end - begin - 6), calls_++});
    buffer_.erase(0, end + 2);
    return true;
  }
  const std::string parameter = "<" + dsml_ + "parameter", invoke_end = "</" + dsml_ + "invoke";
  const size_t next = buffer_.find(parameter), end = std::min(buffer_.find(invoke_end), buffer_.find(eos_));
  if (next == npos && end == npos) {
    if (last) state_ = State::done;
    return last;
  }
  if (end < next) {
    buffer_.erase(0, buffer_.compare(end, invoke_end.size(), invoke_end) == 0 ? end + invoke_end.size() : end);
    close_call(events);
    state_ = State::tools;
    return true;
  }
  const size_t head_end = buffer_.find('>', next);
  if (head_end == npos) {
    if (last) state_ = State::done;
    return last;
  }
  const std::string head = buffer_.substr(next, head_end - next);
  const size_t name = head.find("name=\""), name_end = name == npos ? npos : head.find('"', name + 6);
  parameter_name_ = name_end == npos ? "" : head.substr(name + 6, name_end - name - 6);
  parameter_is_string_ = head.find("string=\"false\"") == npos;
  buffer_.erase(0, head_end + 1);
  state_ = State::parameter;
  return true;
}

bool CompletionStream::parameter_state(std::vector<Event>& events, bool last) {
  const std::string close = "</" + dsml_ + "parameter";
  size_t end = buffer_.find(close), after = end + close.size();
  if (end == npos) {
    if (!last && buffer_.find(eos_) == npos) return false;
    end = std::min(buffer_.find(eos_), buffer_.size());  // truncated: the value so far
    after = end;
  }
  emit_argument(events, parameter_is_string_, buffer_.substr(0, end));
  buffer_.erase(0, after);
  state_ = State::invoke;
  return true;
}

// A value that is not a string is pasted as JSON if it is JSON, and sent as a string otherwise: clients parse this.
void CompletionStream::emit_argument(std::vector<Event>& events, bool is_string, const std::string& value) {
  const bool quote = is_string || !parse_json(value);
  events.push_back({Event::Kind::tool_arguments,
                    (first_parameter_ ? "{" : ", ") + argument_text(parameter_name_, quote, value), calls_ - 1});
  first_parameter_ = false;
}

void CompletionStream::close_call(std::vector<Event>& events) {
  if (!open_call_) return;
  events.push_back({Event::Kind::tool_arguments, first_parameter_ ? "{}" : "}", calls_ - 1});
  open_call_ = false;
}

}  // namespace thermocline
