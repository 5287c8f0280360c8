// Synthetic routing that behaves as V4-Flash's was seen to: the score of an expert is its model's, its request's and
// its moment's, and luck. Source: spec/scheduler.md 3.4, fitted to the published hit rates of V4-Flash.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "scheduler/trace/trace.h"

namespace thermocline::sched {

struct SyntheticOptions {
  int layers = 43, experts = 256, top_k = 6, near_misses = 0;
  int hash_layers = 3;  // routed by token id, of a vocabulary with Zipf's frequencies
  int vocabulary = 129280;
  float model_sd = 0.5f;                       // how unlike each other experts are for good
  float request_sd = 1.2f;                     // ... for one request
  float moment_sd = 1.8f, moment_rho = 0.98f;  // ... for some tokens on end: AR(1)
  int guesses = 0;                             // of routers asked ahead; hash layers are known
  float ahead_sd = 0.9f;                       // how far their scores are off, of one layer; of two by sqrt(2)
  uint64_t seed = 1;
};

enum class Workload {
  one,      // one request
  domains,  // one that changes its subject every 200 tokens
  mixed,    // many requests, each with a subject of its own, in one batch
  uniform,  // experts by luck alone
  cyclic,   // each layer's experts in turn, a few more of them than a cache holds
};
/// "one", "domains", "mixed", "uniform", "cyclic". Errors: invalid_argument.
Result<Workload> parse_workload(std::string_view name);

/// Routing of one model, request by request.
class SyntheticRouter {
 public:
  explicit SyntheticRouter(const SyntheticOptions& options);
  TraceHeader header() const;
  /// Draws the subject of a request anew.
  void change_subject(uint32_t request);
  /// It has ended: its memory goes.
  void forget(uint32_t request) {
    if (request < requests_.size()) requests_[request] = {};
  }
  /// The next token's picks, [layers, TraceHeader::picks_per_layer()], valid until the next call.
  std::span<const TracePick> next(uint32_t request);

 private:
  struct Request {
    std::vector<float> subject, moment;  // [layers, experts]
  };
  /// xoroshiro128+
  class Random {
   public:
    explicit Random(uint64_t seed);
    double uniform();
    float normal();

   private:
    uint64_t state_[2];
    float spare_ = 0;
    bool has_spare_ = false;
  };
  void choose(const std::vector<float>& scores, int count, TracePick* out);
  void guess(int layer, bool hashed, TracePick* out);

  const SyntheticOptions o_;
  Random random_, ahead_;  // apart: routing is the same whoever guesses it
  std::vector<float> model_, scores_, ahead_scores_;
  std::vector<Request> requests_;
  std::vector<double> zipf_;  // cumulative
  std::vector<int> order_;
  std::vector<TracePick> picks_;
};

/// `tokens` decode tokens of each of `requests` requests; a step has one of each. `cycle`: experts of a layer that a
/// cyclic workload goes through.
Trace synthesize_trace(const SyntheticOptions& options, Workload workload, int requests, int tokens, int cycle = 0);

}  // namespace thermocline::sched
