#include "runtime/cli/help.h"

#include <fmt/format.h>

#include "runtime/base/edit_distance.h"
#include "runtime/cli/settings.h"

namespace thermocline::cli {
namespace {

bool visible(const CLI::Option& option) { return option.nonpositional() && !option.get_group().empty(); }

constexpr const char* kLogging = "logging";  // the settings of the program itself are shown with it

std::vector<std::string> groups_of(const CLI::App& command) {
  std::vector<std::string> groups;
  for (const std::string& group : command.get_groups())
    if (!group.empty() && !command.get_options([&](const CLI::Option* o) { return o->get_group() == group; }).empty())
      groups.push_back(group);
  if (has_settings(command) && std::find(groups.begin(), groups.end(), kLogging) == groups.end())
    groups.emplace_back(kLogging);
  return groups;
}

// CLI11's own group is nobody's wish.
std::string named(std::vector<std::string> groups) {
  std::erase(groups, "Options");
  return CLI::detail::join(groups, ", ");
}

class HelpFormatter : public CLI::Formatter {
 public:
  explicit HelpFormatter(std::vector<std::string> common) : common_(std::move(common)) { column_width(34); }

  std::string make_help(const CLI::App* app, std::string name, CLI::AppFormatMode mode) const override {
    return make_description(app) + make_usage(app, std::move(name)) + options(*app) + make_subcommands(app, mode) +
           "\n" + make_footer(app);
  }

  // CLI11 writes what a bare flag stands for behind its name: --help{true}.
  std::string make_option_name(const CLI::Option* option, bool positional) const override {
    const std::string name = CLI::Formatter::make_option_name(option, positional);
    return name.substr(0, name.find('{'));
  }

  std::string make_option_opts(const CLI::Option* option) const override {
    std::string out = CLI::Formatter::make_option_opts(option);
    // CLI11 tells the variable of those only that it reads itself.
    if (option->get_envname().empty() && owner_)
      if (const std::string name = env_name(*owner_, *option); !name.empty()) out += " (Env:" + name + ")";
    return out;
  }

  void set_owner(const CLI::App& owner) { owner_ = &owner; }

 private:
  // What --help=WANTED shows: the common ones, all, or a group.
  std::string options(const CLI::App& app) const {
    const CLI::Option* const help = app.get_help_ptr();
    const std::string given = help && !help->empty() ? help->results()[0] : "true";
    const bool few = given == "true" && !common_.empty(), all = given == "true" || given == "all";
    std::string out;
    for (const std::string& group : groups_of(app)) {
      auto shown = app.get_options([&](const CLI::Option* option) {
        return option->get_group() == group && visible(*option) && (!few || is_common(*option));
      });
      if (group == kLogging && has_settings(app) && !few)
        for (const CLI::Option* const option : program_settings(app)) shown.push_back(option);
      if ((all || given == group) && !shown.empty()) out += make_group(group, false, shown);
    }
    if (few) out += "\nMore: --help=all, or of a group: " + named(groups_of(app)) + "\n";
    return out;
  }

  bool is_common(const CLI::Option& option) const {
    return std::any_of(common_.begin(), common_.end(),
                       [&](const std::string& name) { return option.check_lname(name); });
  }

  std::vector<std::string> common_;
  const CLI::App* owner_ = nullptr;
};

// Words of this program, not of a library.
std::string known_group(const CLI::App& command, const std::string& text) {
  if (text == "true" || text == "all") return "";
  const std::vector<std::string> groups = groups_of(command);
  if (std::find(groups.begin(), groups.end(), text) != groups.end()) return "";
  return "there is no group '" + text + "': all, " + named(groups);
}

void set_up(CLI::App& command) {
  auto formatter = std::dynamic_pointer_cast<HelpFormatter>(command.get_formatter());
  if (!formatter || (command.get_parent() && formatter == command.get_parent()->get_formatter())) {
    formatter = std::make_shared<HelpFormatter>(std::vector<std::string>());
    command.formatter(formatter);
  }
  formatter->set_owner(command);
  if (CLI::Option* const help = command.get_option_no_throw("--help"))
    help->check(CLI::Validator([&command](std::string& text) { return known_group(command, text); }, ""));
  for (CLI::App* inner : command.get_subcommands({})) set_up(*inner);
}

const CLI::App& last_parsed(const CLI::App& program) {
  const CLI::App* app = &program;
  while (!app->get_subcommands().empty()) app = app->get_subcommands().back();
  return *app;
}

std::string unknown_flag(const CLI::App& command, const std::string& word) {
  const std::string flag = word.substr(0, word.find('='));
  std::vector<std::string> known;
  const auto know = [&](const CLI::Option* option) {
    for (const std::string& name : option->get_lnames()) known.push_back("--" + name);
  };
  for (const CLI::Option* option : command.get_options())
    if (visible(*option)) know(option);
  for (const CLI::Option* option : program_settings(command)) know(option);
  const std::string near = flag.starts_with("--") ? nearest(flag, known) : "";
  return near.empty() ? fmt::format("there is no {}", flag)
                      : fmt::format("there is no {}: did you mean {}?", flag, near);
}

std::string unknown_word(const CLI::App& command, const std::string& word) {
  std::vector<std::string> known;
  for (const CLI::App* inner : command.get_subcommands({}))
    if (!inner->get_group().empty()) known.push_back(inner->get_name());
  if (known.empty()) return fmt::format("'{}' belongs to no option", word);
  const std::string near = nearest(word, known);
  return near.empty() ? fmt::format("there is no command '{}'", word)
                      : fmt::format("there is no command '{}': did you mean {}?", word, near);
}

std::string what_is_wrong(const CLI::App& program, const CLI::Error& error) {
  const CLI::App& command = last_parsed(program);
  const std::vector<std::string> extras = program.remaining(true);
  const auto is = [&](CLI::ExitCodes code) { return error.get_exit_code() == static_cast<int>(code); };
  const bool missing = is(CLI::ExitCodes::RequiredError) || is(CLI::ExitCodes::ExtrasError);
  if (!missing || extras.empty()) return error.what();
  return extras[0].starts_with("-") ? unknown_flag(command, extras[0]) : unknown_word(command, extras[0]);
}

}  // namespace

void set_common(CLI::App& command, std::vector<std::string> names) {
  command.formatter(std::make_shared<HelpFormatter>(std::move(names)));
}

void set_up_help(CLI::App& program) { set_up(program); }

std::string usage_error(const CLI::App& program, const CLI::Error& error) {
  std::string path;
  for (const CLI::App* app = &last_parsed(program); app->get_parent(); app = app->get_parent())
    path = " " + app->get_name() + path;
  return fmt::format("error: {}\n`thermocline{} --help` says more.\n", what_is_wrong(program, error), path);
}

}  // namespace thermocline::cli
