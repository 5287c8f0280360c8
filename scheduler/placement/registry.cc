#include "scheduler/placement/expert_policy.h"

namespace thermocline::sched {
namespace {

constexpr PolicyInfo kPolicies[] = {
    {"static", "what the profile says is used most, for good; without one, experts in turn", false, make_static_policy},
    {"lru", "every miss, for what was used longest ago in any layer", false, make_lru_policy},
    {"lru-layer", "every miss, for what was used longest ago in its own layer", false, make_lru_layer_policy},
    {"lfu", "what was used most often so far", false, make_lfu_policy},
    {"ewma", "what was used most often of late (half-life 32 steps, 25 % better than what goes)", false,
     make_ewma_policy},
    {"freetoken", "LRU, and the step waits for a share of its misses to be fetched", false, make_freetoken_policy},
    {"prefill", "what each prompt used most, chosen when it ends and kept while it is answered", false,
     make_prefill_policy},
    {"value", "what is used most over a half-life that adapts; a quarter of the fills of fetching on demand", false,
     make_value_policy},
    {"eager", "the same, with as many fills as the bus has time for", false, make_eager_policy},
    {"belady", "what is needed soonest, for what is needed last: knows the future", true, make_belady_policy},
};

}  // namespace

std::span<const PolicyInfo> policies() { return kPolicies; }

Result<const PolicyInfo*> find_policy(std::string_view name) {
  std::string names;
  for (const PolicyInfo& policy : kPolicies) {
    if (policy.name == name) return &policy;
    names += (names.empty() ? "" : ", ") + std::string(policy.name);
  }
  return invalid("unknown expert policy '" + std::string(name) + "': use one of " + names);
}

}  // namespace thermocline::sched
