#include "scheduler/kv/residency.h"

#include <cmath>

namespace thermocline::sched {

// A byte of an expert is read once a step if any of the step's tokens goes there.
double saved_by_experts_ns(const RowOffload& o) {
  if (o.routed_experts == 0) return 0;
  const double share = static_cast<double>(o.active_experts) / static_cast<double>(o.routed_experts);
  const double active = 1 - std::pow(1 - share, static_cast<double>(o.sequences));
  return static_cast<double>(o.freed_bytes) * active / o.cpu_bytes_per_ns;
}

double spent_on_rows_ns(const RowOffload& o) {
  const double bytes = o.miss_rate * static_cast<double>(o.sequences * o.topk * o.row_bytes);
  return static_cast<double>(o.csa_layers) * (o.gather_ns + bytes / o.pcie_bytes_per_ns);
}

}  // namespace thermocline::sched
