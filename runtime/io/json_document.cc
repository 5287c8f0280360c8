#include "runtime/io/json_document.h"

#include <cmath>
#include <set>
#include <vector>

namespace thermocline {
namespace {

constexpr int kMaxDepth = 64;

// The offset of the first bracket nested deeper than kMaxDepth, or -1. Strings are skipped.
int64_t too_deep_at(std::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\')
        ++i;
      else if (c == '"')
        in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxDepth) return static_cast<int64_t>(i);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return -1;
}

// nlohmann keeps the last of two equal keys in silence; a checkpoint that says a thing twice is corrupt.
std::string find_repeated_key(std::string_view text) {
  std::vector<std::set<std::string>> open;
  std::string repeated;
  const auto watch = [&](int, SortedJson::parse_event_t event, SortedJson& value) {
    using Event = SortedJson::parse_event_t;
    if (event == Event::object_start) open.emplace_back();
    if (event == Event::object_end) open.pop_back();
    if (event == Event::key && !open.back().insert(value.get<std::string>()).second && repeated.empty())
      repeated = value.get<std::string>();
    return true;
  };
  const SortedJson ignored = SortedJson::parse(text, watch, false);
  return repeated;
}

template <class J>
Error wrong_type(const J& object, const std::string& key, const char* expected) {
  if (!object.is_object() || !object.contains(key)) return corrupt("field '" + key + "' is missing");
  std::string found = dump_json(object[key]);
  if (found.size() > 60) found = found.substr(0, 60) + "...";
  return corrupt("field '" + key + "' should be " + expected + ", not " + found);
}

template <class J>
const J* member(const J& object, const std::string& key) {
  if (!object.is_object()) return nullptr;
  const auto it = object.find(key);
  return it == object.end() ? nullptr : &*it;
}

template <class J>
Result<J> parse(std::string_view text, bool unique_keys) {
  if (const int64_t at = too_deep_at(text); at >= 0)
    return corrupt("JSON is nested more than " + std::to_string(kMaxDepth) + " deep at byte " + std::to_string(at));
  if (unique_keys) {
    if (const std::string key = find_repeated_key(text); !key.empty())
      return corrupt("the name '" + key + "' appears twice");
  }
  try {
    return J::parse(text);
  } catch (const typename J::parse_error& error) {
    const size_t at = error.byte > 0 ? error.byte - 1 : 0;
    return corrupt(at >= text.size() ? "JSON ends too early, at byte " + std::to_string(text.size())
                                     : "not JSON at byte " + std::to_string(at));
  } catch (const typename J::exception& error) {
    return corrupt(std::string("not JSON: ") + error.what());
  }
}

}  // namespace

Result<Json> parse_json(std::string_view text, bool unique_keys) { return parse<Json>(text, unique_keys); }
Result<SortedJson> parse_sorted_json(std::string_view text, bool unique_keys) {
  return parse<SortedJson>(text, unique_keys);
}

template <class J>
Result<int64_t> get_int(const J& object, const std::string& key) {
  const J* value = member(object, key);
  if (value && value->is_number_unsigned() && value->template get<uint64_t>() <= INT64_MAX)
    return value->template get<int64_t>();
  if (value && value->is_number_integer() && !value->is_number_unsigned()) return value->template get<int64_t>();
  if (value && value->is_number_float()) {  // 65536.0 is what some exporters write
    const double number = value->template get<double>();
    if (std::nearbyint(number) == number && std::fabs(number) < 0x1p53) return static_cast<int64_t>(number);
  }
  return wrong_type(object, key, "an integer");
}

template <class J>
Result<double> get_number(const J& object, const std::string& key) {
  const J* value = member(object, key);
  if (value && value->is_number() && std::isfinite(value->template get<double>())) return value->template get<double>();
  return wrong_type(object, key, "a number");
}

template <class J>
Result<std::string> get_string(const J& object, const std::string& key) {
  const J* value = member(object, key);
  if (value && value->is_string()) return value->template get<std::string>();
  return wrong_type(object, key, "a string");
}

template Result<int64_t> get_int(const Json&, const std::string&);
template Result<int64_t> get_int(const SortedJson&, const std::string&);
template Result<double> get_number(const Json&, const std::string&);
template Result<double> get_number(const SortedJson&, const std::string&);
template Result<std::string> get_string(const Json&, const std::string&);
template Result<std::string> get_string(const SortedJson&, const std::string&);

}  // namespace thermocline
