#include "runtime/engine/memory_tiers.h"

#include <algorithm>
#include <string_view>

#include "runtime/kv/kv_store.h"

namespace thermocline {
namespace {

// The owners that plan_engine_memory and DeepseekV4GpuStep::plan_memory name.
const char* kind_of(std::string_view owner) {
  if (owner == "weights" || owner == "dense weights") return "weights";
  if (owner == KvStore::kPlanOwner || owner == KvStore::kPlanHostRows) return "kv";
  if (owner == "prefix checkpoints") return "prefix";
  if (owner.ends_with(" staged experts")) return "workspace";
  if (owner.ends_with(" experts")) return "experts";
  return "workspace";
}

}  // namespace

TierPart& MemoryTier::part(const std::string& kind) {
  const auto it = std::find_if(parts.begin(), parts.end(), [&](const TierPart& part) { return part.kind == kind; });
  return it != parts.end() ? *it : parts.emplace_back(TierPart{kind});
}

std::vector<MemoryTier> memory_tiers(const sched::MemoryPlan& plan, uint64_t expert_bytes) {
  std::vector<int> numbers;  // -1 is the host
  for (const sched::MemoryPlan::Row& row : plan.rows())
    if (std::find(numbers.begin(), numbers.end(), row.tier) == numbers.end()) numbers.push_back(row.tier);
  std::sort(numbers.begin(), numbers.end(),
            [](int a, int b) { return static_cast<unsigned>(a) < static_cast<unsigned>(b); });
  std::vector<MemoryTier> tiers;
  for (const int number : numbers) {
    const bool host = number == sched::MemoryPlan::kHost;
    MemoryTier tier{host ? "ram" : "gpu" + std::to_string(number)};
    if (const uint64_t room = plan.room(number); room != UINT64_MAX)
      tier.capacity_bytes = plan.planned_bytes(number) + room;
    for (const sched::MemoryPlan::Row& row : plan.rows())
      if (row.tier == number && row.owner != "weights on their way") tier.part(kind_of(row.owner)).bytes += row.bytes;
    if (host) {
      TierPart& weights = tier.part("weights");
      weights.bytes -= std::min(weights.bytes, expert_bytes);
      tier.part("experts").bytes += expert_bytes;
    }
    tiers.push_back(std::move(tier));
  }
  return tiers;
}

}  // namespace thermocline
