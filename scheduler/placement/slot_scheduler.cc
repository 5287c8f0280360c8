#include "scheduler/placement/slot_scheduler.h"

#include <algorithm>
#include <bit>

namespace thermocline::sched {

double IdleCopies::idle(int64_t tokens) const {
  const auto i = static_cast<size_t>(std::bit_width(static_cast<uint64_t>(std::max<int64_t>(1, tokens)) * 2 - 1) - 1);
  return idle_ns[std::min(idle_ns.size() - 1, i)];
}

IdleCopies idle_copies(const CostModel& cost) {
  IdleCopies copies{.fill_ns = cost.h2d_ns()};
  for (size_t i = 0; i < copies.idle_ns.size(); ++i) {
    const StepTime t = cost.step({.tokens = static_cast<double>(1 << i), .context = 1024});
    copies.idle_ns[i] = t.total - t[Phase::experts_cpu];
  }
  return copies;
}

SlotScheduler::SlotScheduler(Options options, std::unique_ptr<ExpertPolicy> policy)
    : o_(std::move(options)), policy_(std::move(policy)), count_(static_cast<size_t>(o_.of.experts)) {}

Result<std::unique_ptr<SlotScheduler>> SlotScheduler::create(const Options& o) {
  TC_ASSIGN(const PolicyInfo* const policy, find_policy(o.policy));
  if (policy->offline && !o.of.future) return invalid("the policy '" + o.policy + "' needs a trace to read ahead in");
  return std::unique_ptr<SlotScheduler>(new SlotScheduler(o, policy->make(o.of)));
}

std::vector<Admission> SlotScheduler::first(const Residency& residency) const {
  return make_static_policy(o_.of)->plan(residency, residency.free_slots);
}

void SlotScheduler::observe(std::span<const int32_t* const> ids, int64_t tokens, int top_k, bool prefill) {
  uses_.clear();
  for (size_t layer = 0; layer < ids.size(); ++layer) {
    seen_.clear();
    for (int64_t i = 0; i < tokens * top_k; ++i)
      if (count_[static_cast<size_t>(ids[layer][i])]++ == 0) seen_.push_back(ids[layer][i]);
    std::sort(seen_.begin(), seen_.end());
    for (const int e : seen_)
      uses_.push_back({{static_cast<int>(layer), e}, std::exchange(count_[static_cast<size_t>(e)], 0)});
  }
  policy_->observe({uses_, tokens, prefill});
}

int SlotScheduler::fills_within(double idle_ns) const {
  return o_.fill_ns > 0 ? static_cast<int>(std::min<double>(o_.max_fills, kShareOfIdle * idle_ns / o_.fill_ns))
                        : o_.max_fills;
}

std::vector<Admission> SlotScheduler::plan(const Residency& residency, double idle_ns, int demanded) {
  return policy_->plan(residency, std::max(fills_within(idle_ns), demanded));
}

}  // namespace thermocline::sched
