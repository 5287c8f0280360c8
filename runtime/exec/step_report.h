// StepReport: what a step did.
#pragma once

#include <cstdint>

namespace thermocline {

struct StepReport {
  int64_t tokens = 0, logit_rows = 0;
  double ns = 0;
  uint64_t weight_bytes = 0;  // that the CPU read
};

/// Selected rows where CSA rows lie in host memory: those with a copy on the device, those that got one, and those that
/// were read where they lie.
struct HotRows {
  int64_t found = 0, copied = 0, left = 0;
};

}  // namespace thermocline
