// The prose constants of a checkpoint's own encoding/encoding_dsv4.py, read as literals: the file is never run.
// Source: spec section 6.2.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <string_view>

#include "runtime/base/result.h"

namespace thermocline {

struct ProseConstants {
  std::string tools_template;            // TOOLS_TEMPLATE, with {placeholders}
  std::string response_format_template;  // response_format_template, with {schema}
  std::string effort_max;                // REASONING_EFFORT_MAX
  std::string effort_high;               // REASONING_EFFORT_HIGH; empty in preview files, which have none
  std::string dsml_token = "｜DSML｜";
  std::string thinking_start = "<think>", thinking_end = "</think>";
  std::string bos = "<｜begin▁of▁sentence｜>", eos = "<｜end▁of▁sentence｜>";
};

/// Reads `folder`/encoding/encoding_dsv4.py.
/// Errors: not_found when it is absent, corrupt when a constant is missing or no string literal; both name the file.
Result<ProseConstants> read_prose_constants(const std::filesystem::path& folder);

/// Every top-level `NAME = <string literals>` of a Python source, with optional annotation, parentheses, prefixes and
/// implicit concatenation. Anything else is skipped. Errors: corrupt for a literal that does not end.
Result<std::map<std::string, std::string>> python_string_constants(std::string_view source);

/// Fills {name} placeholders, {{ and }} being braces. Errors: corrupt for a placeholder without a value.
Result<std::string> fill_template(std::string_view text, const std::map<std::string, std::string>& values);

}  // namespace thermocline
