// Where the settings of a command come from: flag > environment > configuration file > default (docs/configuration.md).
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "runtime/base/result.h"
#include "runtime/cli/config_file.h"

namespace thermocline::cli {

/// A line of --print-config.
struct SettingRow {
  std::string name, value, source;  // source: "flag", "env NAME", "file PATH" or "default"
};

/// The sources of one command's options besides its command line. An option is a setting as soon as it has a long name
/// and a group: its variable is THERMOCLINE_ and that name, its key in the file the name itself. One whose type name
/// is kSecret is never printed.
class Settings {
 public:
  static constexpr const char* kSecret = "SECRET";

  /// Adds --config and --print-config. They come first, as CLI11 converts options in their order and the sources are
  /// read when it comes to --config.
  static std::shared_ptr<Settings> add_to(CLI::App& command);

  /// How another program spells `ours`, which `command` has: taken, with a line on stderr that names ours.
  void add_alias(const std::string& names, CLI::Option& ours);
  /// Another program's flag that changes nothing here, or that is refused; `text` says why.
  enum class Foreign { noted, refused };
  void add_foreign(const std::string& names, bool flag, Foreign kind, const std::string& text);
  /// The log level that the file says now, for whoever was started without a flag or a variable for it; the default
  /// where the file no longer says one. Errors: invalid_argument, naming the file.
  Result<std::string> read_log_level() const;
  /// Where a user changes an option: "--threads", "THERMOCLINE_THREADS" or "threads in FILE".
  std::string source_of(const std::string& name) const;
  /// Rows of --print-config that are no option of the command: what the model says.
  void also_print(std::function<std::vector<SettingRow>()> rows) { more_rows_ = std::move(rows); }

 private:
  struct Spelling {
    std::string name = {};
    CLI::Option* given = nullptr;
    CLI::Option* ours = nullptr;  // null: a foreign flag
    Foreign kind = Foreign::noted;
    std::string text = {};
  };

  explicit Settings(CLI::App& command) : command_(command) {}
  void add_spelling(const std::string& names, bool flag, Spelling spelling);
  void settle(const std::string& file);
  void take_foreign_spellings();
  void take_environment();
  std::vector<ConfigLine> read_file() const;
  CLI::Option* option_of(const ConfigLine& line) const;
  void take_line(CLI::Option& option, const ConfigLine& line);
  void take(CLI::Option& option, const std::vector<std::string>& values, const std::string& source);
  void print() const;
  std::vector<SettingRow> rows() const;

  CLI::App& command_;
  std::string file_;
  CLI::Option* print_ = nullptr;
  std::vector<Spelling> spellings_;
  struct Taken {
    std::string value, source;
  };
  std::map<const CLI::Option*, Taken> taken_;  // from elsewhere than the command line
  std::function<std::vector<SettingRow>()> more_rows_;
};

/// No option of the program or its commands takes an empty word for a number, and no flag another word than true and
/// false: CLI11 would read 0, which often means something else, and take any number for true.
void refuse_what_is_no_value(CLI::App& program);
/// Whether the command reads settings from elsewhere.
bool has_settings(const CLI::App& command);
/// Options of the program itself that are settings of every command: the log's.
std::vector<const CLI::Option*> program_settings(const CLI::App& command);
/// The variable of an option of such a command; empty for what is no setting.
std::string env_name(const CLI::App& command, const CLI::Option& option);
/// One line for every THERMOCLINE_ variable that is set and is no option's of any command.
std::vector<std::string> stray_variables(const CLI::App& program);
/// "--threads (env THERMOCLINE_THREADS), ..": what this process took from elsewhere; empty: nothing.
const std::string& taken_settings();

}  // namespace thermocline::cli
