// Metrics: the server's counts in Prometheus' text format. Requests are counted as they end, HTTP answers as they go;
// what the engine counts is read when somebody asks, so a step never meets this file. docs/observability.md has every
// name.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "runtime/engine/loop_options.h"
#include "runtime/engine/memory_tiers.h"

namespace thermocline::metrics {

/// A request for an answer of the model, when it has ended.
struct EndedRequest {
  enum class Outcome { stop, length, tool, abort_client, abort_shutdown, error, rejected } outcome = Outcome::stop;
  int64_t prompt_tokens = 0, completion_tokens = 0;
  int64_t max_tokens = -1;  // as it asked; -1: it did not
  int choices = 0;          // 0: it was not read
  double queue_seconds = 0, prefill_seconds = 0, decode_seconds = 0, total_seconds = 0;
  double first_token_seconds = 0;  // 0: there was none
};

/// What is so now. The engine's part is empty while it loads.
struct Snapshot {
  std::string model = {};  // its name; "": none is served yet
  bool ready = false;
  double loaded = 0;                  // share of the weights
  int64_t preparing = 0, queued = 0;  // requests that wait: being read and tokenised; for a step
  EngineStats stats = {};
  std::vector<MemoryTier> tiers = {};
  std::optional<double> stream_bytes_per_second = {};
};

class Metrics {
 public:
  struct Options {
    bool vllm_names = false;  // the names that vLLM's dashboards ask for, beside our own
    std::filesystem::path powercap = "/sys/class/powercap";
  };
  explicit Metrics(const Options& options);
  ~Metrics();

  // Any thread:

  void request_ended(const EndedRequest& request);
  /// `handler`: the endpoint's path as it is registered, never what a client sent.
  void http_answered(const std::string& handler, int status);
  std::string text(const Snapshot& now);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace thermocline::metrics
