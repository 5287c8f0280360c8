#include "runtime/cli/option_values.h"

#include <fmt/format.h>

#include "runtime/cli/docs.h"

namespace thermocline::cli {
namespace {

// "--port" of "--port=1".
std::string name_in(const std::string& word) { return word.substr(0, word.find('=')); }

// That of the command, else of those above it: CLI11 falls through to them.
const CLI::Option* option_named(const CLI::App& command, const std::string& name) {
  if (name.size() < 2 || name[0] != '-') return nullptr;
  for (const CLI::App* app = &command; app; app = app->get_parent())
    if (const CLI::Option* const option = app->get_option_no_throw(name)) return option;
  return nullptr;
}

const CLI::App* inner_command(const CLI::App& command, const std::string& word) {
  const auto found = command.get_subcommands([&](const CLI::App* inner) { return inner->get_name() == word; });
  return found.empty() ? nullptr : found[0];
}

[[noreturn]] void lacks_value(const std::string& name, const std::string& instead) {
  throw CLI::ArgumentMismatch(name + " lacks its value" + instead);
}

}  // namespace

std::vector<std::string> settle_values(const CLI::App*& command, const std::vector<std::string>& words) {
  std::vector<std::string> settled;
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word == "--") {
      settled.insert(settled.end(), words.begin() + static_cast<std::ptrdiff_t>(i), words.end());
      break;
    }
    if (const CLI::App* const inner = inner_command(*command, word)) command = inner;
    const std::string name = name_in(word);
    const CLI::Option* const option = option_named(*command, name);
    const bool empty = option && word == name + "=";
    if (empty && !takes_value(*option)) lacks_value(name, " behind the =");
    settled.push_back(empty ? name : word);
    if (empty) settled.emplace_back();
    if (!option || word != name || !takes_value(*option) || i + 1 == words.size()) continue;
    const std::string& value = words[++i];
    if (value.starts_with("--") && option_named(*command, name_in(value)))
      lacks_value(name,
                  fmt::format(": {} is an option itself; where it is the value, write {}={}", value, name, value));
    settled.push_back(value);
  }
  return settled;
}

}  // namespace thermocline::cli
