// The lines of `doctor`, which `calibrate` ends with too.
#pragma once

#include <vector>

#include "runtime/engine/doctor.h"

namespace thermocline::cli {

/// One line each; `all`: also those that are fine.
void print_checks(const std::vector<Check>& checks, bool all);

}  // namespace thermocline::cli
