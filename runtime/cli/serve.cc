// `thermocline serve`: the model behind an OpenAI-compatible HTTP API.
#include <fmt/format.h>

#include <cstdio>
#include <thread>

#include "runtime/base/log.h"
#include "runtime/cli/aliases.h"
#include "runtime/cli/box.h"
#include "runtime/cli/command.h"
#include "runtime/cli/help.h"
#include "runtime/cli/model_folder.h"
#include "runtime/cli/plan_text.h"
#include "runtime/cli/prediction.h"
#include "runtime/engine/machine_info.h"
#include "runtime/server/api/api.h"
#include "runtime/server/http/guard.h"
#include "runtime/server/http/listener.h"
#include "runtime/server/systemd.h"
#include "runtime/server/wire/request_fields.h"

namespace thermocline::cli {
namespace {

struct ServeOptions {
  ModelOptions model;
  server::HttpOptions http;
  server::Api::Options api;
  LoopOptions loop;
  int64_t max_num_seqs = 16, max_num_batched_tokens = 512;
  uint64_t kv_host_memory = 0, kv_gpu_memory = 0;
  int64_t prefix_cache_memory = 0;
  bool no_prefix_cache = false;
  std::string kv_disk_dir;
  uint64_t kv_disk_space = uint64_t{16} << 30;
  int64_t step_budget_ms = 250, watchdog_seconds = 300, drain_seconds = 30;
  std::vector<std::string> served_names;  // the first is the name
  bool strict_model_name = false, strict_fields = false, no_generation_config = false;
  std::string reasoning_field = "reasoning_content";
  int64_t reasoning_budget = -1, request_timeout = 0, queue_timeout = 0;
  std::string access_log;
  server::ApiKeys::Options keys;
  bool think = false, quiet = false, insecure_no_auth = false;
};

std::string default_name(const std::filesystem::path& model) {
  const std::filesystem::path folder = std::filesystem::weakly_canonical(model);
  return folder.filename().string();
}

// What requests get that do not say: of the model, behind every other source.
std::vector<SettingRow> sampling_rows(const std::string& model, bool plainly) {
  const Result<SamplingParams> sampling = plainly ? SamplingParams() : server::read_sampling_defaults(model);
  if (model.empty() || !sampling) return {};
  const SamplingParams plain;
  const auto row = [](const char* name, auto value, auto otherwise) {
    return SettingRow{name, fmt::format("{}", value),
                      value == otherwise ? "default" : "the model's generation_config.json"};
  };
  return {row("temperature", sampling->temperature, plain.temperature), row("top-p", sampling->top_p, plain.top_p),
          row("top-k", sampling->top_k, plain.top_k)};
}

/// The server while it loads, serves and ends. The network thread answers from the first moment; a signal ends a load,
/// a drain and then everything (Listener).
class Service {
 public:
  Service(const ServeOptions& o, server::Listener& listener, server::AccessLog& log)
      : o_(o), listener_(listener), api_(o.api, log) {}

  Status run() {
    TC_RETURN_IF_ERROR(api_.keys().load(o_.keys));
    TC_ASSIGN(const std::string address, server::listen_address(o_.http.host));
    if (!server::is_local_address(address) && !api_.keys().required() && !o_.insecure_no_auth)
      return invalid(fmt::format(
          "on {} anybody who reaches this machine could use the model: give clients keys (--api-key-file, or "
          "THERMOCLINE_API_KEY), listen on 127.0.0.1, or say --insecure-no-auth",
          o_.http.host));
    if (const auto period = systemd_.alive_period())
      listener_.every(*period, [this] {
        if (alive()) systemd_.alive();
      });
    std::thread network([this] {
      listener_.run(
          api_, [this](server::Clock::time_point deadline) { drain(deadline); }, [this] { reload(); });
    });
    Status status = load();
    if (!status.ok()) listener_.stop();
    network.join();
    if (engine_) log_measured();
    return stopping_ ? Status() : status;  // whoever ends a load gets no error
  }

