// Flags as vLLM and llama.cpp spell them: whoever brings a command line from there is understood, or told what to use.
#pragma once

#include <string>
#include <vector>

#include "runtime/cli/settings.h"

namespace thermocline::cli {

/// Once a command has its own options: what it has no option for, and has one of that name already, is left out.
void add_aliases(CLI::App& command, Settings& settings);

/// CLI11 reads -ngl as -n gl: such words of `serve` and `run` as long ones.
std::vector<std::string> spell_out(std::vector<std::string> args);

}  // namespace thermocline::cli
