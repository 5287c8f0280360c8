// StepReport: what a step did.
#pragma once

#include <cstdint>
#include <span>

namespace thermocline {

/// Which experts the routers of a step chose. What it refers to is valid until the next step.
struct RoutedExperts {
  int64_t tokens = 0;
  int top_k = 0, near_misses = 0;
  std::span<const int32_t* const> ids = {};    // by layer: [tokens, top_k], the heaviest first but for hash layers
  std::span<const float* const> weights = {};  // the same; empty: they stay on a device
  std::span<const int32_t* const> near_ids =
      {};  // by layer: [tokens, near_misses], the ranks behind; empty: not asked for
};

struct StepReport {
  int64_t tokens = 0, logit_rows = 0;
  double ns = 0;
  uint64_t weight_bytes = 0;  // that the CPU read
  RoutedExperts routed = {};
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
};

}  // namespace thermocline
