// Flags as vLLM and llama.cpp spell them: whoever brings a command line from there is understood, or told what to use.
#pragma once

#include <string>
#include <vector>

#include "runtime/cli/settings.h"

namespace thermocline::cli {

/// Once a command has its own options: what it has no option for, and has one of that name already, is left out.
void add_aliases(CLI::App& command, Settings& settings);

/// CLI11 reads -ngl as -n gl: such words of `serve` and `run` as long ones. A flag that may stand bare there gets its
/// value by a =, as it should take no other word.
std::vector<std::string> spell_out(const std::vector<std::string>& args);

}  // namespace thermocline::cli
