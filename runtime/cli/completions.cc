// Completions for bash, zsh and fish. Each finds the command among the words, then offers its options and commands;
// what an option takes is completed as a file.
#include <fmt/format.h>

#include "runtime/cli/docs.h"

namespace thermocline::cli {
namespace {

std::vector<std::string> commands_in(const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::App* inner : command.get_subcommands({}))
    if (!inner->get_group().empty()) names.push_back(inner->get_name());
  return names;
}

// Up to the first stop: one line of a menu.
std::string short_text(const std::string& text) { return text.substr(0, text.find_first_of(";\n")); }

// In single quotes; `escaped`: characters that get a backslash.
std::string in_quotes(const std::string& text, const std::string& escaped = "") {
  std::string out = "'";
  for (const char c : text) {
    if (escaped.find(c) != std::string::npos) out += '\\';
    out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  }
  return out + "'";
}

// "serve|run|bench step": a pattern of a case for all commands.
std::string all_paths(const CLI::App& program) {
  std::string out;
  for (const CommandPath& path : shown_commands(program))
    if (!path.words.empty()) out += (out.empty() ? "" : "|") + ("\"" + path.text() + "\"");
  return out;
}

std::string joined_names(const CLI::App& command, bool with_values_only) {
  std::string out;
  for (const CLI::Option* option : options_behind(command))
    if (!with_values_only || takes_value(*option))
      for (const std::string& name : names_of(*option)) out += (out.empty() ? "" : " ") + name;
  return out;
}

}  // namespace

std::string bash_completion(const CLI::App& program) {
  std::string cases;
  for (const CommandPath& path : shown_commands(program))
    cases += fmt::format("    \"{}\") commands=\"{}\" options=\"{}\" valued=\"{}\" ;;\n", path.text(),
                         CLI::detail::join(commands_in(*path.command), " "), joined_names(*path.command, false),
                         joined_names(*path.command, true));
  return fmt::format(R"(# bash completion of thermocline; written by the program itself.
_thermocline() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} path="" word commands options valued i
  for ((i = 1; i < COMP_CWORD; i++)); do
    word="${{path:+$path }}${{COMP_WORDS[i]}}"
    case "$word" in
      {}) path="$word" ;;
    esac
  done
  case "$path" in
{}  esac
  COMPREPLY=()
  [[ " $valued " == *" $prev "* ]] && return
  [[ $cur == -* ]] && COMPREPLY=($(compgen -W "$options" -- "$cur")) && return
  COMPREPLY=($(compgen -W "$commands" -- "$cur"))
}}
complete -o default -F _thermocline thermocline
)",
                     all_paths(program), cases);
}

std::string zsh_completion(const CLI::App& program) {
  std::string cases;
  for (const CommandPath& path : shown_commands(program)) {
    cases += fmt::format("    {})\n", in_quotes(path.text()));
    for (const CLI::App* inner : path.command->get_subcommands({}))
      if (!inner->get_group().empty())
        cases += fmt::format("      commands+=({})\n",
                             in_quotes(inner->get_name() + ":" + short_text(inner->get_description())));
    for (const CLI::Option* option : options_behind(*path.command))
      for (const std::string& name : names_of(*option))
        cases += fmt::format("      options+=({})\n", in_quotes(name + ":" + short_text(option->get_description())));
    cases += fmt::format("      valued=({}) ;;\n", joined_names(*path.command, true));
  }
  return fmt::format(R"(#compdef thermocline
# zsh completion of thermocline; written by the program itself.
_thermocline() {{
  local command='' word i
  local -a commands options valued
  for ((i = 2; i < CURRENT; i++)); do
    word="${{command:+$command }}${{words[i]}}"
    case "$word" in
      {}) command="$word" ;;
    esac
  done
  case "$command" in
{}  esac
  if (( ${{valued[(Ie)${{words[CURRENT-1]}}]}} )); then
    _files
  elif [[ ${{words[CURRENT]}} == -* ]]; then
    _describe -o option options
  elif (( $#commands )); then
    _describe command commands
  else
    _files
  fi
}}
_thermocline "$@"
)",
                     all_paths(program), cases);
}

std::string fish_completion(const CLI::App& program) {
  std::string out = "# fish completion of thermocline; written by the program itself.\n";
  for (const CommandPath& path : shown_commands(program)) {
    std::string seen;
    for (const std::string& word : path.words)
      seen += (seen.empty() ? "" : "; and ") + ("__fish_seen_subcommand_from " + word);
    const std::vector<std::string> inner_names = commands_in(*path.command);
    const std::string none_yet = (seen.empty() ? "" : seen + "; and ") + "not __fish_seen_subcommand_from " +
                                 CLI::detail::join(inner_names, " ");
    for (const CLI::App* inner : path.command->get_subcommands({}))
      if (!inner->get_group().empty())
        out += fmt::format("complete -c thermocline -f -n {} -a {} -d {}\n", in_quotes(none_yet), inner->get_name(),
                           in_quotes(short_text(inner->get_description()), "\\"));
    for (const CLI::Option* option : options_behind(*path.command)) {
      out += "complete -c thermocline";
      if (!inner_names.empty())
        out += " -n " + in_quotes(none_yet);
      else
        out += " -n " + in_quotes(seen);
      for (const std::string& name : option->get_lnames()) out += " -l " + name;
      for (const std::string& name : option->get_snames()) out += " -s " + name;
      out += (takes_value(*option) ? " -r" : "") + (" -d " + in_quotes(short_text(option->get_description()), "\\")) +
             "\n";
    }
  }
  return out;
}

}  // namespace thermocline::cli
