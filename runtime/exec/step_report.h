// StepReport: what a step did.
#pragma once

#include <cstdint>

namespace thermocline {

struct StepReport {
  int64_t tokens = 0, logit_rows = 0;
  double ns = 0;
  uint64_t weight_bytes = 0;  // that the CPU read
};

}  // namespace thermocline
