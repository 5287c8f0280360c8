#include "runtime/io/json_document.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>
#include <vector>

namespace thermocline {
namespace {

constexpr size_t kMaxDepth = 64;

// The offset of the first bracket nested deeper than kMaxDepth, or -1. Strings are skipped.
int64_t too_deep_at(std::string_view text) {
  size_t depth = 0;
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
      depth -= depth > 0;
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

std::string dump_json(const Json& json, int indent, bool ascii) {
  return json.dump(indent, ' ', ascii, Json::error_handler_t::replace);
}
std::string dump_json(const SortedJson& json, int indent, bool ascii) {
  return json.dump(indent, ' ', ascii, SortedJson::error_handler_t::replace);
}

namespace {

// Whether an escape \uDXxx stands at `i`, its X among `digits`.
bool is_surrogate(std::string_view text, size_t i, std::string_view digits) {
  return i + 6 <= text.size() && text[i] == '\\' && text[i + 1] == 'u' && (text[i + 2] | 32) == 'd' &&
         digits.find(static_cast<char>(text[i + 3] | 32)) != std::string_view::npos;
}

// Where a string has the first half of a surrogate pair, the second half of which is not there, or the other way round.
std::optional<size_t> half_pair_at(std::string_view text) {
  constexpr std::string_view kFirst = "89ab", kSecond = "cdef";
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\\') continue;
    const bool first = is_surrogate(text, i, kFirst);
    if (first && is_surrogate(text, i + 6, kSecond))
      i += 11;
    else if (first || is_surrogate(text, i, kSecond))
      return i;
    else
      ++i;  // what is escaped
  }
  return std::nullopt;
}

/// Builds a document while it is parsed. nlohmann's own builder looks through an ordered object for every key it adds,
/// which is quadratic; here a key is looked up in a set once an object is large, and appended.
class BoundedBuilder : public nlohmann::json_sax<Json> {
 public:
  explicit BoundedBuilder(const JsonLimits& limits) : limits_(limits) {}

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(number_integer_t value) override { return add(value); }
  bool number_unsigned(number_unsigned_t value) override { return add(value); }
  bool number_float(number_float_t value, const string_t&) override { return add(value); }
  bool string(string_t& value) override { return add(std::move(value)); }
  bool binary(binary_t&) override { return false; }
  bool start_object(std::size_t) override { return open(Json::object()); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& key) override {
    Frame& frame = open_.back();
    const auto& object = frame.value.get_ref<const Json::object_t&>();
    if (object.size() == limits_.keys) return fail("an object has more than " + std::to_string(limits_.keys) + " keys");
    bool twice;
    if (object.size() < kFew) {
      twice = std::any_of(object.begin(), object.end(), [&](const auto& member) { return member.first == key; });
    } else {
      if (object.size() == kFew)
        for (const auto& member : object) frame.keys.insert(member.first);
      twice = !frame.keys.insert(key).second;
    }
    if (twice) return fail("the key '" + key.substr(0, 60) + "' appears twice in one object");
    frame.key = std::move(key);
    frame.keyed = true;
    return true;
  }
  bool parse_error(std::size_t position, const std::string& token, const nlohmann::detail::exception& error) override {
    constexpr int kNumberOverflow = 406;  // nlohmann's number of it
    error_at_ = position > 0 ? position - 1 : 0;
    if (error.id == kNumberOverflow) {
      problem_ = located(ErrorCode::invalid_argument, "is out of range", position - std::min(position, token.size()));
    } else if (const auto half = half_pair_at(token)) {
      const bool in_key = !open_.empty() && open_.back().value.is_object() && !open_.back().keyed;
      problem_ = located(ErrorCode::corrupt,
                         std::string(in_key ? "has a key that holds" : "holds") + " half of a surrogate pair (" +
                             token.substr(*half, 6) + ")",
                         position - std::min(position, token.size() - *half));
    }
    return false;
  }

  Json take() { return std::move(root_); }
  /// Why it ended, of a document of `size` bytes.
  Error error(size_t size) const {
    if (!refusal_.empty()) return corrupt(refusal_);
    if (error_at_ >= size) return corrupt("JSON ends too early, at byte " + std::to_string(size));
    return problem_ ? *problem_ : corrupt("not JSON at byte " + std::to_string(error_at_));
  }

 private:
  static constexpr size_t kFew = 16;
  struct Frame {
    Json value;
    std::string key;  // of the member that comes next, where it is `keyed`
    bool keyed = false;
    std::set<std::string> keys;  // a tree: no choice of keys makes it slow
  };

  bool fail(std::string what) {
    refusal_ = std::move(what);
    return false;
  }
  // Of the value that is read: "messages[0].content", "logit_bias[5]"; empty for the document.
  std::string place() const {
    const auto digits = [](const std::string& key) {
      return !key.empty() && std::all_of(key.begin(), key.end(), [](char c) { return c >= '0' && c <= '9'; });
    };
    std::string place;
    for (const Frame& frame : open_) {
      const std::string key = frame.value.is_array() ? std::to_string(frame.value.size()) : frame.key.substr(0, 60);
      if (frame.value.is_object() && !frame.keyed) break;
      if (frame.value.is_array() || digits(key))
        place += "[" + key + "]";
      else
        place += (place.empty() ? "" : ".") + key;
    }
    return place;
  }
  Error located(ErrorCode code, const std::string& what, size_t byte) const {
    const std::string where = place();
    return {code, (where.empty() ? "it" : where) + " " + what + ", at byte " + std::to_string(byte), where};
  }
  template <class T>
  bool add(T&& value) {
    if (++values_ > limits_.values) return fail("it holds more than " + std::to_string(limits_.values) + " values");
    if (open_.empty()) {
      root_ = std::forward<T>(value);
      return true;
    }
    Frame& frame = open_.back();
    if (frame.value.is_array())
      frame.value.get_ref<Json::array_t&>().emplace_back(std::forward<T>(value));
    else
      frame.value.get_ref<Json::object_t&>().emplace_back(std::move(frame.key), std::forward<T>(value));
    frame.keyed = false;
    return true;
  }
  bool open(Json container) {
    if (open_.size() == kMaxDepth) return fail("it is nested more than " + std::to_string(kMaxDepth) + " deep");
    open_.push_back({std::move(container), {}, false, {}});
    return true;
  }
  bool close() {
    Json value = std::move(open_.back().value);
    open_.pop_back();
    return add(std::move(value));
  }

  const JsonLimits limits_;
  Json root_;
  std::vector<Frame> open_;
  size_t values_ = 0, error_at_ = 0;
  std::string refusal_;
  std::optional<Error> problem_;
};

}  // namespace

Result<Json> parse_bounded_json(std::string_view text, const JsonLimits& limits) {
  BoundedBuilder builder(limits);
  if (Json::sax_parse(text, &builder)) return builder.take();
  return builder.error(text.size());
}

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
