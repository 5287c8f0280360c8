// Fields of a config.json: integers within bounds, lists of them, and fields with only one value that will do.
#pragma once

#include <string>
#include <vector>

#include "runtime/io/json_document.h"

namespace thermocline {

constexpr int64_t kMaxExtent = int64_t{1} << 24;  // no axis of the family is near 16 M; products stay inside 64 bits

inline Status check_range(const std::string& name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    return corrupt("field '" + name + "' is " + std::to_string(value) + ", outside " + std::to_string(low) + ".." +
                   std::to_string(high));
  return {};
}

template <class Int>
Status read_int(const Json& json, const char* name, int64_t low, int64_t high, Int& out) {
  TC_ASSIGN(const int64_t value, get_int(json, name));
  TC_RETURN_IF_ERROR(check_range(name, value, low, high));
  out = static_cast<Int>(value);
  return {};
}

inline Status read_ints(const Json& json, const char* name, int64_t low, int64_t high, std::vector<int64_t>& out) {
  if (!json.is_object() || !json.contains(name) || !json[name].is_array())
    return corrupt("field '" + std::string(name) + "' is missing or no array");
  out.clear();
  for (const Json& entry : json[name]) {
    const std::string entry_name = std::string(name) + "[" + std::to_string(out.size()) + "]";
    if (!entry.is_number_integer())
      return corrupt("field '" + entry_name + "' should be an integer, not " + dump_json(entry));
    TC_RETURN_IF_ERROR(check_range(entry_name, entry.get<int64_t>(), low, high));
    out.push_back(entry.get<int64_t>());
  }
  return {};
}

/// A field with only one value that this code knows.
inline Status require(const Json& json, const char* name, const Json& expected) {
  if (!json.is_object() || !json.contains(name)) return corrupt("field '" + std::string(name) + "' is missing");
  if (json[name] != expected)
    return unsupported("field '" + std::string(name) + "' is " + dump_json(json[name]) + "; only " +
                       dump_json(expected) + " is supported");
  return {};
}

}  // namespace thermocline
