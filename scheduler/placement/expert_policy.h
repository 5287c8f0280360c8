// Which routed experts live in the device's slots. A policy sees what the routers chose and what is resident, and says
// what to bring in and what to give up for it. Pure: the same observations give the same decisions, so a recorded trace
// replays. One policy a file; registry.cc lists them by name. Source: spec/scheduler.md 2.3 to 2.5.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/result.h"

namespace thermocline::sched {

class Trace;
struct ExpertCosts;

struct ExpertId {
  int layer = 0, expert = 0;
  bool operator==(const ExpertId&) const = default;
};

/// How often a step's router chose an expert of a layer.
struct ExpertUse {
  ExpertId id;
  int tokens = 0;
};

/// What a step used, in rising (layer, expert) order.
struct StepUses {
  std::span<const ExpertUse> uses;
  int64_t tokens = 1;
  bool prefill = false;  // a prompt's tokens: of one moment, many
  /// Missing experts that the step itself brought to the device: with a policy that asks for that (demand_share).
  std::span<const ExpertId> fetched = {};
};

/// One expert in, and the one that makes room for it; none where a slot is free.
struct Admission {
  ExpertId fill;
  ExpertId victim{-1, -1};
  bool evicts() const { return victim.layer >= 0; }
  bool operator==(const Admission&) const = default;
};

/// The slots as a policy sees them.
struct Residency {
  std::span<const int32_t> slot_of;  // [layers, experts]; -1: not resident and not on its way
  int layers = 0, experts = 0;
  int free_slots = 0, residents = 0;

  bool resident(const ExpertId& id) const { return slot_of[static_cast<size_t>(id.layer * experts + id.expert)] >= 0; }
};

class ExpertPolicy {
 public:
  virtual ~ExpertPolicy() = default;
  virtual void observe(const StepUses& step) = 0;
  /// At most `max_fills` changes. A victim is resident and named once; what is filled is neither resident nor named
  /// twice.
  virtual std::vector<Admission> plan(const Residency& residency, int max_fills) = 0;
  /// Share of a layer's missing experts that the step itself should fetch and compute on the device.
  virtual double demand_share() const { return 0; }
};

/// What a policy is made for.
struct PolicyOptions {
  int layers = 0, experts = 0;
  int slots = 0;
  /// How often each expert was used elsewhere, [layers, experts], or empty: what "static" fills its slots by, and what
  /// others begin with.
  std::vector<float> profile = {};
  double demand_share = 0.1;  // bus bandwidth / (bus + CPU memory bandwidth): for FreeToken's rule
  /// Outlive the policy. With them "value" and "eager" fill nothing while steps wait for the device anyway.
  const ExpertCosts* costs = nullptr;
  const Trace* future = nullptr;  // for "belady": the steps that will be observed
};

struct PolicyInfo {
  std::string_view name, description;
  bool offline = false;  // knows the future: for the simulator alone
  std::unique_ptr<ExpertPolicy> (*make)(const PolicyOptions& options);
};
/// Every policy there is.
std::span<const PolicyInfo> policies();
/// Errors: invalid_argument, with the names there are.
Result<const PolicyInfo*> find_policy(std::string_view name);

// One a file:
std::unique_ptr<ExpertPolicy> make_static_policy(const PolicyOptions& options);
std::unique_ptr<ExpertPolicy> make_lru_policy(const PolicyOptions& options);
std::unique_ptr<ExpertPolicy> make_lru_layer_policy(const PolicyOptions& options);
std::unique_ptr<ExpertPolicy> make_lfu_policy(const PolicyOptions& options);
std::unique_ptr<ExpertPolicy> make_ewma_policy(const PolicyOptions& options);
std::unique_ptr<ExpertPolicy> make_freetoken_policy(const PolicyOptions& options);
std::unique_ptr<ExpertPolicy> make_prefill_policy(const PolicyOptions& options);
std::unique_ptr<ExpertPolicy> make_value_policy(const PolicyOptions& options);
std::unique_ptr<ExpertPolicy> make_eager_policy(const PolicyOptions& options);
std::unique_ptr<ExpertPolicy> make_belady_policy(const PolicyOptions& options);

}  // namespace thermocline::sched
