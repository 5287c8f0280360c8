// thermocline(1), in the man macros of roff.
#include <fmt/format.h>

#include "runtime/cli/docs.h"
#include "runtime/cli/settings.h"

namespace thermocline::cli {
namespace {

// A backslash, a minus as it is typed, and no line that begins like a request.
std::string roff(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '\\')
      out += "\\e";
    else if (c == '-')
      out += "\\-";
    else if (c == '\n')
      out += ' ';
    else
      out += c;
  }
  return out.starts_with('.') || out.starts_with('\'') ? "\\&" + out : out;
}

std::string bold(const std::string& text) { return "\\fB" + roff(text) + "\\fR"; }

std::string about_value(const CLI::App& command, const CLI::Option& option) {
  std::string out;
  if (takes_value(option) && !option.get_default_str().empty()) out += "Default: " + option.get_default_str() + ". ";
  if (const std::string variable = env_name(command, option); !variable.empty())
    out += "Environment: " + variable + ".";
  return out;
}

std::string entry(const CLI::App& command, const CLI::Option& option) {
  std::string names;
  for (const std::string& name : names_of(option)) names += (names.empty() ? "" : ", ") + bold(name);
  if (takes_value(option)) names += " \\fI" + roff(option.get_type_name()) + "\\fR";
  const std::string about = about_value(command, option);
  return ".TP\n" + names + "\n" + roff(option.get_description()) + ".\n" + (about.empty() ? "" : roff(about) + "\n");
}

std::string usage_line(const CommandPath& path) {
  std::string line = bold("thermocline" + std::string(path.words.empty() ? "" : " ") + path.text()) + " [options]";
  for (const CLI::Option* option : path.command->get_options([](const CLI::Option* o) { return o->get_positional(); }))
    line += " \\fI" + roff(option->get_name(true)) + "\\fR";
  return line + "\n";
}

std::string section(const CommandPath& path) {
  std::string out = ".SS \"" + roff(path.words.empty() ? "Options of every command" : path.text()) + "\"\n";
  if (!path.words.empty()) out += usage_line(path) + ".PP\n" + roff(path.command->get_description()) + ".\n";
  for (const CLI::Option* option : shown_options(*path.command))
    if (option != path.command->get_help_ptr() || path.words.empty()) out += entry(*path.command, *option);
  return out;
}

constexpr const char* kEnd = R"(.SH CONFIGURATION
Options of commands that load a model may also be set by the variable that is named with them, and by a TOML file given
with \fB\-\-config\fR: a flag goes before the environment, the environment before the file, the file before the default.
\fBthermocline serve \-\-print\-config\fR says where each value comes from.
.SH EXIT STATUS
.TP
0
Done.
.TP
1
Failed for another reason than those below.
.TP
2
Wrong usage: a flag, a setting or a prompt.
.TP
3
No such model, or a broken one.
.TP
4
It does not fit into memory.
.TP
5
No such device, or one that cannot be used.
.TP
6
The address cannot be listened on.
.TP
130
Interrupted.
.SH EXAMPLES
.nf
thermocline run models/demo \-\-prompt "What is the capital of Norway?"
thermocline serve /models/DeepSeek\-V4\-Flash \-\-max\-num\-seqs 4
THERMOCLINE_PORT=8080 thermocline serve \-\-config box.toml
.fi
)";

}  // namespace

std::string man_page(const CLI::App& program) {
  std::string out = ".TH THERMOCLINE 1 \"\" \"thermocline " TC_VERSION "\" \"User Commands\"\n.SH NAME\n";
  out += "thermocline \\- " + roff(program.get_description()) + "\n.SH SYNOPSIS\n.nf\n";
  const std::vector<CommandPath> commands = shown_commands(program);
  for (const CommandPath& path : commands)
    if (!path.words.empty() && path.command->get_subcommands({}).empty()) out += usage_line(path);
  out += ".fi\n.SH DESCRIPTION\n" + roff(program.get_description()) + "\n.SH COMMANDS\n";
  for (const CommandPath& path : commands) out += section(path);
  return out + kEnd;
}

}  // namespace thermocline::cli
