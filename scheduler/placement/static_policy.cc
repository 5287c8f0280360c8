// Static: the experts that a profile says are used most, or, without one, expert 0 of every layer, then 1, and so on.
#include <algorithm>
#include <numeric>

#include "scheduler/placement/expert_policy.h"

namespace thermocline::sched {
namespace {

class StaticPolicy final : public ExpertPolicy {
 public:
  explicit StaticPolicy(const PolicyOptions& o) : o_(o) {
    order_.resize(static_cast<size_t>(o.layers) * static_cast<size_t>(o.experts));
    std::iota(order_.begin(), order_.end(), 0);
    const auto turn = [&](int i) { return i % o_.experts * o_.layers + i / o_.experts; };
    std::sort(order_.begin(), order_.end(), [&](int a, int b) {
      const float x = used(a), y = used(b);
      return x > y || (x == y && turn(a) < turn(b));
    });
  }

  void observe(const StepUses&) override {}

  std::vector<Admission> plan(const Residency& residency, int max_fills) override {
    std::vector<Admission> plan;
    const int count = std::min(max_fills, residency.free_slots);
    for (; next_ < order_.size() && static_cast<int>(plan.size()) < count; ++next_) {
      const ExpertId id{order_[next_] / o_.experts, order_[next_] % o_.experts};
      if (!residency.resident(id)) plan.push_back({id});
    }
    return plan;
  }

 private:
  float used(int i) const { return o_.profile.empty() ? 0 : o_.profile[static_cast<size_t>(i)]; }

  const PolicyOptions o_;
  std::vector<int> order_;
  size_t next_ = 0;
};

}  // namespace

std::unique_ptr<ExpertPolicy> make_static_policy(const PolicyOptions& o) { return std::make_unique<StaticPolicy>(o); }

}  // namespace thermocline::sched
