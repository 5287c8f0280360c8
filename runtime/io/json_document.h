// JSON from outside: a depth gate before nlohmann's parser, no exceptions past this file, getters that name the field.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "runtime/base/result.h"

namespace thermocline {

/// Keeps the order of keys: prompts re-serialise objects in the order they came. Looking a key up is linear.
using Json = nlohmann::ordered_json;
/// Sorts keys: for the big objects of a checkpoint (tensor tables, vocabularies).
using SortedJson = nlohmann::json;

/// Parses one JSON document. Errors: corrupt with the byte offset, also for more than 64 nested arrays and objects,
/// invalid UTF-8 and, where `unique_keys`, an object with the same key twice.
Result<Json> parse_json(std::string_view text, bool unique_keys = false);
Result<SortedJson> parse_sorted_json(std::string_view text, bool unique_keys = false);

/// What a document from a stranger may hold.
struct JsonLimits {
  size_t values = size_t{4} << 20;  // of any kind, nested ones included
  size_t keys = 10'000;             // of one object
};
/// The same for bytes that anybody may send: one pass, linear whatever they are. An object with the same key twice is
/// an error. Errors: corrupt, with the byte offset. Text or a number that JSON allows and this program cannot hold has
/// Error::field too, the path of its value: half of a surrogate pair, and a number too large (invalid_argument).
Result<Json> parse_bounded_json(std::string_view text, const JsonLimits& limits);

/// Text: on one line, or with `indent` spaces a level; with `ascii` all else is \u escapes. Invalid UTF-8 becomes
/// U+FFFD.
std::string dump_json(const Json& json, int indent = -1, bool ascii = false);
std::string dump_json(const SortedJson& json, int indent = -1, bool ascii = false);

/// The member `key` of an object as the type asked for. Errors: corrupt, naming the key and what was expected.
/// Defined for Json and SortedJson.
template <class J>
Result<int64_t> get_int(const J& object, const std::string& key);
template <class J>
Result<double> get_number(const J& object, const std::string& key);
template <class J>
Result<std::string> get_string(const J& object, const std::string& key);

}  // namespace thermocline
