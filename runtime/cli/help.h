// What --help prints, and what a wrong command line is told.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace thermocline::cli {

/// `--help` of this command shows these options only (long names, without dashes), --help=all every one, --help=GROUP
/// those of a group.
void set_common(CLI::App& command, std::vector<std::string> names);

/// Once all commands are there: their help in our words, with the variable of each option.
void set_up_help(CLI::App& program);

/// "there is no --modle: did you mean --model?": for arguments that no command took, else what CLI11 says.
std::string usage_error(const CLI::App& program, const CLI::Error& error);

}  // namespace thermocline::cli
