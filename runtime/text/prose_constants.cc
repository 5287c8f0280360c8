#include "runtime/text/prose_constants.h"

#include <cstdint>
#include <optional>
#include <tuple>

#include "runtime/io/file.h"

namespace thermocline {
namespace {

bool is_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }

void append_utf8(std::string& out, uint32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += {static_cast<char>(0xc0 | c >> 6), static_cast<char>(0x80 | (c & 63))};
  } else if (c < 0x10000) {
    out += {static_cast<char>(0xe0 | c >> 12), static_cast<char>(0x80 | (c >> 6 & 63)),
            static_cast<char>(0x80 | (c & 63))};
  } else {
    out += {static_cast<char>(0xf0 | c >> 18), static_cast<char>(0x80 | (c >> 12 & 63)),
            static_cast<char>(0x80 | (c >> 6 & 63)), static_cast<char>(0x80 | (c & 63))};
  }
}

/// Reads Python string literals at a position of a source.
class LiteralReader {
 public:
  LiteralReader(std::string_view source, size_t at) : s_(source), at_(at) {}
  size_t at() const { return at_; }

  /// One or more literals side by side, in parentheses or not. nullopt when what stands here is something else.
  Result<std::optional<std::string>> concatenation() {
    skip_blanks(false);
    const bool parenthesised = at_ < s_.size() && s_[at_] == '(';
    if (parenthesised) ++at_;
    std::string text;
    int count = 0;
    while (true) {
      skip_blanks(parenthesised);
      bool raw = false;
      if (!literal_starts(raw)) break;
      TC_ASSIGN(const std::string part, literal(raw));
      text += part;
      ++count;
    }
    if (count == 0) return std::optional<std::string>();
    if (parenthesised) {
      if (at_ >= s_.size() || s_[at_] != ')') return std::optional<std::string>();
      ++at_;
    }
    skip_blanks(false);
    const bool ends = at_ >= s_.size() || s_[at_] == '\n' || s_[at_] == '\r' || s_[at_] == ';';
    return ends ? std::optional(text) : std::nullopt;  // "..." + x, "...".join(y): no constant
  }

 private:
  void skip_blanks(bool newlines) {
    while (at_ < s_.size()) {
      if (s_[at_] == '#') {
        while (at_ < s_.size() && s_[at_] != '\n') ++at_;
      } else if (s_[at_] == ' ' || s_[at_] == '\t' || (newlines && (s_[at_] == '\n' || s_[at_] == '\r'))) {
        ++at_;
      } else if (s_.substr(at_, 2) == "\\\n") {
        at_ += 2;
      } else {
        return;
      }
    }
  }

  // Moves past the prefix when a plain, raw or unicode literal starts here; f and b strings are no constants.
  bool literal_starts(bool& raw) {
    size_t i = at_;
    while (i < s_.size() && i < at_ + 2 && std::string_view("rRuU").find(s_[i]) != std::string_view::npos) ++i;
    if (i >= s_.size() || (s_[i] != '"' && s_[i] != '\'')) return false;
    for (; at_ < i; ++at_) raw |= s_[at_] == 'r' || s_[at_] == 'R';
    return true;
  }

  Result<std::string> literal(bool raw) {
    const size_t start = at_;
    const bool triple = s_.substr(at_, 3) == std::string(3, s_[at_]);
    const std::string quote(triple ? 3 : 1, s_[at_]);
    at_ += quote.size();
    std::string text;
    while (true) {
      if (at_ >= s_.size() || (!triple && s_[at_] == '\n'))
        return corrupt("a string that starts at byte " + std::to_string(start) + " does not end");
      if (s_.substr(at_, quote.size()) == quote) {
        at_ += quote.size();
        return text;
      }
      if (s_[at_] == '\\' && at_ + 1 < s_.size())
        escape(raw, text);
      else
        text += s_[at_++];
    }
  }

  void escape(bool raw, std::string& text) {
    const char c = s_[at_ + 1];
    if (raw) {
      text += '\\';
      text += c;
      at_ += 2;
      return;
    }
    at_ += 2;
    constexpr std::string_view kFrom = "ntrabfv\\'\"", kTo = "\n\t\r\a\b\f\v\\'\"";
    if (const size_t i = kFrom.find(c); i != std::string_view::npos) {
      text += kTo[i];
    } else if (c == '\n') {
      return;  // a continued line
    } else if (c == 'x' || c == 'u' || c == 'U') {
      append_utf8(text, digits(16, c == 'x' ? 2 : c == 'u' ? 4 : 8));
    } else if (c >= '0' && c <= '7') {
      --at_;
      append_utf8(text, digits(8, 3));
    } else {
      text += '\\';  // Python keeps the backslash of an unknown escape
      text += c;
    }
  }

  uint32_t digits(uint32_t base, int most) {
    uint32_t value = 0;
    for (int i = 0; i < most && at_ < s_.size(); ++i, ++at_) {
      const char c = s_[at_];
      const uint32_t digit = c >= '0' && c <= '9'   ? static_cast<uint32_t>(c - '0')
                             : c >= 'a' && c <= 'f' ? static_cast<uint32_t>(c - 'a' + 10)
                             : c >= 'A' && c <= 'F' ? static_cast<uint32_t>(c - 'A' + 10)
                                                    : 99;
      if (digit >= base) break;
      value = value * base + digit;
    }
    return value > 0x10ffff ? 0xfffd : value;
  }

