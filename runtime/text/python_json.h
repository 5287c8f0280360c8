// JSON as Python's json.dumps(ensure_ascii=False) writes it: prompts and parsed tool calls must match it byte for byte.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "runtime/io/json_document.h"

namespace thermocline {

/// `", "` and `": "` separators, non-ASCII kept, key order kept, floats as Python's repr.
std::string python_dumps(const Json& json);
/// A string with its quotes.
std::string python_dumps_string(std::string_view text);
/// repr of a float: 1.0, 0.1, 1e-07, 1e+16.
std::string python_float_repr(double value);

/// Whether a text is one JSON value and nothing else. Linear in its length.
bool is_json(std::string_view text);

/// The members of a JSON object given as text, values re-serialised; numbers beyond 64 bits keep their digits.
/// `is_string` values come without quotes; of a key given twice the last value counts. Errors: corrupt when the text is
/// no JSON object.
struct PythonMember {
  std::string key, value;
  bool is_string = false;
};
Result<std::vector<PythonMember>> python_members(std::string_view object_text);

}  // namespace thermocline
