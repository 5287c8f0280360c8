// Completions of V4 back to messages: reasoning, content, DSML tool calls. Source: spec section 6.3.
// parse_completion is the strict official parser; CompletionStream is what a server needs, incremental and lenient.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "runtime/io/json_document.h"
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

/// The parameters that each tool of a request declares, by the tool's name.
using ToolProperties = std::map<std::string, std::set<std::string>, std::less<>>;

/// Reads them from the `tools` of a request. Tools without `function.parameters.properties` are left out.
ToolProperties tool_properties(const Json& tools);

/// Feeds on pieces of text as they are generated; how they are cut changes nothing. Accepts what models really write:
///  - tags: no EOS, any name of the block around the calls, none at all, or one that is not closed or closed twice,
///  tool
///    calls inside the reasoning, white space around tags, repeated </think>. Words beside tags are kept, tags and the
///    white space around them are not: no tag ever becomes text;
///  - calls: one is given out when its end tag has come, or the block's or the next call's where that was forgotten. A
///    call that was cut, or has a parameter that cannot be read, is dropped;
///  - values: one that is no JSON where JSON was announced becomes a string; of a parameter given twice the last value
///    counts; a lone `arguments` or `input` that holds an object is unwrapped where `tools` knows the tool and it has
///    no such parameter.
/// Arguments are always one valid JSON object without a key twice. Text that may begin a tag is held back only as long.
class CompletionStream {
 public:
  struct Event {
    enum class Kind {
      reasoning,       // text
      content,         // text
      tool_name,       // a call: text is its name, index its number, counted from 0
      tool_arguments,  // text is its whole JSON; follows its name at once
    } kind;
    std::string text;
    int index = 0;
  };

  /// thinking: the text begins inside the reasoning (RenderedPrompt::in_reasoning).
  CompletionStream(const ProseConstants& constants, bool thinking, ToolProperties tools = {});

  std::vector<Event> push(std::string_view text);
  /// The completion is over: gives what was held back, if it is text. truncated: it was cut (by a limit, or a client
  /// that left), so a '<' at its end was the beginning of something and is dropped. A call that is open is dropped
  /// either way.
  std::vector<Event> finish(bool truncated = false);
  /// Whether the next word is reasoning, as far as the text is known.
  bool in_reasoning() const { return in_reasoning_; }
  /// How many calls were given out.
  int tool_calls() const { return calls_; }

 private:
  enum class State { text, tag, invoke_head, call, parameter_head, parameter, done };
  struct Marker {
    enum class Kind { none, partial, think_end, eos, tag } kind = Kind::none;
    size_t end = 0;
  };

  bool advance(std::vector<Event>& events);
  bool text_state(std::vector<Event>& events);
  bool tag_state();
  bool invoke_head_state();
  bool call_state(std::vector<Event>& events);
  bool parameter_head_state();
  bool parameter_state();
  Marker marker_at(size_t at) const;
  size_t find_either(std::string_view a, std::string_view b);
  bool read_tag_name(size_t at);
  bool read_head(std::string& head);
  bool at_eos(size_t at) const;
  void go_on(State state, size_t at);
  void begin_tag(size_t begin, size_t token);
  void emit_text(std::vector<Event>& events, size_t end);
  void open_call();
  void add_parameter(std::string_view value);
  void close_call(std::vector<Event>& events);
  std::optional<std::string> unwrapped() const;

  const std::string dsml_, think_end_, eos_, parameter_end_;
  const ToolProperties tools_;
  State state_ = State::text;
  bool in_reasoning_;
  std::string buffer_;
  size_t begin_ = 0, scan_ = 0;  // of the buffer: what is not used yet, and where the search in it goes on

  // Between words: white space behind a tag is dropped, the line breaks before it come back if words follow words.
  bool after_tag_ = false, had_text_ = false;
  std::string separator_;

  struct Tag {
    std::string name;
    bool closes = false;
    size_t end = 0;  // of its name
  } tag_;
  struct Call {
    std::string name;
    bool broken = false;
    std::vector<std::pair<std::string, std::string>> arguments;  // key, JSON
    std::unordered_map<std::string, size_t> index_of;
    std::string wrapped;  // the value of `arguments` or `input`, as it was written
  } call_;
  std::string parameter_name_;
  bool parameter_is_string_ = true;
  int calls_ = 0;
};

}  // namespace thermocline
