#include "scheduler/placement/expert_policy.h"

#include <algorithm>
#include <string>

namespace thermocline::sched {
namespace {

class StaticFrequency : public ExpertPolicy {
 public:
  StaticFrequency(int layers, int experts)
      : layers_(layers), experts_(experts), uses_(static_cast<size_t>(layers * experts)) {}

  void observe(std::span<const ExpertUse> uses) override {
    for (const ExpertUse& use : uses) uses_[static_cast<size_t>(use.id.layer * experts_ + use.id.expert)] += use.tokens;
  }
  std::vector<Admission> plan(const Residency& residency, int max_fills) override {
    const int wanted = std::min(max_fills, residency.free_slots);
    if (wanted <= 0) return {};
    std::vector<ExpertId> absent;
    for (int expert = 0; expert < experts_; ++expert)
      for (int layer = 0; layer < layers_; ++layer)
        if (!residency.resident({layer, expert})) absent.push_back({layer, expert});
    std::stable_sort(absent.begin(), absent.end(), [&](const ExpertId& a, const ExpertId& b) {
      return uses_[static_cast<size_t>(a.layer * experts_ + a.expert)] >
             uses_[static_cast<size_t>(b.layer * experts_ + b.expert)];
    });
    std::vector<Admission> plan;
    for (size_t i = 0; i < absent.size() && static_cast<int>(i) < wanted; ++i) plan.push_back({absent[i]});
    return plan;
  }

 private:
  const int layers_, experts_;
  std::vector<int64_t> uses_;
};

class Lru : public ExpertPolicy {
 public:
  Lru(int layers, int experts) : layers_(layers), experts_(experts), last_use_(static_cast<size_t>(layers * experts)) {}

  void observe(std::span<const ExpertUse> uses) override {
    ++step_;
    last_.assign(uses.begin(), uses.end());
    for (const ExpertUse& use : uses) last_use_[static_cast<size_t>(use.id.layer * experts_ + use.id.expert)] = step_;
  }
  std::vector<Admission> plan(const Residency& residency, int max_fills) override {
    std::vector<ExpertId> old;  // resident and not of the last step, used longest ago first
    for (int layer = 0; layer < layers_; ++layer)
      for (int expert = 0; expert < experts_; ++expert)
        if (residency.resident({layer, expert}) && use({layer, expert}) < step_) old.push_back({layer, expert});
    std::stable_sort(old.begin(), old.end(), [&](const ExpertId& a, const ExpertId& b) { return use(a) < use(b); });
    std::vector<Admission> plan;
    size_t victims = 0;
    int free_slots = residency.free_slots;
    for (const ExpertUse& u : last_) {
      if (static_cast<int>(plan.size()) >= max_fills) break;
      if (residency.resident(u.id)) continue;
      if (free_slots-- > 0)
        plan.push_back({u.id});
      else if (victims < old.size())
        plan.push_back({u.id, old[victims++]});
    }
    return plan;
  }

 private:
  int64_t use(const ExpertId& id) const { return last_use_[static_cast<size_t>(id.layer * experts_ + id.expert)]; }

  const int layers_, experts_;
  int64_t step_ = 0;
  std::vector<int64_t> last_use_;  // 0: never
  std::vector<ExpertUse> last_;
};

}  // namespace

Result<PolicyKind> parse_policy(std::string_view name) {
  if (name == "static") return PolicyKind::fixed;
  if (name == "lru") return PolicyKind::lru;
  return invalid("unknown expert cache policy '" + std::string(name) + "': use static or lru");
}

std::unique_ptr<ExpertPolicy> make_policy(PolicyKind kind, int layers, int experts) {
  if (kind == PolicyKind::lru) return std::make_unique<Lru>(layers, experts);
  return std::make_unique<StaticFrequency>(layers, experts);
}

}  // namespace thermocline::sched
