// The part of TOML that a file of settings needs: comments, [sections], and keys with a word, a string or a list.
#pragma once

#include <istream>
#include <string>
#include <vector>

namespace thermocline::cli {

struct ConfigLine {
  enum class Kind { word, text, list };   // 8000 or true; "in quotes"; ["of", these]
  int number = 0;                         // of its line
  std::vector<std::string> section = {};  // {"bench", "step"}; empty: before any
  std::string key = {};
  Kind kind = Kind::word;
  std::vector<std::string> values = {};  // one, but of a list
  std::string full_name() const;         // "bench.step.repetitions"
};

/// The keys in their order. A bare word is taken as text too, as in `host = localhost`. Errors: CLI::ConfigError with
/// `name` and the line.
std::vector<ConfigLine> read_config(std::istream& in, const std::string& name);

}  // namespace thermocline::cli