 private:
  Status load() {
    TC_ASSIGN(EngineOptions options, o_.model.engine_options());
    options.quiet = o_.quiet;
    options.max_sequences = static_cast<int>(o_.max_num_seqs);
    options.max_chunk = o_.max_num_batched_tokens;
    options.max_logit_rows = std::min<int64_t>(o_.max_num_batched_tokens, 64);  // of prompts that are scored
    options.kv_below_context = true;
    options.kv_host_bytes = o_.kv_host_memory;
    options.kv_gpu_bytes = o_.kv_gpu_memory;
    options.prefix_cache_bytes = o_.no_prefix_cache ? 0 : o_.prefix_cache_memory > 0 ? o_.prefix_cache_memory : -1;
    options.kv_disk = {.folder = o_.kv_disk_dir, .space_bytes = o_.kv_disk_space};
    options.calibrated = true;
    options.cancel = &stopping_;
    options.progress = [this](double share) {
      api_.loading(share);
      systemd_.loading(share);
    };
    systemd_.loading(0);
    TC_RETURN_IF_ERROR(o_.model.check_architecture());
    TC_ASSIGN(tokenizer_, load_tokenizer(o_.model.model()));
    SamplingParams defaults;
    if (!o_.no_generation_config) {
      TC_ASSIGN(defaults, of_model(server::read_sampling_defaults(o_.model.model())));
    }
    Result<ProseConstants> constants = read_prose_constants(o_.model.model());
    if (!constants) log_warn("chat completions are off: {}", constants.error().message);
    const std::string plan = plan_of(options);  // before the model has taken its memory
    TC_ASSIGN(engine_, of_model(Engine::open(options)));
    TC_RETURN_IF_ERROR(engine_->start(*tokenizer_, o_.loop));
    backend_ = std::make_unique<server::EngineBackend>(*engine_);
    TC_ASSIGN(const server::ModelFacts facts, facts_of(*engine_, *tokenizer_));
    model_ = std::make_unique<server::ServedModel>(
        server::ServedModel{.backend = backend_.get(),
                            .vocab_size = engine_->geometry().vocab_size,
                            .max_context = engine_->max_context(),
                            .bos_token_id = engine_->geometry().bos_token_id,
                            .tokenizer = *tokenizer_,
                            .constants = std::move(constants),
                            .defaults = defaults,
                            .name = o_.api.names[0],
                            .aliases = aliases(),
                            .think = o_.think,
                            .strict_name = o_.strict_model_name,
                            .strict_fields = o_.strict_fields,
                            .reasoning_twice = o_.reasoning_field == "both",
                            .reasoning_budget = o_.reasoning_budget,
                            .request_timeout = std::chrono::seconds(o_.request_timeout),
                            .created = std::time(nullptr),
                            .max_sequences = engine_->options().max_sequences,
                            .facts = facts,
                            .plan = plan});
    api_.serve(*model_);
    {
      const std::lock_guard lock(mutex_);
      started_ = engine_.get();
      if (deadline_) started_->drain(*deadline_);
    }
    if (stopping_) return {};
    tell_ready();
    print_ready();
    return {};
  }

  static Result<server::ModelFacts> facts_of(const Engine& engine, const Tokenizer& tokenizer) {
    const ModelGeometry& g = engine.geometry();
    TC_ASSIGN(server::ModelFacts facts,
              server::read_model_facts(engine.options().model, tokenizer, g.bos_token_id, g.eos_token_id));
    facts.trained_context = g.max_position_embeddings;
    return facts;
  }

  std::vector<std::string> aliases() const { return {o_.api.names.begin() + 1, o_.api.names.end()}; }

  void drain(server::Clock::time_point deadline) {
    stopping_ = true;
    api_.drain();
    systemd_.stopping(o_.http.drain);
    const std::lock_guard lock(mutex_);
    deadline_ = deadline;
    if (started_) started_->drain(deadline);
  }

  // At SIGHUP. A file that is broken changes nothing.
  void reload() {
    const bool serving = started() && !stopping_;
    if (serving) systemd_.reloading();
    read_keys_again();
    read_log_level_again();
    if (serving) tell_ready();
  }
  void read_keys_again() {
    if (Status status = api_.keys().reload(); !status.ok())
      log_error("the keys stay as they were: {}", status.error().message);
    else
      log_info("keys are read again");
  }

