// `thermocline bench server`: what serving costs beside the steps. The same answers, told over HTTP as event streams
// and taken from the engine without a server, in turn; and the memory of streams that wait.
#include <fmt/format.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <ctime>
#include <fstream>
#include <thread>

#include "runtime/base/timing.h"
#include "runtime/cli/command.h"
#include "runtime/cli/model_folder.h"
#include "runtime/engine/machine_info.h"
#include "runtime/io/file.h"
#include "runtime/server/api/api.h"
#include "runtime/server/http/listener.h"

namespace thermocline::cli {
namespace {

constexpr double kMostOverhead = 0.03;  // of a step
constexpr double kMostIdleBytes = 100e6;
constexpr int kIdleStreams = 1000;  // of which that is said
constexpr int64_t kPromptTokens = 8;
constexpr std::chrono::seconds kPatience{600};

struct ServerBenchOptions {
  ModelOptions model;
  std::string tokenizer, json_path;
  int streams = 64, tokens = 64, idle = kIdleStreams, repetitions = 3;
  bool check = false;
};

// --- clients ---

/// One POST on each of many connections. A thread reads them all and keeps nothing, so that what the process grows by
/// is the server's.
class StreamClients {
 public:
  explicit StreamClients(int count) : sockets_(static_cast<size_t>(count), -1), bodies_(sockets_.size()) {}
  ~StreamClients() {
    for (const int fd : sockets_)
      if (fd >= 0) close(fd);
  }
  StreamClients(const StreamClients&) = delete;
  StreamClients& operator=(const StreamClients&) = delete;

