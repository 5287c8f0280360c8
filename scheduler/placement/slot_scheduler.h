// SlotScheduler: what moves into and out of a device's slots between two steps. It tells its policy what the routers
// chose, and lets as many fills through as copies have idle time for; whoever owns the slots carries it out: the engine
// and the simulator. Pure, as policies are: with predicted times the same routing gives the same slots.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "scheduler/cost/cost_model.h"
#include "scheduler/placement/expert_policy.h"

namespace thermocline::sched {

/// When copies to a device disturb nobody, by the cost model. Source: spec/scheduler.md 2.5 and 2.6.
struct IdleCopies {
  double fill_ns = 0;  // copying one expert; 0: not known
  /// Of steps of 1, 2, 4, 8 and 16 tokens: while the CPU has no experts to read. More tokens: of 16.
  std::array<double, 5> idle_ns{};
  double idle(int64_t tokens) const;
};
/// For a box with a device: while it is at everything but experts.
IdleCopies idle_copies(const CostModel& cost);

class SlotScheduler {
 public:
  static constexpr double kShareOfIdle = 0.7;  // that fills may take

  struct Options {
    std::string policy = "static";  // policies()
    PolicyOptions of = {};
    int max_fills = 16;  // of a step, whatever time there is
    double fill_ns = 0;  // copying one expert; 0: not known, only max_fills holds
  };
  /// Errors: invalid_argument for a policy that there is not.
  static Result<std::unique_ptr<SlotScheduler>> create(const Options& options);

  /// What the slots hold before the first step: what the profile says is used most.
  std::vector<Admission> first(const Residency& residency) const;

  /// What the routers of a step chose.
  void observe(const StepUses& step) { policy_->observe(step); }
  /// The same from their ids, by layer [tokens, top_k], experts numbered from 0.
  void observe(std::span<const int32_t* const> ids, int64_t tokens, int top_k, bool prefill);
  /// What moves before the next step. idle_ns: of that time copies disturb nobody. demanded: fills that happen anyway.
  std::vector<Admission> plan(const Residency& residency, double idle_ns, int demanded = 0);

  /// Fills that so much time leaves room for.
  int fills_within(double idle_ns) const;
  double demand_share() const { return policy_->demand_share(); }
  /// Whether it would ever fill or evict anything where no slot is free.
  bool moves() const { return o_.policy != "static"; }
  /// Another policy, for tests.
  void set_policy(std::unique_ptr<ExpertPolicy> policy) {
    policy_ = std::move(policy);
    o_.policy = "";
  }

 private:
  SlotScheduler(Options options, std::unique_ptr<ExpertPolicy> policy);

  Options o_;
  std::unique_ptr<ExpertPolicy> policy_;
  std::vector<int> count_;  // of a layer's experts
  std::vector<int> seen_;   // those with a count
  std::vector<ExpertUse> uses_;
};

}  // namespace thermocline::sched
