// Where the CSA rows of a KV cache should be: on devices, or in host memory with copies of the rows in use there. What
// the freed bytes are worth to experts is read off the hit curve at the slots that there are. Source: spec/scheduler.md
// 2.4 and 2.11.
#pragma once

#include <string>

#include "scheduler/cost/cost_model.h"

namespace thermocline::sched {

struct RowOffload {
  double freed_bytes = 0;     // of devices: all CSA rows, less the copies
  double sequences = 1;       // in a step
  double resident = 0;        // share of the experts that have a slot beside all the rows
  double gather_ns = 10'000;  // of a layer that copies rows, however few
  double miss_rate = 0.1;     // of selected rows: most were selected for the token before
};

/// Of a step that decodes.
struct RowPrice {
  double freed_bytes = 0;
  double saved_ns = 0;  // by experts in the freed bytes
  double spent_ns = 0;  // on copying rows
  /// Whether rows belong in host memory although devices could hold them.
  bool host_pays() const { return saved_ns > spent_ns; }
};

// For a box with a device:

/// Of a step, with rows in host memory.
double copying_rows_ns(const CostModel& cost, const RowOffload& offload);
RowPrice price_of_rows(const CostModel& cost, const RowOffload& offload);

/// "2.9 GiB for experts save 1.56 ms of a step, copying rows takes 0.31 ms"
///   host  where they are
std::string to_string(const RowPrice& price, bool host);

}  // namespace thermocline::sched
