// What a little more or less of something would change: the plan again, with one number different.
#pragma once

#include <optional>

#include "scheduler/cost/hardware_presets.h"
#include "scheduler/plan/box_plan.h"

namespace thermocline::sched {

struct WhatIf {
  std::string change;  // "12 channels instead of 8"
  bool fits = true;
  double decode_percent = 0, prefill_percent = 0;  // more tokens a second; decode of all sequences together
};

/// Those that apply and change whether it fits, or a speed by a percent at least.
///   plan   of the question
///   sheet  what its processor was made from, where it was
std::vector<WhatIf> what_ifs(const BoxQuestion& question, const BoxPlan& plan, const std::optional<CpuSheet>& sheet);

}  // namespace thermocline::sched
