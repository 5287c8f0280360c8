// The manual page and the completions of shells, written from the options that CLI11 has: none can be out of date.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace thermocline::cli {

/// A command with its words: {}, {"serve"}, {"bench", "step"}.
struct CommandPath {
  const CLI::App* command;
  std::vector<std::string> words;
  std::string text() const { return CLI::detail::join(words, " "); }
};
/// The program and every command that help shows, each before its own.
std::vector<CommandPath> shown_commands(const CLI::App& program);
/// Those that help shows and that have a name behind dashes.
std::vector<const CLI::Option*> shown_options(const CLI::App& command);
/// ... and the program's own where the command takes them too: what may stand behind its name.
std::vector<const CLI::Option*> options_behind(const CLI::App& command);
bool takes_value(const CLI::Option& option);
/// Names with their dashes, the long ones first.
std::vector<std::string> names_of(const CLI::Option& option);

std::string man_page(const CLI::App& program);
std::string bash_completion(const CLI::App& program);
std::string zsh_completion(const CLI::App& program);
std::string fish_completion(const CLI::App& program);

}  // namespace thermocline::cli
