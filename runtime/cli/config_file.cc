#include "runtime/cli/config_file.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <iterator>

#include "runtime/text/utf8.h"

namespace thermocline::cli {
namespace {

constexpr std::string_view kBlanks = " \t\r", kBlanksAndLines = " \t\r\n";

std::vector<std::string> parts_of(const std::string& dotted) {
  std::vector<std::string> parts = CLI::detail::split(dotted, '.');
  for (std::string& part : parts) CLI::detail::remove_quotes(CLI::detail::trim(part));
  return parts;
}

/// Reads the text from its start to its end; every function leaves it behind what it took.
class Reader {
 public:
  Reader(std::string text, const std::string& name) : text_(std::move(text)), name_(name) {}

  std::vector<ConfigLine> read() {
    std::vector<ConfigLine> lines;
    while (skip(kBlanksAndLines), at_ < text_.size()) {
      if (text_[at_] == '[')
        read_section();
      else
        lines.push_back(read_key());
      end_line();
    }
    return lines;
  }

 private:
  [[noreturn]] void fail(int line, const std::string& what) const {
    throw CLI::ConfigError(fmt::format("{}:{}: {}", name_, line, what));
  }
  char next() const { return at_ < text_.size() ? text_[at_] : '\n'; }

  // Comments too: they end before the end of their line.
  void skip(std::string_view blanks) {
    for (; at_ < text_.size(); ++at_) {
      if (text_[at_] == '#') at_ = std::min(text_.find('\n', at_), text_.size());
      if (at_ == text_.size() || blanks.find(text_[at_]) == std::string_view::npos) return;
      if (text_[at_] == '\n') ++line_;
    }
  }

  void end_line() {
    skip(kBlanks);
    if (next() != '\n') fail(line_, fmt::format("'{}' is too much here", rest_of_line()));
  }

  std::string rest_of_line() const {
    std::string rest = text_.substr(at_, text_.find('\n', at_) - at_);
    return CLI::detail::rtrim(rest);
  }

  // Up to one of `ends`, a comment or the end of the line, without the blanks around it.
  std::string take_until(std::string_view ends) {
    const size_t begin = at_;
    at_ = std::min(text_.find_first_of(std::string(ends) + "#\n", at_), text_.size());
    std::string taken = text_.substr(begin, at_ - begin);
    return CLI::detail::trim(taken);
  }

  void read_section() {
    ++at_;
    const std::string name = take_until("]");
    if (next() != ']') fail(line_, "a section without its end");
    ++at_;
    section_ = parts_of(name);
  }

  ConfigLine read_key() {
    ConfigLine line{.number = line_, .section = section_};
    const std::string key = take_until("=");
    if (next() != '=') fail(line_, fmt::format("'{}' has no =", key));
    ++at_;
    std::vector<std::string> parts = parts_of(key);
    line.key = std::move(parts.back());
    line.section.insert(line.section.end(), parts.begin(), parts.end() - 1);
    skip(kBlanks);
    if (next() == '[') {
      line.kind = ConfigLine::Kind::list;
      line.values = read_list();
    } else {
      if (next() == '"' || next() == '\'') line.kind = ConfigLine::Kind::text;
      line.values = {read_value("")};
    }
    return line;
  }

  std::vector<std::string> read_list() {
    const int begin = line_;
    std::vector<std::string> values;
    ++at_;
    while (skip(kBlanksAndLines), next() != ']') {
      if (at_ == text_.size()) fail(begin, "a list without its end");
      values.push_back(read_value(",]"));
      skip(kBlanksAndLines);
      if (next() == ',') ++at_;
    }
    ++at_;
    return values;
  }

  std::string read_value(std::string_view ends) {
    if (next() == '"' || next() == '\'') return read_string();
    std::string word = take_until(ends);
    if (word.empty()) fail(line_, "a value is missing");
    return word;
  }

  // 'as it is', or "with \n, \t, \\ and \"".
  std::string read_string() {
    const char quote = text_[at_++];
    std::string value;
    for (; next() != quote; ++at_) {
      if (next() == '\n') fail(line_, "a string without its end");
      value += quote == '"' && next() == '\\' ? escaped() : next();
    }
    ++at_;
    return value;
  }

  char escaped() {
    constexpr std::string_view kWritten = "nt\\\"", kMeant = "\n\t\\\"";
    ++at_;
    const size_t i = kWritten.find(next());
    if (i == std::string_view::npos)
      fail(line_, fmt::format("\\{} is not understood here: 'single quotes' keep a \\ as it is", next()));
    return kMeant[i];
  }

  std::string text_;
  const std::string& name_;
  size_t at_ = 0;
  int line_ = 1;
  std::vector<std::string> section_;
};

}  // namespace

std::string ConfigLine::full_name() const {
  return section.empty() ? key : CLI::detail::join(section, ".") + "." + key;
}

std::vector<ConfigLine> read_config(std::istream& in, const std::string& name) {
  std::string text(std::istreambuf_iterator<char>(in), {});
  if (to_valid_utf8(text) != text) throw CLI::ConfigError(name + ": this is no UTF-8 text");
  return Reader(std::move(text), name).read();
}

}  // namespace thermocline::cli
