// `thermocline launch`: a coding agent with its settings pointed at this server. Nothing of the client is changed on
// disk: variables and arguments of this one process are all.
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "runtime/cli/command.h"
#include "runtime/cli/http_probe.h"
#include "runtime/io/json_document.h"

namespace thermocline::cli {
namespace {

constexpr const char* kKeyVariable = "THERMOCLINE_API_KEY";
constexpr const char* kKeyMark = "@KEY@";  // in values: where the key goes
constexpr std::chrono::seconds kProbeTimeout{3};
constexpr const char* kTimeoutMs = "3000000";  // long prompts on one box take minutes to their first token

struct LaunchOptions {
  std::string client, url = "http://127.0.0.1:8000", key, model = "thermocline";
  bool dry_run = false;
};

/// What a client is started with. Values may hold kKeyMark.
struct Start {
  std::vector<std::pair<std::string, std::string>> set;
  std::vector<std::string> unset, args;
};

Start claude(const ServerUrl& url, const LaunchOptions& o) {
  return {
      .set = {{"ANTHROPIC_BASE_URL", url.base},
              {"ANTHROPIC_AUTH_TOKEN", kKeyMark},
              {"ANTHROPIC_MODEL", o.model},
              {"ANTHROPIC_SMALL_FAST_MODEL", o.model},
              {"ANTHROPIC_DEFAULT_OPUS_MODEL", o.model},
              {"ANTHROPIC_DEFAULT_SONNET_MODEL", o.model},
              {"ANTHROPIC_DEFAULT_HAIKU_MODEL", o.model},
              {"CLAUDE_CODE_ATTRIBUTION_HEADER", "0"},  // it changes with every request, and no prefix would be found
              {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"},
              {"API_TIMEOUT_MS", kTimeoutMs}},
      .unset = {"ANTHROPIC_API_KEY"},  // it would go before the token
      .args = {}};
}

// Values are TOML.
Start codex(const ServerUrl& url, const LaunchOptions& o) {
  Start start{.set = {{kKeyVariable, kKeyMark}}, .unset = {}, .args = {}};
  const auto override_with = [&](const std::string& key, const std::string& value) {
    start.args.insert(start.args.end(), {"-c", key + "=" + value});
  };
  const std::string provider = "model_providers.thermocline.";
  override_with("model_provider", "\"thermocline\"");
  override_with("model", Json(o.model).dump());
  override_with(provider + "name", "\"Thermocline\"");
  override_with(provider + "base_url", "\"" + url.base + "/v1\"");
  override_with(provider + "env_key", fmt::format("\"{}\"", kKeyVariable));
  override_with(provider + "wire_api", "\"responses\"");
  override_with(provider + "stream_idle_timeout_ms", kTimeoutMs);
  return start;
}

Start opencode(const ServerUrl& url, const LaunchOptions& o) {
  const Json models = {{o.model, {{"name", o.model}}}};
  const Json provider = {{"npm", "@ai-sdk/openai-compatible"},
                         {"name", "Thermocline"},
                         {"options", {{"baseURL", url.base + "/v1"}, {"apiKey", kKeyMark}}},
                         {"models", models}};
  const Json config = {{"$schema", "https://opencode.ai/config.json"},
                       {"model", "thermocline/" + o.model},
                       {"provider", {{"thermocline", provider}}}};
  return {.set = {{"OPENCODE_CONFIG_CONTENT", dump_json(config)}}, .unset = {}, .args = {}};
}

std::string replaced(std::string text, const std::string& key) {
  if (const size_t at = text.find(kKeyMark); at != std::string::npos) text.replace(at, std::strlen(kKeyMark), key);
  return text;
}

std::string quoted(const std::string& text) {
  std::string out = "'";
  for (const char c : text) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

// The key is named, never shown.
void print_lines(const LaunchOptions& o, const Start& start, const std::vector<std::string>& args) {
  for (const std::string& name : start.unset) fmt::print("unset {}\n", name);
  for (const auto& [name, value] : start.set)
    fmt::print("export {}={}\n", name, replaced(quoted(value), fmt::format("'\"${{{}:-none}}\"'", kKeyVariable)));
  fmt::print("{}", o.client);
  for (const std::string& arg : start.args) fmt::print(" {}", quoted(arg));
  for (const std::string& arg : args) fmt::print(" {}", quoted(arg));
  fmt::print("\n");
}

bool installed(const std::string& program) {
  const char* const path = std::getenv("PATH");
  for (const std::string& folder : CLI::detail::split(path ? path : "", ':')) {
    const std::filesystem::path file = std::filesystem::path(folder) / program;
    std::error_code ignored;
    if (std::filesystem::is_regular_file(file, ignored) && access(file.c_str(), X_OK) == 0) return true;
  }
  return false;
}

Status become(const LaunchOptions& o, const Start& start, std::vector<std::string> args) {
  for (const std::string& name : start.unset) unsetenv(name.c_str());
  const std::string key = o.key.empty() ? "none" : o.key;  // clients want one
  const std::string json_key = Json(key).dump();           // a key in JSON: without its quotes
  for (const auto& [name, value] : start.set)
    setenv(name.c_str(), replaced(value, value == kKeyMark ? key : json_key.substr(1, json_key.size() - 2)).c_str(), 1);
  args.insert(args.begin(), start.args.begin(), start.args.end());
  args.insert(args.begin(), o.client);
  std::vector<char*> argv;
  for (std::string& arg : args) argv.push_back(arg.data());
  argv.push_back(nullptr);
  execvp(argv[0], argv.data());
  return Error{ErrorCode::io, "starting " + o.client + ": " + std::strerror(errno)};
}

Status launch(const LaunchOptions& o, const std::vector<std::string>& args) {
  TC_ASSIGN(const ServerUrl url, parse_server_url(o.url));
  const Start start = o.client == "claude" ? claude(url, o) : o.client == "codex" ? codex(url, o) : opencode(url, o);
  if (o.dry_run) return print_lines(o, start, args), Status();
  if (!installed(o.client))
    return Error{ErrorCode::not_found,
                 o.client + " is not installed: there is no such program in PATH (--dry-run shows its settings)"};
  if (url.tls)
    fmt::print(stderr, "note: whether a server answers at {} is not asked over TLS\n", url.base);
  else
    TC_RETURN_IF_ERROR(probe_health(url, kProbeTimeout));
  return become(o, start, args);
}

}  // namespace

void add_launch(CLI::App& app, Outcome& outcome) {
  auto o = std::make_shared<LaunchOptions>();
  CLI::App* command =
      app.add_subcommand("launch", "Start a coding agent that uses a server of ours; its own arguments after --");
  command->add_option("client", o->client, "claude, codex or opencode")
      ->required()
      ->check(CLI::IsMember({"claude", "codex", "opencode"}));
  command->add_option("--url", o->url, "Where the server is")->capture_default_str()->type_name("URL");
  command->add_option("--key", o->key, "The server's API key; better by its variable, as others see command lines")
      ->type_name(Settings::kSecret)
      ->envname(kKeyVariable);
  command->add_option("--model", o->model, "Name of the model to ask for; a server answers to any")
      ->capture_default_str();
  command->add_flag("--dry-run", o->dry_run, "Print what would be set, as lines of a shell, and start nothing");
  command->callback([o, &outcome] { outcome.exit_code = exit_code_of(launch(*o, outcome.client_args)); });
}

}  // namespace thermocline::cli