  void read_log_level_again() {
    const Result<std::string> level = o_.model.settings().read_log_level();
    if (!level) return log_error("the log level stays as it was: {}", level.error().message);
    set_log_level(*level);
    log_info("log level {}", *level);
  }

  // What the planner says of this model on this box; nothing where it cannot.
  std::string plan_of(const EngineOptions& options) const {
    Result<PlanReport> plan = make_plan(
        {o_.model.model(), options.max_context, static_cast<int>(std::min<int64_t>(o_.max_num_seqs, 4096)), {}});
    if (plan) return dump_json(plan_json(*plan));
    log_debug("no plan: {}", plan.error().message);
    return "";
  }

  void tell_ready() { systemd_.ready(fmt::format("serving {} on {}", model_->name, listener_.url())); }

  bool started() {
    const std::lock_guard lock(mutex_);
    return started_ != nullptr;
  }

  // Whoever loads or drains is alive too.
  bool alive() {
    const std::lock_guard lock(mutex_);
    return !started_ || started_->health().state != EngineHealth::State::failed;
  }

  void print_ready() const {
    std::string url = listener_.url();
    const std::string key = api_.keys().required() ? " -H \"authorization: Bearer $KEY\"" : "";
    if (url.starts_with("unix:")) url = "--unix-socket " + url.substr(5) + " http://localhost";
    fmt::print(
        "serving {} on {}\n  context {} tokens, {} sequences at once, {} tokens of KV; {}\n  {}\n  curl "
        "{}/v1/chat/completions{} -H 'content-type: "
        "application/json' -d '{{\"messages\":[{{\"role\":\"user\",\"content\":\"Hello\"}}]}}'\n",
        model_->name, listener_.url(), engine_->max_context(), engine_->options().max_sequences,
        engine_->stats().kv_tokens_total, machine_line(machine_of(*engine_)),
        api_.keys().required() ? "API keys are asked for" : "no API keys: everybody who reaches it may ask", url, key);
    std::fflush(stdout);
    if (const auto& box = engine_->options().machine; engine_->predictable())
      log_info("one sequence alone, 1024 tokens of context: {}",
               prediction_line(predict(*engine_, *box, 512, 1, 1024)));
  }

  void log_measured() const {
    const EngineStats stats = engine_->stats();
    if (const std::string line = expert_line(stats.experts); !line.empty()) log_info("{}", line);
    if (stats.forecast.steps == 0) return;
    log_info("{} prompt and {} answer tokens took {:.3f} s of steps", stats.prompt_tokens, stats.answer_tokens,
             stats.step_seconds);
    log_info("{}", forecast_line(stats.forecast));
  }

