// Which routed experts live in the device's slots. A policy sees what the router chose and what is resident, and says
// what to bring in and what to give up for it. Pure: the same observations give the same decisions, so a recorded trace
// replays. Source: spec/scheduler.md 2.5.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "runtime/base/result.h"

namespace thermocline::sched {

struct ExpertId {
  int layer = 0, expert = 0;
  bool operator==(const ExpertId&) const = default;
};

/// How often a step's router chose an expert of a layer.
struct ExpertUse {
  ExpertId id;
  int tokens = 0;
};

/// One expert in, and the one that makes room for it; none where a slot is free.
struct Admission {
  ExpertId fill;
  ExpertId victim{-1, -1};
  bool evicts() const { return victim.layer >= 0; }
};

/// The slots as a policy sees them.
struct Residency {
  std::span<const int32_t> slot_of;  // [layers, experts]; -1: not resident and not on its way
  int layers = 0, experts = 0;
  int free_slots = 0;

  bool resident(const ExpertId& id) const { return slot_of[static_cast<size_t>(id.layer * experts + id.expert)] >= 0; }
};

class ExpertPolicy {
 public:
  virtual ~ExpertPolicy() = default;
  /// What the last step used, in rising (layer, expert) order.
  virtual void observe(std::span<const ExpertUse> uses) = 0;
  /// At most `max_fills` changes. A victim is resident and named once; what is filled is neither resident nor named
  /// twice.
  virtual std::vector<Admission> plan(const Residency& residency, int max_fills) = 0;
};

enum class PolicyKind { fixed, lru };
/// "static" or "lru". Errors: invalid_argument.
Result<PolicyKind> parse_policy(std::string_view name);

/// static: fills free slots, the most used experts first (before any use: expert 0 of every layer, then 1, ...), and
/// evicts nothing. lru: brings in what the last step missed, for what was used longest ago.
std::unique_ptr<ExpertPolicy> make_policy(PolicyKind kind, int layers, int experts);

}  // namespace thermocline::sched
