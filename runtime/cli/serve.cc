// `thermocline serve`: the model behind an OpenAI-compatible HTTP API.
#include <fmt/format.h>

#include <cstdio>

#include "runtime/base/log.h"
#include "runtime/cli/command.h"
#include "runtime/engine/machine_info.h"
#include "runtime/server/chat_api.h"
#include "runtime/server/http_server.h"

namespace thermocline::cli {
namespace {

struct ServeOptions {
  ModelOptions model;
  server::HttpOptions http;
  std::string served_name;
  bool think = false, quiet = false;
};

std::string default_name(const std::filesystem::path& model) {
  const std::filesystem::path folder = std::filesystem::weakly_canonical(model);
  return folder.filename().string();
}

Status serve(const ServeOptions& o) {
  TC_ASSIGN(EngineOptions options, o.model.engine_options());
  options.quiet = o.quiet;
  TC_ASSIGN(const std::unique_ptr<Tokenizer> tokenizer, Tokenizer::load(o.model.model()));
  TC_ASSIGN(const SamplingParams defaults, server::read_sampling_defaults(o.model.model()));
  Result<ProseConstants> constants = read_prose_constants(o.model.model());
  if (!constants) spdlog::warn("chat completions are off: {}", constants.error().message);
  TC_ASSIGN(const std::unique_ptr<Engine> engine, Engine::open(options));
  const std::string name = o.served_name.empty() ? default_name(o.model.model()) : o.served_name;
  server::ChatApi api(*engine, *tokenizer, std::move(constants), defaults, {name, o.think});
  return server::serve_http(
      o.http, [&](const server::HttpRequest& request) { return api.handle(request); },
      [&](uint16_t port) {
        const std::string url = fmt::format(
            "http://{}:{}", o.http.host.find(':') == std::string::npos ? o.http.host : "[" + o.http.host + "]", port);
        fmt::print(
            "serving {} on {}\n  context {} tokens; {}\n  curl {}/v1/chat/completions -H 'content-type: "
            "application/json' -d '{{\"messages\":[{{\"role\":\"user\",\"content\":\"Hello\"}}]}}'\n",
            name, url, engine->max_context(), machine_line(machine_of(*engine)), url);
        std::fflush(stdout);
      },
      [&] { api.stop(); });
}

}  // namespace

void add_serve(CLI::App& app, Outcome& outcome) {
  auto o = std::make_shared<ServeOptions>();
  CLI::App* command = app.add_subcommand("serve", "Serve the model over an OpenAI-compatible HTTP API");
  o->model.add_to(*command);
  command->add_option("--host", o->http.host, "Address to listen on")->capture_default_str();
  command->add_option("--port", o->http.port, "Port to listen on; 0: any free one")->capture_default_str();
  command->add_option("--max-body", o->http.max_body_bytes, "Largest request body in bytes")->capture_default_str();
  command->add_option("--served-model-name", o->served_name, "Name in /v1/models; the folder's by default");
  command->add_flag("--think", o->think, "Chats think unless the request says otherwise");
  command->add_flag("--quiet,-q", o->quiet, "No progress while loading");
  command->callback([o, &outcome] { outcome.exit_code = exit_code_of(serve(*o)); });
}

}  // namespace thermocline::cli