  const ServeOptions& o_;
  server::Listener& listener_;
  server::Systemd systemd_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<server::EngineBackend> backend_;
  std::unique_ptr<server::ServedModel> model_;
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  Engine* started_ = nullptr;
  std::optional<server::Clock::time_point> deadline_;
  mutable server::Api api_;  // goes first: it waits for what is being prepared
};

Status serve(ServeOptions& o) {
  if (o.max_num_batched_tokens < 1) return invalid("--max-num-batched-tokens should be at least 1");
  if (o.max_num_seqs < 1 || o.max_num_seqs > 4096) return invalid("--max-num-seqs should be from 1 to 4096");
  if (o.drain_seconds < 0 || o.watchdog_seconds < 1 || o.step_budget_ms < 1)
    return invalid("--drain-seconds should not be negative, --watchdog-seconds and --step-budget-ms be at least 1");
  o.loop.step_budget = std::chrono::milliseconds(o.step_budget_ms);
  o.loop.watchdog = std::chrono::seconds(o.watchdog_seconds);
  o.http.drain = std::chrono::seconds(o.drain_seconds);
  constexpr int64_t kLongest = 1'000'000;
  if (std::max({o.drain_seconds, o.watchdog_seconds, o.request_timeout, o.queue_timeout}) > kLongest)
    return invalid("--drain-seconds, --watchdog-seconds, --request-timeout and --queue-timeout are at most 1000000");
  if (o.request_timeout < 0 || o.queue_timeout < 0 || o.reasoning_budget < -1)
    return invalid("--request-timeout and --queue-timeout should not be negative, --reasoning-budget be at least -1");
  o.loop.queue_timeout = std::chrono::seconds(o.queue_timeout);
  o.api.max_body_bytes = o.http.max_body_bytes;
  o.api.names = o.served_names;
  if (o.api.names.empty()) o.api.names = {default_name(o.model.model())};
  TC_ASSIGN(const std::unique_ptr<server::AccessLog> log, server::AccessLog::open(o.access_log));
  TC_ASSIGN(const std::unique_ptr<server::Listener> listener, server::Listener::bind(o.http));
  return Service(o, *listener, *log).run();
}

}  // namespace

void add_serve(CLI::App& app, Outcome& outcome) {
  auto o = std::make_shared<ServeOptions>();
  CLI::App* command = app.add_subcommand("serve", "Serve the model over an OpenAI-compatible HTTP API");
  o->model.add_to(*command);
  const auto add = [&](const char* group, const char* name, auto& value, const char* text) {
    return command->add_option(name, value, text)->capture_default_str()->group(group);
  };
  add("model", "--served-model-name", o->served_names,
      "Name in /v1/models; the folder's by default. Given again: further names of the same model")
      ->allow_extra_args(false);
  command
      ->add_flag("--strict-model-name", o->strict_model_name,
                 "A request for another model is a 404, not served with a warning")
      ->group("model");
  command->add_flag("--strict-fields", o->strict_fields, "A request with an unknown field is a 400")->group("network");
  command
      ->add_flag("--no-generation-config", o->no_generation_config,
                 "Requests that name no temperature, top-p or top-k get 1, 1 and none, not the model's own")
      ->group("model");
  add("model", "--reasoning-field", o->reasoning_field,
      "Where chats give reasoning: reasoning_content, or both: as reasoning too")
      ->check(CLI::IsMember({"reasoning_content", "both"}));
  add("model", "--reasoning-budget", o->reasoning_budget,
      "Tokens that a chat may think, where it says none; -1: no limit");
  command->add_flag("--think", o->think, "Chats think unless the request says otherwise")->group("model");
  add("network", "--host", o->http.host, "Address to listen on: an IP address, localhost, or unix:/path of a socket");
  add("network", "--port", o->http.port, "Port to listen on; 0: any free one");
  add("network", "--allowed-host", o->http.allowed_hosts,
      "A name under which this server is reached besides its address; '*' allows all; may be given again")
      ->allow_extra_args(false);
  add("network", "--cors-origin", o->http.cors_origins,
      "A web page's origin, such as https://ui.example, that may use this server from a browser; '*' all; may be given "
      "again")
      ->allow_extra_args(false);
  add("network", "--api-key-file", o->keys.file,
      "A file of keys (mode 600), a line 'name:key' each, behind it 'admin', 'max-requests=N', 'salt=TEXT'");
  add("network", "--api-key", o->keys.keys, "A key; better in THERMOCLINE_API_KEY, as everybody sees arguments")
      ->allow_extra_args(false)
      ->type_name(Settings::kSecret);
  add("network", "--admin-key", o->keys.admin_keys, "A key of an admin; better in THERMOCLINE_ADMIN_KEY")
      ->allow_extra_args(false)
      ->type_name(Settings::kSecret);
  add("network", "--max-requests-per-key", o->keys.max_requests,
      "Requests at a time of each key, where there are several");
  command->add_flag("--insecure-no-auth", o->insecure_no_auth, "Serve a public address without keys")->group("network");
  add("network", "--max-connections", o->http.max_connections, "Open connections at most");
  add("network", "--max-body", o->http.max_body_bytes, "Largest request body in bytes");
  add("network", "--drain-seconds", o->drain_seconds, "Seconds that running answers have after SIGTERM");
  add("batching", "--max-num-seqs", o->max_num_seqs, "Sequences that run together");
  add("batching", "--max-num-batched-tokens", o->max_num_batched_tokens, "Tokens of one step");
  add("batching", "--step-budget-ms", o->step_budget_ms, "Longest step while somebody's answer grows, in milliseconds");
  add("batching", "--watchdog-seconds", o->watchdog_seconds,
      "Seconds after which a step without an end fails its requests");
  add("batching", "--prep-threads", o->api.prep_threads,
      "Threads that read and tokenise requests; 0: a quarter of the cores");
  as_size(command->add_option("--kv-host-memory", o->kv_host_memory,
                              "Bytes of host memory for the KV cache, checkpoints of prompts included, such as 8GiB; "
                              "0: what is free"))
      ->group("memory");
  as_size(command->add_option("--kv-gpu-memory", o->kv_gpu_memory,
                              "Bytes of all devices together for the KV cache; 0: half of what is free, the rest is "
                              "for experts"))
      ->group("memory");
  as_size(command->add_option("--prefix-cache-memory", o->prefix_cache_memory,
                              "Of the host's bytes, those for checkpoints of prompts, from which later ones that begin "
                              "alike go on, such as 2GiB; 0: by the size of the KV cache, an eighth at most"))
      ->group("memory");
  command->add_flag("--no-prefix-cache", o->no_prefix_cache, "Every prompt is computed whole")->group("memory");
  add("memory", "--kv-disk-dir", o->kv_disk_dir,
      "A private folder where the KV cache of conversations outlives restarts and what memory holds (docs/kv.md); made "
      "where it is missing");
  as_size(command->add_option("--kv-disk-space", o->kv_disk_space, "Bytes of that folder at most, such as 64GiB"))
      ->default_str("16GiB")
      ->group("memory");
  add("queue", "--max-queue", o->loop.queue.requests, "Requests that wait at most; more get 429");
  add("queue", "--max-queue-tokens", o->loop.queue.tokens, "Prompt tokens that wait at most");
  add("queue", "--max-queue-bytes", o->loop.queue.bytes, "Bytes of waiting requests at most");
  add("queue", "--queue-timeout", o->queue_timeout,
      "Seconds after which a request that was not begun gets 429; 0: it waits");
  add("queue", "--request-timeout", o->request_timeout,
      "Seconds after its arrival in which a request ends with 504; 0: none but its own timeout");
  add("queue", "--default-max-tokens", o->loop.default_max_tokens,
      "Tokens of answers that ask for no number; -1: what the context holds");
  add("queue", "--max-answer-tokens", o->loop.max_answer_tokens,
      "No answer has more tokens; -1: what the context holds");
  command
      ->add_option_function<std::string>(
          "--metrics-compat", [o](const std::string&) { o->api.metrics.vllm_names = true; },
          "vllm: /metrics has vLLM's names beside our own, for its dashboards")
      ->check(CLI::IsMember({"vllm"}))
      ->group("logging");
  add("logging", "--access-log", o->access_log, "A line of JSON a request: a file, or - for standard error");
  command->add_flag("--quiet,-q", o->quiet, "No progress while loading")->group("logging");
  add_aliases(*command, o->model.settings());
  o->model.settings().also_print([options = o.get()] {  // which owns it
    return sampling_rows(options->model.model(), options->no_generation_config);
  });
  set_common(*command, {"help",
                        "config",
                        "print-config",
                        "model",
                        "max-model-len",
                        "served-model-name",
                        "host",
                        "port",
                        "allowed-host",
                        "max-num-seqs",
                        "max-num-batched-tokens",
                        "kv-host-memory",
                        "kv-gpu-memory",
                        "kv-disk-dir",
                        "kv-disk-space",
                        "max-queue",
                        "threads",
                        "device",
                        "gpu-memory",
                        "experts-on-gpu",
                        "access-log",
                        "quiet"});
  command->callback([o, &outcome] { outcome.exit_code = exit_code_of(serve(*o)); });
}

}  // namespace thermocline::cli