  std::string_view s_;
  size_t at_;
};

}  // namespace

Result<std::map<std::string, std::string>> python_string_constants(std::string_view source) {
  std::map<std::string, std::string> constants;
  for (size_t line = 0; line < source.size();) {
    size_t at = line;
    while (at < source.size() && is_name(source[at])) ++at;
    const std::string name(source.substr(line, at - line));
    size_t next = at;
    const size_t line_end = std::min(source.find('\n', at), source.size());
    if (const bool docstring = source[line] == '"' || source[line] == '\''; docstring) {
      LiteralReader reader(source, line);
      TC_RETURN_IF_ERROR(reader.concatenation());
      next = reader.at();
    } else if (!name.empty()) {
      const size_t equals = source.substr(0, line_end).find('=', at);
      const std::string_view between = equals == std::string_view::npos ? "" : source.substr(at, equals - at);
      const bool annotated = between.find_first_not_of(" \t") != std::string_view::npos;
      const bool assignment = equals != std::string_view::npos && source.substr(equals, 2) != "==" &&
                              (!annotated || between[between.find_first_not_of(" \t")] == ':');
      if (assignment) {
        LiteralReader reader(source, equals + 1);
        TC_ASSIGN(const std::optional<std::string> text, reader.concatenation());
        if (text) constants[name] = *text;
        next = std::max(next, text ? reader.at() : next);
      }
    }
    line = source.find('\n', next);
    if (line == std::string_view::npos) break;
    ++line;
  }
  return constants;
}

namespace {

// Only what the encoding has a value for, so that no request meets a template that cannot be filled.
Status check_template(std::string_view text, std::string_view placeholder) {
  TC_ASSIGN(const std::vector<TemplatePart> parts, template_parts(text));
  for (const TemplatePart& part : parts)
    if (part.placeholder && part.text != placeholder && part.text != "dsml_token" &&
        part.text != "thinking_start_token" && part.text != "thinking_end_token")
      return corrupt("the placeholder '{" + part.text + "}' has no value");
  return {};
}

}  // namespace

Result<ProseConstants> read_prose_constants(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "encoding" / "encoding_dsv4.py";
  Result<std::string> source = read_text_file(path, 16 << 20);
  if (!source)
    return std::move(source).error().with("the chat encoding needs the prose constants of " + path.string() +
                                          ", which every published checkpoint carries");
  Result<std::map<std::string, std::string>> constants = python_string_constants(*source);
  if (!constants) return std::move(constants).error().with(path.string());
  ProseConstants prose;
  for (const auto& [name, target] : {std::pair("TOOLS_TEMPLATE", &prose.tools_template),
                                     std::pair("response_format_template", &prose.response_format_template),
                                     std::pair("REASONING_EFFORT_MAX", &prose.effort_max)}) {
    const auto it = constants->find(name);
    if (it == constants->end()) return corrupt(path.string() + ": the string constant " + name + " is missing");
    *target = it->second;
  }
  for (const auto& [name, target] :
       {std::pair("REASONING_EFFORT_HIGH", &prose.effort_high), std::pair("dsml_token", &prose.dsml_token),
        std::pair("thinking_start_token", &prose.thinking_start), std::pair("thinking_end_token", &prose.thinking_end),
        std::pair("bos_token", &prose.bos), std::pair("eos_token", &prose.eos)})
    if (const auto it = constants->find(name); it != constants->end()) *target = it->second;
  for (const auto& [name, token] :
       {std::pair("dsml_token", &prose.dsml_token), std::pair("bos_token", &prose.bos),
        std::pair("eos_token", &prose.eos), std::pair("thinking_start_token", &prose.thinking_start),
        std::pair("thinking_end_token", &prose.thinking_end)})
    if (token->empty()) return corrupt(path.string() + ": the token " + name + " is empty");
  for (const auto& [name, text, placeholder] :
       {std::tuple("TOOLS_TEMPLATE", &prose.tools_template, "tool_schemas"),
        std::tuple("response_format_template", &prose.response_format_template, "schema")})
    if (Status status = check_template(*text, placeholder); !status.ok())
      return std::move(status).error().with(path.string() + ": " + name);
  return prose;
}

Result<std::vector<TemplatePart>> template_parts(std::string_view text) {
  std::vector<TemplatePart> parts(1);
  for (size_t i = 0; i < text.size(); ++i) {
    const std::string_view two = text.substr(i, 2);
    if (two == "{{" || two == "}}") {
      parts.back().text += text[i++];
    } else if (text[i] == '{') {
      const size_t end = text.find('}', i);
      if (end == std::string_view::npos)
        return corrupt("a placeholder of a template, at byte " + std::to_string(i) + ", does not end");
      parts.push_back({std::string(text.substr(i + 1, end - i - 1)), true});
      parts.emplace_back();
      i = end;
    } else {
      parts.back().text += text[i];
    }
  }
  return parts;
}

}  // namespace thermocline
