#include "runtime/text/completion_parser.h"

#include <algorithm>
#include <array>
#include <optional>
#include <unordered_set>

#include "runtime/text/python_json.h"
#include "runtime/text/utf8.h"

namespace thermocline {
namespace {

constexpr size_t npos = std::string_view::npos;
constexpr size_t kMaxTagBytes = 256;  // of a tag between words: what is longer is no tag of ours, but words

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
    for (size_t at = at_; at < text_.size(); ++at) {
      for (size_t i = 0; i < N; ++i) {
        if (text_[at] != markers[i][0] || !text_.substr(at).starts_with(markers[i])) continue;
        const Part part{text_.substr(at_, at - at_), static_cast<int>(i)};
        at_ = at + markers[i].size();
        return part;
      }
    }
    const Part part{text_.substr(at_)};
    at_ = text_.size();
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
      std::unordered_set<std::string> seen;
      std::string arguments = "{";
      while (part.marker == 0) {
        const Reader::Part body = reader_.until(std::array{"/" + c_.dsml_token + "parameter"});
        const auto match = match_parameter(body.text);
        if (!match || body.marker < 0)
          return reader_.fail("a parameter needs name=\"...\" string=\"true|false\">value");
        arguments += (seen.empty() ? "" : ", ") + argument_text(match->name, match->is_string, match->value);
        if (!seen.insert(match->name).second) return reader_.fail("the parameter '" + match->name + "' comes twice");
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

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool is_tag_name(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

// The value of `name="..."` in the head of a tag; it ends at `end_mark`, or where that is absent at the next quote.
std::optional<std::string> attribute(const std::string& head, const std::string& name, const char* end_mark) {
  const size_t begin = head.find(name + "=\"");
  if (begin == npos) return std::nullopt;
  const size_t from = begin + name.size() + 2;
  size_t end = end_mark ? head.find(end_mark, from) : npos;
  if (end == npos) end = head.find('"', from);
  if (end == npos) return std::nullopt;
  return head.substr(from, end - from);
}

}  // namespace

Result<ParsedCompletion> parse_completion(const ProseConstants& constants, std::string_view text, bool thinking) {
  return StrictParser(constants, text).parse(thinking);
}

ToolProperties tool_properties(const Json& tools) {
  const auto member = [](const Json* json, const char* name) {
    const Json* const found = json && json->is_object() && json->contains(name) ? &(*json)[name] : nullptr;
    return found;
  };
  ToolProperties known;
  if (!tools.is_array()) return known;
  for (const Json& tool : tools) {
    const Json* const function = member(&tool, "function");
    const Json* const name = member(function, "name");
    const Json* const properties = member(member(function, "parameters"), "properties");
    if (!name || !name->is_string() || !properties || !properties->is_object()) continue;
    std::set<std::string>& names = known[name->get<std::string>()];
    for (const auto& [property, schema] : properties->items()) names.insert(property);
  }
  return known;
}

CompletionStream::CompletionStream(const ProseConstants& constants, bool thinking, ToolProperties tools)
    : dsml_(constants.dsml_token),
      think_end_(constants.thinking_end),
      eos_(constants.eos),
      parameter_end_("</" + constants.dsml_token + "parameter"),
      tools_(std::move(tools)),
      in_reasoning_(thinking) {}

std::vector<CompletionStream::Event> CompletionStream::push(std::string_view text) {
  buffer_ += text;
  std::vector<Event> events;
  while (advance(events)) {
  }
  buffer_.erase(0, begin_);
  scan_ -= begin_;
  begin_ = 0;
  return events;
}

std::vector<CompletionStream::Event> CompletionStream::finish(bool truncated) {
  std::vector<Event> events;
  if (state_ == State::text) {
    // What is left may begin a marker. Line breaks and a lone '<' of a text that ended are text all the same; the
    // beginning of the DSML token is not, as a tokenizer knows it whole.
    const std::string_view first(dsml_.data(), static_cast<size_t>(std::max(1, utf8_length(dsml_))));
    const std::string_view held = std::string_view(buffer_).substr(begin_);
    size_t end = truncated ? std::min(held.find('<'), held.find(first)) : held.find(dsml_.substr(0, first.size() + 1));
    if (end != npos)
      while (end > 0 && (held[end - 1] == '<' || held[end - 1] == '/' || held[end - 1] == '\n')) --end;
    emit_text(events, begin_ + std::min(end, held.size()));
  }
  buffer_.clear();
  begin_ = scan_ = 0;
  state_ = State::done;
  return events;
}

// One step; false when more text is needed.
bool CompletionStream::advance(std::vector<Event>& events) {
  switch (state_) {
    case State::text:
      return text_state(events);
    case State::tag:
      return tag_state();
    case State::invoke_head:
      return invoke_head_state();
    case State::call:
      return call_state(events);
    case State::parameter_head:
      return parameter_head_state();
    case State::parameter:
      return parameter_state();
    case State::done:
      begin_ = scan_ = buffer_.size();
      return false;
  }
  return false;
}

void CompletionStream::go_on(State state, size_t at) {
  state_ = state;
  begin_ = scan_ = at;
}

// Gives out the text up to `end`. White space behind a tag waits for words: if none follow it was the tag's own.
void CompletionStream::emit_text(std::vector<Event>& events, size_t end) {
  size_t from = begin_;
  if (after_tag_)
    while (from < end && is_space(buffer_[from])) ++from;
  begin_ = end;
  if (from == end) return;
  std::string text = after_tag_ && had_text_ ? separator_ : "";
  text.append(buffer_, from, end - from);
  after_tag_ = false;
  had_text_ = true;
  events.push_back({in_reasoning_ ? Event::Kind::reasoning : Event::Kind::content, std::move(text), 0});
}

// What stands at a byte of the text: a marker, perhaps the beginning of one, or nothing of interest. A tag counts from
// the line breaks before it, two at most, and ends behind the DSML token; its '<' may be missing.
CompletionStream::Marker CompletionStream::marker_at(size_t at) const {
  using Kind = Marker::Kind;
  const std::string_view rest = std::string_view(buffer_).substr(at);
  if (rest.starts_with(think_end_)) return {Kind::think_end, at + think_end_.size()};
  if (rest.starts_with(eos_)) return {Kind::eos, at + eos_.size()};
  size_t i = 0;
  while (i < 2 && i < rest.size() && rest[i] == '\n') ++i;
  if (i < rest.size() && rest[i] == '<') ++i;
  if (i > 0 && i < rest.size() && rest[i - 1] == '<' && rest[i] == '/') ++i;
  if (rest.substr(i).starts_with(dsml_)) return {Kind::tag, at + i + dsml_.size()};
  const bool partial = dsml_.starts_with(rest.substr(i)) || think_end_.starts_with(rest) || eos_.starts_with(rest);
  return {partial ? Kind::partial : Kind::none, at};
}

bool CompletionStream::text_state(std::vector<Event>& events) {
  const auto may_start = [&](char c) {
    return c == '\n' || c == '<' || c == dsml_[0] || c == think_end_[0] || c == eos_[0];
  };
  Marker marker;
  size_t at = begin_;
  for (; at < buffer_.size() && marker.kind == Marker::Kind::none; ++at)
    if (may_start(buffer_[at])) marker = marker_at(at);
  if (marker.kind != Marker::Kind::none) --at;
  emit_text(events, at);
  switch (marker.kind) {
    case Marker::Kind::none:
    case Marker::Kind::partial:
      return false;
    case Marker::Kind::think_end:  // a repeated one changes nothing
      if (std::exchange(in_reasoning_, false)) after_tag_ = had_text_ = false;
      begin_ = marker.end;
      return true;
    case Marker::Kind::eos:
      state_ = State::done;
      return true;
    case Marker::Kind::tag:
      if (!after_tag_) separator_ = buffer_.substr(at, std::min(buffer_.find_first_not_of('\n', at), marker.end) - at);
      after_tag_ = true;
      begin_tag(at, marker.end - dsml_.size());
      return true;
  }
  return false;
}

// A tag whose DSML token stands at `token`, in text that begins at `begin`.
void CompletionStream::begin_tag(size_t begin, size_t token) {
  tag_.closes = token > begin && buffer_[token - 1] == '/';
  go_on(State::tag, token + dsml_.size());
}

// Reads the name of a tag; false when it may go on.
bool CompletionStream::read_tag_name(size_t at) {
  size_t end = at;
  while (end < buffer_.size() && end - at < kMaxTagBytes && is_tag_name(buffer_[end])) ++end;
  if (end == buffer_.size()) return false;
  tag_.name = buffer_.substr(at, end - at);
  tag_.end = end;
  return true;
}

// A tag between words. An invoke begins a call; of any other the rest goes: blanks and '>', or the attributes of a
// parameter that stands in no call.
bool CompletionStream::tag_state() {
  if (!read_tag_name(begin_)) return false;
  if (tag_.name == "invoke" && !tag_.closes) {
    open_call();
    return true;
  }
  const bool attributes = tag_.name == "parameter" && !tag_.closes;
  const auto belongs = [&](char c) { return attributes ? c != '<' && c != '>' && c != '\n' : c == ' '; };
  size_t end = tag_.end;
  while (end < buffer_.size() && end - tag_.end < kMaxTagBytes && belongs(buffer_[end])) ++end;
  if (end == buffer_.size()) return false;
  go_on(State::text, end + (buffer_[end] == '>'));
  return true;
}

void CompletionStream::open_call() {
  call_ = {};
  go_on(State::invoke_head, tag_.end);
}

// The first of two markers at or after scan_; npos while none has come, and the search goes on there.
size_t CompletionStream::find_either(std::string_view a, std::string_view b) {
  const std::string_view text = buffer_;
  for (; scan_ < text.size(); ++scan_) {
    const std::string_view rest = text.substr(scan_);
    if (rest[0] != a[0] && rest[0] != b[0]) continue;
    if (rest.starts_with(a) || rest.starts_with(b)) return scan_;
    if (a.starts_with(rest) || b.starts_with(rest)) return npos;  // perhaps the beginning of one
  }
  return npos;
}

bool CompletionStream::at_eos(size_t at) const { return std::string_view(buffer_).substr(at).starts_with(eos_); }

// The attributes of a tag: up to '>' behind a quote, since names may hold a '>'. Empty when another tag comes first:
// then the head has no end and its call is broken. False while the end has not come.
bool CompletionStream::read_head(std::string& head) {
  const std::string_view text = buffer_;
  for (; scan_ < text.size(); ++scan_) {
    const std::string_view rest = text.substr(scan_);
    const bool quoted = scan_ > begin_ && text[scan_ - 1] == '"';
    if (rest[0] == '>' && (quoted || text.substr(begin_, scan_ - begin_).find('"') == npos)) {
      head = text.substr(begin_, scan_ - begin_);
      go_on(State::call, scan_ + 1);
      return true;
    }
    if (rest[0] != dsml_[0] && rest[0] != eos_[0]) continue;
    if (rest.starts_with(dsml_) || rest.starts_with(eos_)) {
      head.clear();
      state_ = State::call;
      return true;
    }
    if (dsml_.starts_with(rest) || eos_.starts_with(rest)) return false;
  }
  return false;
}

bool CompletionStream::invoke_head_state() {
  std::string head;
  if (!read_head(head)) return false;
  const std::optional<std::string> name = attribute(head, "name", nullptr);
  call_.name = name.value_or("");
  call_.broken = call_.name.empty();
  return true;
}

// Inside a call: parameters, until its end. Any other tag ends it too, if it has parameters: the model forgot.
bool CompletionStream::call_state(std::vector<Event>& events) {
  const size_t at = find_either(dsml_, eos_);
  if (at == npos) return false;
  if (at_eos(at)) {
    state_ = State::done;
    return true;
  }
  if (!read_tag_name(at + dsml_.size())) return false;
  tag_.closes = at > begin_ && buffer_[at - 1] == '/';
  if (tag_.name == "parameter") {
    go_on(tag_.closes ? State::call : State::parameter_head, tag_.end);
    return true;
  }
  const bool ends = tag_.name == "invoke" && tag_.closes;
  if (ends || !call_.arguments.empty()) close_call(events);
  begin_tag(begin_, at);
  return true;
}

bool CompletionStream::parameter_head_state() {
  std::string head;
  if (!read_head(head)) return false;
  std::optional<std::string> name = attribute(head, "name", "\" string=\"");
  if (!name) {
    call_.broken = true;
    return true;
  }
  parameter_is_string_ = attribute(head.erase(head.find(*name), name->size()), "string", nullptr) != "false";
  parameter_name_ = std::move(*name);
  state_ = State::parameter;
  return true;
}

bool CompletionStream::parameter_state() {
  const size_t end = find_either(parameter_end_, eos_);
  if (end == npos) return false;
  if (at_eos(end)) {
    state_ = State::done;
    return true;
  }
  add_parameter(std::string_view(buffer_).substr(begin_, end - begin_));
  go_on(State::call, end + parameter_end_.size());
  return true;
}

void CompletionStream::add_parameter(std::string_view value) {
  const bool quote = parameter_is_string_ || !is_json(value);
  const auto [it, is_new] = call_.index_of.try_emplace(parameter_name_, call_.arguments.size());
  if (is_new) call_.arguments.emplace_back();
  call_.arguments[it->second] = {parameter_name_, quote ? python_dumps_string(value) : std::string(value)};
  if (parameter_name_ == "arguments" || parameter_name_ == "input") call_.wrapped = value;
}

// The members of a lone wrapper that the tool does not know.
std::optional<std::string> CompletionStream::unwrapped() const {
  const auto tool = tools_.find(call_.name);
  if (call_.arguments.size() != 1 || tool == tools_.end()) return std::nullopt;
  const std::string& name = call_.arguments[0].first;
  if ((name != "arguments" && name != "input") || tool->second.contains(name)) return std::nullopt;
  const Result<std::vector<PythonMember>> members = python_members(call_.wrapped);
  if (!members) return std::nullopt;
  std::string text;
  for (const PythonMember& member : *members)
    text += (text.empty() ? "" : ", ") + argument_text(member.key, member.is_string, member.value);
  return "{" + text + "}";
}

void CompletionStream::close_call(std::vector<Event>& events) {
  if (call_.broken) return;
  std::optional<std::string> arguments = unwrapped();
  if (!arguments) {
    arguments = "{";
    for (const auto& [name, value] : call_.arguments)
      *arguments += (arguments->size() > 1 ? ", " : "") + python_dumps_string(name) + ": " + value;
    *arguments += "}";
  }
  events.push_back({Event::Kind::tool_name, call_.name, calls_});
  events.push_back({Event::Kind::tool_arguments, std::move(*arguments), calls_++});
}

}  // namespace thermocline
