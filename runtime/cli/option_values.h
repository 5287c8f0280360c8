// Which word of a command line is whose value, where CLI11 would take the next option for it.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace thermocline::cli {

/// The words with an empty value of `--name=` as a word of its own, as CLI11 drops it and takes the next one instead.
/// `command` is the program at first, and then the command that the words name, also where this throws. Errors:
/// CLI::ArgumentMismatch for a flag with an empty value, and for an option whose value would be the next option:
/// `--name=--x` says that this is meant.
std::vector<std::string> settle_values(const CLI::App*& command, const std::vector<std::string>& words);

}  // namespace thermocline::cli
