// `thermocline docs`, hidden: the build calls it once the program is linked.
#include "runtime/cli/docs.h"

#include <fmt/format.h>

#include <fstream>

#include "runtime/cli/command.h"
#include "runtime/cli/settings.h"

namespace thermocline::cli {
namespace {

struct Document {
  const char *kind, *file;
  std::string (*write)(const CLI::App&);
};
constexpr Document kDocuments[] = {{"man", "thermocline.1", man_page},
                                   {"bash", "thermocline.bash", bash_completion},
                                   {"zsh", "_thermocline", zsh_completion},
                                   {"fish", "thermocline.fish", fish_completion}};

Status write_documents(const CLI::App& program, const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  for (const Document& document : kDocuments) {
    std::ofstream out(folder / document.file);
    if (!(out << document.write(program) << std::flush))
      return Error{ErrorCode::io, "writing " + (folder / document.file).string() + " failed"};
  }
  return {};
}

void collect(const CLI::App& command, const std::vector<std::string>& words, std::vector<CommandPath>& found) {
  found.push_back({&command, words});
  for (const CLI::App* inner : command.get_subcommands({})) {
    if (inner->get_group().empty()) continue;
    std::vector<std::string> path = words;
    path.push_back(inner->get_name());
    collect(*inner, path, found);
  }
}

}  // namespace

std::vector<CommandPath> shown_commands(const CLI::App& program) {
  std::vector<CommandPath> found;
  collect(program, {}, found);
  return found;
}

std::vector<const CLI::Option*> shown_options(const CLI::App& command) {
  return command.get_options([](const CLI::Option* o) { return o->nonpositional() && !o->get_group().empty(); });
}

std::vector<const CLI::Option*> options_behind(const CLI::App& command) {
  std::vector<const CLI::Option*> options = shown_options(command);
  if (has_settings(command))
    for (const CLI::Option* const option : program_settings(command)) options.push_back(option);
  return options;
}

bool takes_value(const CLI::Option& option) { return option.get_expected_max() > 0; }

std::vector<std::string> names_of(const CLI::Option& option) {
  std::vector<std::string> names;
  for (const std::string& name : option.get_lnames()) names.push_back("--" + name);
  for (const std::string& name : option.get_snames()) names.push_back("-" + name);
  return names;
}

void add_docs(CLI::App& app, Outcome& outcome) {
  struct Flags {
    std::string kind, folder;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app.add_subcommand("docs", "The manual page and completions of shells")->group("");
  command->add_option("kind", flags->kind, "man, bash, zsh or fish: to standard output")
      ->check(CLI::IsMember({"man", "bash", "zsh", "fish"}));
  command->add_option("--out", flags->folder, "All of them, into this folder");
  command->callback([flags, &app, &outcome] {
    for (const Document& document : kDocuments)
      if (flags->kind == document.kind) fmt::print("{}", document.write(app));
    if (!flags->folder.empty()) outcome.exit_code = exit_code_of(write_documents(app, flags->folder));
  });
}

}  // namespace thermocline::cli
