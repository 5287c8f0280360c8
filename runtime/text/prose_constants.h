// The prose constants of a checkpoint's own encoding/encoding_dsv4.py, read as literals: the file is never run.
// Source: spec section 6.2.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

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
/// Errors: not_found when it is absent, corrupt when a constant is missing, no string literal or an empty
/// token; both name the file.
Result<ProseConstants> read_prose_constants(const std::filesystem::path& folder);

/// Every top-level `NAME = <string literals>` of a Python source, with optional annotation, parentheses, prefixes and
/// implicit concatenation. Anything else is skipped. Errors: corrupt for a literal that does not end.
Result<std::map<std::string, std::string>> python_string_constants(std::string_view source);

/// A piece of a template: text of its own, or the name of a {placeholder}.
struct TemplatePart {
  std::string text;
  bool placeholder = false;
};

/// Takes a template apart, {{ and }} being braces. Errors: corrupt for a placeholder that does not end.
Result<std::vector<TemplatePart>> template_parts(std::string_view text);

}  // namespace thermocline