  /// Errors: io.
  Status ask(uint16_t port, const std::function<std::string(int)>& body_of) {
    for (size_t i = 0; i < sockets_.size(); ++i) {
      const std::string body = body_of(static_cast<int>(i));
      const std::string request = fmt::format(
          "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nContent-Type: application/json\r\nConnection: "
          "close\r\nContent-Length: {}\r\n\r\n{}",
          port, body.size(), body);
      sockets_[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
      sockaddr_in address{};
      address.sin_family = AF_INET;
      address.sin_port = htons(port);
      address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
      if (sockets_[i] < 0 || connect(sockets_[i], reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
          send(sockets_[i], request.data(), request.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(request.size()))
        return Error{ErrorCode::io,
                     fmt::format("connection {} of {}: {}", i + 1, sockets_.size(), std::strerror(errno))};
    }
    return {};
  }

  /// Reads until `enough` of every connection's first and last bytes and how many they were.
  /// Errors: io, where one ends before, or says nothing for long.
  struct Body {
    std::string first, last;
    bool ended = false;
  };
  Status read_until(const std::function<bool(const Body&)>& enough) {
    const Clock::time_point start = Clock::now();
    for (;;) {
      std::vector<pollfd> waited;
      std::vector<size_t> owners;
      for (size_t i = 0; i < sockets_.size(); ++i) {
        if (enough(bodies_[i])) continue;
        if (bodies_[i].ended)
          return Error{ErrorCode::io,
                       fmt::format("stream {} ended early: {}...{}", i, bodies_[i].first, bodies_[i].last)};
        waited.push_back({sockets_[i], POLLIN, 0});
        owners.push_back(i);
      }
      if (waited.empty()) return {};
      if (Clock::now() - start > kPatience || poll(waited.data(), waited.size(), 60'000) <= 0)
        return Error{ErrorCode::io, fmt::format("{} streams say nothing", waited.size())};
      for (size_t k = 0; k < waited.size(); ++k)
        if (waited[k].revents != 0) read_some(waited[k].fd, bodies_[owners[k]]);
    }
  }

 private:
  static void read_some(int fd, Body& body) {
    char buffer[16 << 10];
    const ssize_t got = recv(fd, buffer, sizeof buffer, 0);
    if (got <= 0) {
      body.ended = true;
      return;
    }
    const std::string_view bytes(buffer, static_cast<size_t>(got));
    if (body.first.size() < kKept) body.first += bytes.substr(0, kKept - body.first.size());
    body.last += bytes.size() > kKept ? bytes.substr(bytes.size() - kKept) : bytes;
    if (body.last.size() > kKept) body.last.erase(0, body.last.size() - kKept);
  }
  static constexpr size_t kKept = 64;

  std::vector<int> sockets_;
  std::vector<Body> bodies_;
};

// --- the server ---

/// What a serving process has, without the process: the listener on any free port, and its thread.
class Served {
 public:
  static Result<std::unique_ptr<Served>> start(const server::ServedModel& model, server::HttpTimes times) {
    auto served = std::unique_ptr<Served>(new Served());
    TC_ASSIGN(served->log_, server::AccessLog::open("/dev/null"));
    server::HttpOptions http;
    http.port = 0;
    http.signals = false;
    http.times = times;
    TC_ASSIGN(served->listener_, server::Listener::bind(http));
    served->api_ = std::make_unique<server::Api>(server::Api::Options{}, *served->log_);
    served->api_->serve(model);
    served->network_ = std::thread([s = served.get()] { s->listener_->run(*s->api_, [](auto) {}); });
    return served;
  }
  ~Served() {
    if (!network_.joinable()) return;
    listener_->stop();
    network_.join();
  }
  uint16_t port() const { return listener_->port(); }
  /// CPU time that the network thread has taken.
  double network_seconds() {
    clockid_t clock{};
    timespec time{};
    if (pthread_getcpuclockid(network_.native_handle(), &clock) != 0 || clock_gettime(clock, &time) != 0) return 0;
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }

 private:
  Served() = default;
  std::unique_ptr<server::AccessLog> log_;
  std::unique_ptr<server::Listener> listener_;
  std::unique_ptr<server::Api> api_;
  std::thread network_;
};

// --- 64 streams ---

/// The tokens that answers are made of, for text that is the tokenizer's whatever the model would say.
std::vector<int32_t> spoken_tokens(const Tokenizer& tokenizer) {
  std::vector<int32_t> ids;
  for (int32_t id = 256; id < tokenizer.size() && ids.size() < 32; ++id)
    if (const Result<std::string> text = detokenize(tokenizer, {&id, 1}); text && text->size() >= 3) ids.push_back(id);
  return ids;
}

/// One repetition's means over its steps, in seconds.
struct StepTimes {
  double step = 0;     // forward pass, sampling, detokenising
  double between = 0;  // from one step to the next
  double network = 0;  // CPU time of the network thread
};

class ServerBench {
 public:
  ServerBench(const ServerBenchOptions& o, Engine& engine, const Tokenizer& tokenizer)
      : o_(o), engine_(engine), spoken_(spoken_tokens(tokenizer)) {}

  Result<StepTimes> direct() {
    std::vector<std::shared_ptr<RequestHandle>> handles;
    const Span span(engine_);
    for (int i = 0; i < o_.streams; ++i) {
      Request request;
      for (int64_t k = 0; k < kPromptTokens; ++k) request.prompt.push_back(prompt_token(i, k));
      for (const int32_t id : spoken_) request.sampling.logit_bias.emplace_back(id, 100.0F);
      request.sampling.seed = static_cast<uint64_t>(i);
      request.max_tokens = o_.tokens;
      request.ignore_eos = true;
      TC_ASSIGN(std::shared_ptr<RequestHandle> handle, engine_.submit(std::move(request)));
      handles.push_back(std::move(handle));
    }
    for (const auto& handle : handles)
      while (!handle->stream().finished()) {
        if (!handle->stream().wait_for(kPatience)) return Error{ErrorCode::internal, "an answer does not go on"};
        for (const TokenEvent& event : handle->stream().take())
          if (event.reason == FinishReason::error) return event.error;
      }
    return span.times();
  }

  Result<StepTimes> over_http(Served& served) {
    StreamClients clients(o_.streams);
    const Span span(engine_);
    const double before = served.network_seconds();
    TC_RETURN_IF_ERROR(clients.ask(served.port(), [this](int i) { return body_of(i); }));
    TC_RETURN_IF_ERROR(clients.read_until([](const auto& body) { return body.ended && said_all(body); }));
    StepTimes times = span.times();
    times.network = (served.network_seconds() - before) / span.steps();
    return times;
  }

 private:
  class Span {
   public:
    explicit Span(Engine& engine) : engine_(engine), before_(engine.stats()) {}
    double steps() const { return static_cast<double>(engine_.stats().steps - before_.steps); }
    StepTimes times() const {
      const EngineStats now = engine_.stats();
      const double steps = static_cast<double>(now.steps - before_.steps),
                   in_steps = now.step_seconds - before_.step_seconds;
      return {.step = in_steps / steps, .between = (seconds_since(start_) - in_steps) / steps};
    }

   private:
    Engine& engine_;
    EngineStats before_;
    Clock::time_point start_ = Clock::now();
  };

  static bool said_all(const StreamClients::Body& body) {
    return body.first.starts_with("HTTP/1.1 200") && body.last.find("[DONE]") != std::string::npos;
  }
  int32_t prompt_token(int request, int64_t k) const {
    return static_cast<int32_t>((7919 * request + 31 * k) % engine_.geometry().vocab_size);
  }
  std::string body_of(int i) const {
    Json body{{"prompt", Json::array()}, {"stream", true}, {"max_tokens", o_.tokens},
              {"ignore_eos", true},      {"seed", i},      {"logit_bias", Json::object()}};
    for (int64_t k = 0; k < kPromptTokens; ++k) body["prompt"].push_back(prompt_token(i, k));
    for (const int32_t id : spoken_) body["logit_bias"][std::to_string(id)] = 100;
    return dump_json(body);
  }

  const ServerBenchOptions& o_;
  Engine& engine_;
  const std::vector<int32_t> spoken_;
};

// --- streams that wait ---

/// Takes requests and never answers.
class SilentBackend : public server::Backend {
 public:
  Result<QueueTicket> ticket(const QueueCounters::Amount& amount) override {
    return QueueTicket::take(counters_, amount);
  }
  Result<std::shared_ptr<RequestHandle>> submit(Request request) override {
    return std::make_shared<RequestHandle>(request.choices, 4096);
  }
  void flush_prefix_cache(std::function<void(const PrefixCacheFlush&)> done) override { done({}); }
  EngineHealth health() const override { return {}; }
  EngineStats stats() const override { return {}; }

 private:
  std::shared_ptr<QueueCounters> counters_ = std::make_shared<QueueCounters>(QueueCaps{.requests = 1 << 20});
};

double resident_bytes() {
  std::ifstream file("/proc/self/statm");
  double all = 0, resident = 0;
  file >> all >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE));
}

// What the process grows by, with every stream's head and two signs of life sent.
Result<double> idle_bytes(int streams, server::ServedModel model) {
  SilentBackend silent;
  model.backend = &silent;
  server::HttpTimes times;
  times.keep_alive = std::chrono::milliseconds(500);
  TC_ASSIGN(const std::unique_ptr<Served> served, Served::start(model, times));
  StreamClients clients(streams);
  const double before = resident_bytes();
  TC_RETURN_IF_ERROR(clients.ask(served->port(), [](int) { return R"({"prompt":"Hello","stream":true})"; }));
  TC_RETURN_IF_ERROR(clients.read_until([](const auto& body) {
    const size_t one = body.last.find("still working");
    return one != std::string::npos && body.last.find("still working", one + 1) != std::string::npos;
  }));
  return resident_bytes() - before;
}

// --- all of it ---

struct Table {
  bool pass = true;
  void row(const std::string& what, const std::string& value, const std::string& target, bool met) {
    pass = pass && met;
    fmt::print("| {:<58} | {:>9} | {:>9} | {} |\n", what, value, target, met ? "pass" : "FAIL");
  }
  static void figure(const std::string& what, const std::string& value) {
    fmt::print("| {:<58} | {:>9} | {:>9} |      |\n", what, value, "");
  }
};

double median_of(const std::vector<StepTimes>& times, double StepTimes::*member) {
  std::vector<double> values;
  for (const StepTimes& t : times) values.push_back(t.*member);
  return median(values);
}

// Whether every target is met.
Result<bool> bench_server(const ServerBenchOptions& o) {
  if (o.streams < 1 || o.streams > 1024 || o.tokens < 2 || o.repetitions < 1 || o.idle < 0 || o.idle > 4000)
    return invalid("--streams should be from 1 to 1024, --tokens at least 2, -r at least 1, --idle from 0 to 4000");
  TC_RETURN_IF_ERROR(o.model.check_folder());
  TC_ASSIGN(EngineOptions options, o.model.engine_options());
  options.max_sequences = o.streams;
  options.prefix_cache_bytes = 0;
  if (options.max_context == 0) options.max_context = 2 * (kPromptTokens + o.tokens);
  TC_ASSIGN(const std::unique_ptr<Tokenizer> tokenizer,
            load_tokenizer(o.tokenizer.empty() ? o.model.model() : o.tokenizer));
  TC_ASSIGN(const std::unique_ptr<Engine> engine, Engine::open(options));
  if (tokenizer->size() > engine->geometry().vocab_size) return invalid("--tokenizer has more tokens than the model");
  TC_RETURN_IF_ERROR(engine->start(*tokenizer, {}));
  server::EngineBackend backend(*engine);
  const server::ServedModel model{.backend = &backend,
                                  .vocab_size = engine->geometry().vocab_size,
                                  .max_context = engine->max_context(),
                                  .bos_token_id = engine->geometry().bos_token_id,
                                  .tokenizer = *tokenizer,
                                  .constants = Error{ErrorCode::unsupported, "no chats here"},
                                  .name = "bench"};
  ServerBench bench(o, *engine, *tokenizer);
  std::vector<StepTimes> direct, http;
  {
    TC_ASSIGN(const std::unique_ptr<Served> served, Served::start(model, {}));
    for (int i = 0; i <= o.repetitions; ++i) {
      TC_ASSIGN(const StepTimes without, bench.direct());
      TC_ASSIGN(const StepTimes with, bench.over_http(*served));
      if (i == 0) continue;  // page faults, caches
      direct.push_back(without);
      http.push_back(with);
    }
  }
  TC_ASSIGN(const double idle, idle_bytes(o.idle, model));

  const double step = median_of(direct, &StepTimes::step), between = median_of(direct, &StepTimes::between),
               network = median_of(http, &StepTimes::network), overhead = (between + network) / step;
  std::vector<double> slower;
  for (size_t i = 0; i < direct.size(); ++i)
    slower.push_back((http[i].step + http[i].between) / (direct[i].step + direct[i].between) - 1);
  fmt::print("{} streams of {} tokens, median of {}; {}\n\n", o.streams, o.tokens, o.repetitions,
             machine_line(machine_of(*engine)));
  fmt::print("| {:<58} | {:>9} | {:>9} |      |\n| {:-<58} | --------: | --------: | ---- |\n", "", "is", "target", "");
  Table table;
  table.figure("a step without a server: layers, samples, their text, ms", fmt::format("{:.2f}", step * 1e3));
  table.figure("from step to step: the next plan, ms", fmt::format("{:.3f}", between * 1e3));
  table.figure("network thread: JSON, events, sockets, ms of CPU a step", fmt::format("{:.3f}", network * 1e3));
  table.figure("  of each token, us", fmt::format("{:.2f}", network / o.streams * 1e6));
  table.figure("steps over HTTP are longer by (with the clients' CPU), %", fmt::format("{:.1f}", median(slower) * 100));
  table.row("both against the step, %", fmt::format("{:.2f}", overhead * 100),
            fmt::format("<= {:.0f}", kMostOverhead * 100), overhead <= kMostOverhead);
  const double most = kMostIdleBytes * std::max(1.0, static_cast<double>(o.idle) / kIdleStreams);
  table.row(fmt::format("memory of {} streams that wait, MB", o.idle), fmt::format("{:.1f}", idle / 1e6),
            fmt::format("<= {:.0f}", most / 1e6), idle <= most);
  if (!o.json_path.empty())
    TC_RETURN_IF_ERROR(write_text_file(o.json_path, dump_json(Json{{"streams", o.streams},
                                                                   {"step_seconds", step},
                                                                   {"between_seconds", between},
                                                                   {"network_cpu_seconds", network},
                                                                   {"overhead", overhead},
                                                                   {"http_slower", median(slower)},
                                                                   {"idle_streams", o.idle},
                                                                   {"idle_bytes", idle},
                                                                   {"build", build_json()}}) +
                                                        "\n"));
  return table.pass;
}

}  // namespace

void add_bench_server(CLI::App& bench, Outcome& outcome) {
  auto o = std::make_shared<ServerBenchOptions>();
  CLI::App* command = bench.add_subcommand("server", "What serving costs beside the steps, and streams that wait");
  o->model.add_to(*command);
  command->add_option("--tokenizer", o->tokenizer, "A folder with another tokenizer, for a model without one");
  command->add_option("--streams", o->streams, "Answers that run together")->capture_default_str();
  command->add_option("--tokens,-n", o->tokens, "Tokens of each")->capture_default_str();
  command->add_option("--idle", o->idle, "Streams that wait")->capture_default_str();
  command->add_option("--repetitions,-r", o->repetitions, "Repetitions; the median counts")->capture_default_str();
  command->add_flag("--check", o->check, "Exit with 1 if a target is missed");
  command->add_option("--json", o->json_path, "Also a JSON document");
  command->callback([o, &outcome] {
    const Result<bool> met = bench_server(*o);
    outcome.exit_code = met ? (o->check && !*met ? kOther : 0) : exit_code_of(met.error());
  });
}

}  // namespace thermocline::cli
