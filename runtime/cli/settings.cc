#include "runtime/cli/settings.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>

#include "runtime/base/edit_distance.h"
#include "runtime/base/log.h"
#include "runtime/io/json_document.h"

namespace thermocline::cli {
namespace {

constexpr std::string_view kPrefix = "THERMOCLINE_";

std::string g_taken;

bool is_setting(const CLI::Option& option) {
  static const std::vector<std::string> not_ours = {"help", "config", "print-config"};
  return !option.get_lnames().empty() && !option.get_group().empty() &&
         std::find(not_ours.begin(), not_ours.end(), option.get_lnames()[0]) == not_ours.end();
}

bool is_flag(const CLI::Option& option) { return option.get_expected_max() == 0; }
bool is_list(const CLI::Option& option) { return option.get_items_expected_max() > 1; }
const std::string& key_of(const CLI::Option& option) { return option.get_lnames()[0]; }

// Those of the program itself, such as the log level: settings of every command. Their variables are CLI11's to read.
bool is_of_program(const CLI::Option& option) { return !option.get_envname().empty(); }

// Depth first, the program itself first.
void for_each_command(const CLI::App& app, const std::function<void(const CLI::App&)>& visit) {
  visit(app);
  for (const CLI::App* command : app.get_subcommands({})) for_each_command(*command, visit);
}

// {"bench", "step"}: as sections of the file name it.
std::vector<std::string> path_of_command(const CLI::App& command) {
  std::vector<std::string> path;
  for (const CLI::App* app = &command; app->get_parent(); app = app->get_parent())
    path.insert(path.begin(), app->get_name());
  return path;
}

CLI::App& program_of(CLI::App& command) {
  CLI::App* app = &command;
  while (app->get_parent()) app = app->get_parent();
  return *app;
}

std::vector<CLI::Option*> settings_of(CLI::App& command) {
  std::vector<CLI::Option*> options = command.get_options([](CLI::Option* option) { return is_setting(*option); });
  for (CLI::Option* const option : program_of(command).get_options())
    if (is_of_program(*option)) options.push_back(option);
  return options;
}

std::vector<std::string> keys_of(const CLI::App& command) {
  std::vector<std::string> keys;
  for (const CLI::Option* option : command.get_options())
    if (is_setting(*option)) keys.push_back(key_of(*option));
  return keys;
}

std::string did_you_mean(std::string_view word, const std::vector<std::string>& known) {
  const std::string near = nearest(word, known);
  return near.empty() ? "" : "; did you mean " + near + "?";
}

std::vector<ConfigLine> read_lines(const std::string& file) {
  std::ifstream in(file);
  if (!in || in.peek() == std::ifstream::traits_type::eof())
    throw CLI::ConfigError("the configuration file " + file + " cannot be read, or is empty");
  return read_config(in, file);
}

// Of a flag's value: empty, or what is wrong with it. CLI11 takes any number, and words such as enable.
std::string flag_problem(const std::string& text) {
  return text == "true" || text == "false" ? "" : "is on or off: true or false, not '" + text + "'";
}

void check_kind(const CLI::Option& option, const ConfigLine& line) {
  if (line.kind == ConfigLine::Kind::list && !is_list(option)) throw CLI::ConfigError("is one value, not a list");
  if (line.kind == ConfigLine::Kind::text && is_flag(option))
    throw CLI::ConfigError("is true or false, without quotes");
}

// CLI11 does not tell a variable of the program's from a flag.
std::string of_command_line(const CLI::Option& option) {
  const char* const text = is_of_program(option) ? std::getenv(option.get_envname().c_str()) : nullptr;
  return text && text == option.results().back() ? "env " + option.get_envname() : "flag";
}

std::string value_of(const CLI::Option& option) {
  if (option.empty()) return is_flag(option) ? "false" : is_list(option) ? "[]" : option.get_default_str();
  if (option.get_type_name().starts_with(Settings::kSecret)) return "(set)";
  if (is_flag(option)) return option.results().back();
  return is_list(option) ? "[" + CLI::detail::join(option.results(), ",") + "]" : option.results().back();
}

}  // namespace

std::shared_ptr<Settings> Settings::add_to(CLI::App& command) {
  std::shared_ptr<Settings> settings(new Settings(command));
  for (CLI::App* app = &command; app->get_parent(); app = app->get_parent()) app->fallthrough();  // to --log-level
  command
      .add_option_function<std::string>(
          "--config", [settings](const std::string& file) { settings->settle(file); },
          "A TOML file of settings (docs/configuration.md)")
      ->type_name("FILE")
      ->force_callback();
  const std::string print = "Print every setting and where it comes from, and end; =json: as JSON";
  settings->print_ = command.add_flag("--print-config{text}", print);
  settings->print_->check(CLI::IsMember({"text", "json"}))->option_text("[=json]");
  return settings;
}

// A hidden option for each name, so that a hint can say which one was given.
void Settings::add_spelling(const std::string& names, bool flag, Spelling spelling) {
  for (const std::string& name : CLI::detail::split(names, ',')) {
    spelling.given = flag ? command_.add_flag(name) : command_.add_option(name);
    spelling.given->group("")->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
    spelling.name = name;
    spellings_.push_back(spelling);
  }
}

void Settings::add_alias(const std::string& names, CLI::Option& ours) {
  add_spelling(names, is_flag(ours), {.ours = &ours});
}

void Settings::add_foreign(const std::string& names, bool flag, Foreign kind, const std::string& text) {
  add_spelling(names, flag, {.kind = kind, .text = text});
}

void Settings::settle(const std::string& file) {
  if (!command_.parsed()) return;  // CLI11 converts the options of every command
  take_foreign_spellings();
  take_environment();
  file_ = file;
  if (!file.empty())
    for (const ConfigLine& line : read_file())
      if (CLI::Option* const option = option_of(line); option && option->empty()) take_line(*option, line);
  if (!print_->empty() && command_.remaining().empty()) {
    print();
    throw CLI::Success();
  }
}

void Settings::take_foreign_spellings() {
  for (const Spelling& spelling : spellings_) {
    if (spelling.given->empty()) continue;
    const std::string& name = spelling.name;
    if (spelling.ours) {
      for (const std::string& value : spelling.given->results()) spelling.ours->add_result(value);
      fmt::print(stderr, "hint: {} is called {} here\n", name, spelling.ours->get_name());
    } else if (spelling.kind == Foreign::refused) {
      throw CLI::ConfigError(name + " does not exist here: " + spelling.text);
    } else {
      fmt::print(stderr, "hint: {} changes nothing here: {}\n", name, spelling.text);
    }
  }
}

void Settings::take_environment() {
  for (CLI::Option* option : settings_of(command_)) {
    const std::string name = env_name(command_, *option);
    const char* const text = std::getenv(name.c_str());
    if (is_of_program(*option) || !text || !*text || !option->empty()) continue;  // set to nothing is not set
    try {
      take(*option, is_list(*option) ? CLI::detail::split(text, ',') : std::vector<std::string>{text}, "env " + name);
    } catch (const CLI::ParseError& error) {
      throw CLI::ConfigError(name + ": " + error.what());
    }
  }
}

// Its lines, those of sections first.
std::vector<ConfigLine> Settings::read_file() const {
  std::vector<ConfigLine> lines = read_lines(file_);
  std::set<std::string> seen;
  for (const ConfigLine& line : lines)
    if (!seen.insert(line.full_name()).second)
      throw CLI::ConfigError(file_ + ": " + line.full_name() + " is set twice");
  std::stable_partition(lines.begin(), lines.end(), [](const auto& line) { return !line.section.empty(); });
  return lines;
}

// Keys before any section are for every command that has such an option; a section is one command's alone, and wins.
// Null: another command's.
CLI::Option* Settings::option_of(const ConfigLine& line) const {
  std::string key = line.key;
  std::replace(key.begin(), key.end(), '_', '-');
  bool known_section = line.section.empty();
  std::vector<std::string> known;
  const auto add_keys_of = [&](const CLI::App& other) {
    if (!has_settings(other) || (!line.section.empty() && path_of_command(other) != line.section)) return;
    known_section = true;
    for (std::string& name : keys_of(other)) known.push_back(std::move(name));
  };
  add_keys_of(command_);  // first, as of two names that are as near the first is suggested
  for_each_command(program_of(command_), add_keys_of);
  for (const CLI::Option* option : program_settings(command_)) known.push_back(key_of(*option));
  if (!known_section)
    throw CLI::ConfigError(file_ + ": there is no command [" + CLI::detail::join(line.section, ".") + "]");
  if (std::find(known.begin(), known.end(), key) == known.end())
    throw CLI::ConfigError(file_ + ": there is no setting " + line.full_name() + did_you_mean(key, known));
  if (!line.section.empty() && line.section != path_of_command(command_)) return nullptr;
  for (CLI::Option* const option : settings_of(command_))
    if (key_of(*option) == key) return option;
  return nullptr;
}

Result<std::string> Settings::read_log_level() const {
  const CLI::Option& option = *program_of(command_).get_option("--log-level");
  const std::string now = option.empty() ? option.get_default_str() : option.results().back();
  if (file_.empty() || (!option.empty() && !taken_.contains(&option))) return now;
  std::error_code ignored;  // a pipe would be waited for
  if (!std::filesystem::is_regular_file(file_, ignored)) return invalid(file_ + " is no file to be read again");
  try {
    for (const ConfigLine& line : read_file()) {
      if (option_of(line) != &option) continue;
      if (line.values.size() == 1 && std::ranges::find(kLogLevels, line.values[0]) != kLogLevels.end())
        return line.values[0];
      return invalid(file_ + ": log-level should be one of " + CLI::detail::join(kLogLevels, ", "));
    }
  } catch (const CLI::ParseError& error) {
    return invalid(error.what());
  }
  return option.get_default_str();
}

void Settings::take_line(CLI::Option& option, const ConfigLine& line) {
  try {
    check_kind(option, line);
    take(option, line.values, "file " + file_);
  } catch (const CLI::ParseError& error) {
    throw CLI::ConfigError(fmt::format("{}:{}: {}: {}", file_, line.number, key_of(option), error.what()));
  }
}

void Settings::take(CLI::Option& option, const std::vector<std::string>& values, const std::string& source) {
  option.add_result(values);
  taken_[&option] = {value_of(option), source};  // as it was written: 1GiB, not its bytes
  option.run_callback();
  g_taken += fmt::format("{}{} ({})", g_taken.empty() ? "" : ", ", option.get_name(), source);
}

std::string Settings::source_of(const std::string& name) const {
  const CLI::Option* const option = command_.get_option(name);
  const auto taken = taken_.find(option);
  if (taken == taken_.end()) return name;
  const std::string& source = taken->second.source;
  return source.starts_with("env ") ? source.substr(4) : key_of(*option) + " in " + source.substr(5);
}

std::vector<SettingRow> Settings::rows() const {
  std::vector<SettingRow> rows;
  for (CLI::Option* option : settings_of(command_)) {
    const auto taken = taken_.find(option);
    const std::string value = taken == taken_.end() ? value_of(*option) : taken->second.value;
    if (!option->empty()) option->run_callback();  // refuses what is no value
    rows.push_back({key_of(*option), value,
                    taken != taken_.end() ? taken->second.source
                    : option->empty()     ? "default"
                                          : of_command_line(*option)});
  }
  if (!more_rows_) return rows;
  for (SettingRow& row : more_rows_()) rows.push_back(std::move(row));
  return rows;
}

void Settings::print() const {
  print_->run_callback();
  Json json = Json::object();
  size_t width = 0, value_width = 0;
  const std::vector<SettingRow> all = rows();
  for (const SettingRow& row : all) {
    json[row.name] = {{"value", row.value}, {"source", row.source}};
    width = std::max(width, row.name.size());
    value_width = std::max(value_width, std::min<size_t>(row.value.size(), 40));
  }
  if (print_->results().back() == "json") return fmt::print("{}\n", dump_json(json, 2));
  for (const SettingRow& row : all)
    fmt::print("{:<{}}  {:<{}}  {}\n", row.name, width, row.value.empty() ? "-" : row.value, value_width, row.source);
}

void refuse_what_is_no_value(CLI::App& program) {
  for (CLI::Option* const option : program.get_options()) {
    for (const char* type : {"INT", "UINT", "FLOAT"})
      if (option->get_type_name().starts_with(type))
        option->check(CLI::Validator(
            [](const std::string& text) { return text.empty() ? "a number is missing" : std::string(); }, ""));
    if (is_flag(*option) && is_setting(*option)) option->check(CLI::Validator(flag_problem, ""));
  }
  for (CLI::App* const command : program.get_subcommands({})) refuse_what_is_no_value(*command);
}

bool has_settings(const CLI::App& command) { return command.get_option_no_throw("--config") != nullptr; }

std::vector<const CLI::Option*> program_settings(const CLI::App& command) {
  const CLI::App* app = &command;
  while (app->get_parent()) app = app->get_parent();
  return app->get_options([](const CLI::Option* option) { return is_of_program(*option); });
}

std::string env_name(const CLI::App& command, const CLI::Option& option) {
  if (!option.get_envname().empty()) return option.get_envname();
  if (!has_settings(command) || !is_setting(option)) return "";
  std::string name(kPrefix);
  for (const char c : key_of(option)) name += c == '-' ? '_' : static_cast<char>(std::toupper(c));
  return name;
}

std::vector<std::string> stray_variables(const CLI::App& program) {
  std::vector<std::string> known, lines;
  for_each_command(program, [&](const CLI::App& command) {
    for (const CLI::Option* option : command.get_options())
      if (std::string name = env_name(command, *option); !name.empty()) known.push_back(std::move(name));
  });
  for (char** variable = environ; *variable; ++variable) {
    const std::string_view text = *variable;
    const std::string name(text.substr(0, text.find('=')));
    if (!name.starts_with(kPrefix) || std::find(known.begin(), known.end(), name) != known.end()) continue;
    lines.push_back(name + " is set, and no option has this name" + did_you_mean(name, known));
  }
  return lines;
}

const std::string& taken_settings() { return g_taken; }

}  // namespace thermocline::cli
