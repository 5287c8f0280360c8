// A sched::MachineProfile as JSON, and back: the file that `calibrate` writes, or one that somebody wrote by hand for a
// box that is to be bought.
#pragma once

#include <string_view>

#include "runtime/io/json_document.h"
#include "scheduler/cost/machine_profile.h"

namespace thermocline {

/// What it holds is what parse_machine_profile takes.
Json machine_profile_json(const sched::MachineProfile& profile);

/// Members without a meaning here are left alone. Errors: corrupt, naming the field: what is missing, no number, not
/// finite, or below what makes sense (rates and times above 0, shares up to 1).
Result<sched::MachineProfile> parse_machine_profile(std::string_view text);

}  // namespace thermocline
