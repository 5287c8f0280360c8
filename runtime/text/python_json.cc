#include "runtime/text/python_json.h"

#include <charconv>
#include <cmath>
#include <unordered_map>

namespace thermocline {

std::string python_dumps_string(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\b':
        out += "\\b";
        break;
      case '\f':
        out += "\\f";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          constexpr const char* kHex = "0123456789abcdef";
          out += {'\\', 'u', '0', '0', kHex[(c >> 4) & 15], kHex[c & 15]};
        } else {
          out += c;
        }
    }
  }
  return out + "\"";
}

// Python switches to an exponent below 1e-4 and from 1e16 on; digits are the shortest that read back.
std::string python_float_repr(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  char buffer[400];
  const double magnitude = std::fabs(value);
  const bool scientific = magnitude != 0 && (magnitude < 1e-4 || magnitude >= 1e16);
  const auto [end, error] = std::to_chars(buffer, buffer + sizeof buffer, value,
                                          scientific ? std::chars_format::scientific : std::chars_format::fixed);
  std::string text(buffer, end);
  return scientific || text.find('.') != std::string::npos ? text : text + ".0";
}

std::string python_dumps(const Json& json) {
  std::string out;
  bool first = true;
  switch (json.type()) {
    case Json::value_t::object:
      for (const auto& [key, value] : json.items()) {
        out += (first ? "{" : ", ") + python_dumps_string(key) + ": " + python_dumps(value);
        first = false;
      }
      return first ? "{}" : out + "}";
    case Json::value_t::array:
      for (const Json& value : json) {
        out += (first ? "[" : ", ") + python_dumps(value);
        first = false;
      }
      return first ? "[]" : out + "]";
    case Json::value_t::string:
      return python_dumps_string(json.get_ref<const std::string&>());
    case Json::value_t::number_float:
      return python_float_repr(json.get<double>());
    default:
      return dump_json(json);
  }
}

namespace {

// Collects the members of the outermost object; everything inside them is written as it comes.
class MemberReader : public nlohmann::json_sax<Json> {
 public:
  std::vector<PythonMember> members;
  bool is_object = false;

  bool null() override { return value("null"); }
  bool boolean(bool b) override { return value(b ? "true" : "false"); }
  bool number_integer(number_integer_t n) override { return value(std::to_string(n)); }
  bool number_unsigned(number_unsigned_t n) override { return value(std::to_string(n)); }
  bool number_float(number_float_t f, const string_t& digits) override {
    const bool integer = digits.find_first_of(".eE") == std::string::npos;  // too long for 64 bits, exact in Python
    return value(integer ? digits : python_float_repr(f));
  }
  bool string(string_t& text) override {
    if (depth_ == 1) members[current_].is_string = true;
    return value(depth_ == 1 ? text : python_dumps_string(text));
  }
  bool binary(binary_t&) override { return false; }
  bool start_object(size_t) override { return open("{"); }
  bool end_object() override { return close("}"); }
  bool start_array(size_t) override { return open("["); }
  bool end_array() override { return close("]"); }
  bool key(string_t& name) override {
    if (depth_ == 1) {
      const auto [same, is_new] = index_of_.try_emplace(name, members.size());
      current_ = same->second;  // a repeated key keeps its first place and its last value
      if (is_new) members.emplace_back();
      members[current_] = {name, "", false};
      return true;
    }
    separate();
    out() += python_dumps_string(name) + ": ";
    after_key_ = true;
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception&) override { return false; }

 private:
  std::string& out() { return members[current_].value; }
  void separate() {
    if (!fresh_ && !after_key_) out() += ", ";
    fresh_ = after_key_ = false;
  }
  bool value(const std::string& text) {
    if (depth_ == 0) return false;
    if (depth_ > 1) separate();
    out() += text;
    return true;
  }
  bool open(const char* bracket) {
    if (depth_++ == 0) return is_object = *bracket == '{';
    if (depth_ > 2) separate();
    out() += bracket;
    fresh_ = true;
    return true;
  }
  bool close(const char* bracket) {
    if (--depth_ == 0) return true;
    out() += bracket;
    fresh_ = false;
    return true;
  }

  int depth_ = 0;
  size_t current_ = 0;
  std::unordered_map<std::string, size_t> index_of_;
  bool fresh_ = false, after_key_ = false;
};

}  // namespace

// Sorted, as looking for a repeated key is quadratic otherwise. nlohmann's parser takes a byte order mark before the
// value for nothing and a NUL for the end.
bool is_json(std::string_view text) {
  return text.find('\0') == std::string_view::npos && !text.starts_with("\xef\xbb\xbf") &&
         parse_sorted_json(text).has_value();
}

Result<std::vector<PythonMember>> python_members(std::string_view object_text) {
  MemberReader reader;
  if (!is_json(object_text) || !Json::sax_parse(object_text, &reader) || !reader.is_object)
    return corrupt("not a JSON object");
  return std::move(reader.members);
}

}  // namespace thermocline
