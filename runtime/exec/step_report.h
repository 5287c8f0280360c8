// StepReport: what a step did.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "scheduler/cost/step_time.h"

namespace thermocline {

/// Which experts the routers of a step chose. What it refers to is valid until the next step.
struct RoutedExperts {
  int64_t tokens = 0;
  int top_k = 0, near_misses = 0, guesses = 0;
  std::span<const int32_t* const> ids = {};       // by layer: [tokens, top_k], the heaviest first but for hash layers
  std::span<const float* const> weights = {};     // the same; empty: they stay on a device
  std::span<const int32_t* const> near_ids = {};  // by layer: [tokens, near_misses], the ranks behind; empty: no
  /// What the routers would have chosen one layer before, and two: by layer [tokens, guesses], the likeliest first, -1:
  /// none. Empty: they were not asked.
  std::span<const int32_t* const> guess_ids[2] = {};
};

/// How many of them there were, of all layers together: (token, expert) pairs, different experts of a layer, and what
/// of both was the CPU's.
struct StepExperts {
  int64_t layers = 0, layers_with_miss = 0;
  int64_t pairs = 0, experts = 0, cpu_pairs = 0, cpu_experts = 0;
};

/// Counts different numbers of [0, size).
class DistinctCounter {
 public:
  explicit DistinctCounter(int size) : seen_(static_cast<size_t>(size)) {}
  /// Of `ids`; negative ones are nobody's.
  int64_t count(std::span<const int32_t> ids) {
    ++mark_;
    return std::count_if(ids.begin(), ids.end(), [this](int32_t id) {
      return id >= 0 && std::exchange(seen_[static_cast<size_t>(id)], mark_) != mark_;
    });
  }

 private:
  std::vector<uint64_t> seen_;
  uint64_t mark_ = 0;
};

struct StepReport {
  int64_t tokens = 0, logit_rows = 0;
  sched::StepTime time = {};  // on devices only what the CPU does, and the whole
  uint64_t weight_bytes = 0;  // that the CPU read
  StepExperts experts = {};
  RoutedExperts routed = {};
  std::span<const int64_t> cpu_pairs = {};  // by layer, of its (token, expert) pairs; empty: all of them
  std::span<const double> layer_ns = {};    // of each layer; empty: they cannot be told apart, on devices
};

/// Selected rows where CSA rows lie in host memory: those with a copy on the device, those that got one, and those that
/// were read where they lie.
struct HotRows {
  int64_t found = 0, copied = 0, left = 0;
};

/// Of all steps so far: (token, expert) pairs, those among them on devices, layers and those without a miss; experts
/// brought into slots and taken out again, and the bytes of that.
struct ExpertTraffic {
  int64_t pairs = 0, device_pairs = 0, layers = 0, zero_miss_layers = 0;
  int64_t slots = 0, fills = 0, evictions = 0, fill_bytes = 0;
  int64_t fill_budget = 0;  // fills that a decode step of one token may make
  // Read ahead into the CPU's caches, begun with at least; of those: read whole, and needed.
  int64_t staged = 0, staged_whole = 0, staged_right = 0;
  std::string_view prefetch = "off";  // what the referee says of that: "testing", "on", "off"
};

}  // namespace thermocline
