// thermocline: DeepSeek-V4-class mixture-of-experts models on one box.
#include <fmt/format.h>

#include "runtime/base/log.h"
#include "runtime/cli/aliases.h"
#include "runtime/cli/command.h"
#include "runtime/cli/help.h"
#include "runtime/cli/option_values.h"
#include "runtime/cli/settings.h"

namespace {

// CLI11 would look for options of ours there, and takes brackets apart.
std::vector<std::string> cut_behind_dashes(std::vector<std::string>& args) {
  const auto dashes = std::find(args.begin(), args.end(), "--");
  if (dashes == args.end()) return {};
  std::vector<std::string> behind(dashes + 1, args.end());
  args.erase(dashes, args.end());
  return behind;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace thermocline;
  CLI::App app{"Serves DeepSeek-V4-class mixture-of-experts models on one box.", "thermocline"};
  app.set_version_flag("--version", TC_VERSION);
  app.require_subcommand(1);
  app.footer(
      "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no such model or a broken one, 4 does not fit into memory,\n"
      "5 no such device, 6 the address cannot be listened on, 130 interrupted.");
  app.failure_message(
      [](const CLI::App* program, const CLI::Error& error) { return cli::usage_error(*program, error); });
  std::string log_level = "info";
  app.add_option("--log-level", log_level, "error, warn, info or debug")
      ->check(CLI::IsMember(kLogLevels))
      ->capture_default_str()
      ->envname("THERMOCLINE_LOG_LEVEL");
  std::string log_format = "text";
  app.add_option("--log-format", log_format, "text, or json: an object a line")
      ->check(CLI::IsMember({"text", "json"}))
      ->capture_default_str()
      ->envname("THERMOCLINE_LOG_FORMAT");
  cli::Outcome outcome;
  app.parse_complete_callback([&] { init_log(log_level, log_format == "json" ? LogFormat::json : LogFormat::text); });
  cli::add_run(app, outcome);
  cli::add_serve(app, outcome);
  cli::add_bench(app, outcome);
  cli::add_plan(app, outcome);
  cli::add_sim(app, outcome);
  cli::add_trace(app, outcome);
  cli::add_synth(app, outcome);
  cli::add_logits(app, outcome);
  cli::add_perplexity(app, outcome);
  cli::add_selfcheck(app, outcome);
  cli::add_calibrate(app, outcome);
  cli::add_doctor(app, outcome);
  cli::add_chat_tools(app, outcome);
  cli::add_launch(app, outcome);
  cli::add_version(app, outcome);
  cli::add_docs(app, outcome);
  cli::refuse_what_is_no_value(app);
  cli::set_up_help(app);
  for (const std::string& line : cli::stray_variables(app)) fmt::print(stderr, "warning: {}\n", line);
  std::vector<std::string> args = cli::spell_out({argv + 1, argv + argc});
  if (!args.empty() && args[0] == "launch") outcome.client_args = cut_behind_dashes(args);
  const CLI::App* command = &app;
  try {
    args = cli::settle_values(command, args);
  } catch (const CLI::ParseError& error) {
    command->exit(error);
    return cli::kUsage;
  }
  std::reverse(args.begin(), args.end());  // as CLI11 wants them
  try {
    app.parse(std::move(args));
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : cli::kUsage;
  } catch (const std::bad_alloc&) {
    return cli::exit_code_of(Error{ErrorCode::out_of_memory, "the memory this would need is not there"});
  } catch (const std::exception& error) {  // of a library: a file system, a lack of threads
    return cli::exit_code_of(Error{ErrorCode::internal, error.what()});
  }
  return outcome.exit_code;
}
