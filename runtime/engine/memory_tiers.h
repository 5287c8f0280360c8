// MemoryTiers: what an engine takes of each memory, by what it is for.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "scheduler/plan/memory_plan.h"

namespace thermocline {

struct TierPart {
  std::string kind;  // weights, experts, kv, prefix, workspace
  uint64_t bytes = 0;
  std::optional<uint64_t> used_bytes = {};  // of a cache
};

struct MemoryTier {
  std::string name;                             // gpu0, ram, nvme
  std::optional<uint64_t> capacity_bytes = {};  // what was free of it before the engine took its part
  std::vector<TierPart> parts = {};
  TierPart& part(const std::string& kind);  // made where it is missing
};

/// The tiers of a plan, device 0 first, host memory last. What is gone once the weights are loaded is left out.
///   expert_bytes  the routed experts among the host's weights
std::vector<MemoryTier> memory_tiers(const sched::MemoryPlan& plan, uint64_t expert_bytes);

}  // namespace thermocline
