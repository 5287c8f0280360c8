// Completions of V4 back to messages: reasoning, content, DSML tool calls. Source: spec section 6.3.
// parse_completion is the strict official parser; CompletionStream is what a server needs, incremental and lenient.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/result.h"
#include "runtime/text/prose_constants.h"

namespace thermocline {

struct ToolCall {
  std::string name;
  std::string arguments;  // JSON text, rebuilt: strings escaped, other values as the model wrote them
};

struct ParsedCompletion {
  std::string reasoning, content;
  std::vector<ToolCall> tool_calls;
};

/// Parses a whole completion including its EOS. Errors: invalid_argument, naming the byte.
Result<ParsedCompletion> parse_completion(const ProseConstants& constants, std::string_view text, bool thinking);

/// Feeds on pieces of text as they are generated. Accepts what models really write: no EOS, tool calls inside the
/// reasoning, the V3.2 block name, missing blank lines, white space around tags, truncated blocks, repeated </think>.
/// Text that may begin a tool block or a </think> is held back; an ordinary '<' is not.
class CompletionStream {
 public:
  struct Event {
    enum class Kind {
      reasoning,       // text
      content,         // text
      tool_name,       // a call begins: text is its name, index its number
      tool_arguments,  // text continues the JSON of call `index`
    } kind;
    std::string text;
    int index = 0;
  };

  CompletionStream(const ProseConstants& constants, bool thinking);

  std::vector<Event> push(std::string_view text);
  /// The completion is over: gives what was held back and closes open arguments.
  std::vector<Event> finish();
  int tool_calls() const { return calls_; }

 private:
  enum class State { reasoning, content, tools, invoke, parameter, done };

  bool advance(std::vector<Event>& events, bool last);
  bool text_state(std::vector<Event>& events, bool last);
  bool tools_state(bool last);
  bool invoke_state(std::vector<Event>& events, bool last);
  bool parameter_state(std::vector<Event>& events, bool last);
  void emit_text(std::vector<Event>& events, std::string text);
  void emit_argument(std::vector<Event>& events, bool is_string, const std::string& value);
  void close_call(std::vector<Event>& events);
  size_t held_back(bool last) const;

  const std::string dsml_, think_end_, eos_;
  State state_;
  std::string buffer_;
  std::string parameter_name_;
  bool parameter_is_string_ = true;
  bool open_call_ = false, first_parameter_ = true;
  int calls_ = 0;
};

}  // namespace thermocline
