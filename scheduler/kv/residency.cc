#include "scheduler/kv/residency.h"

#include <fmt/format.h>

#include <algorithm>

#include "scheduler/cost/hit_curve.h"

namespace thermocline::sched {
namespace {

double decode_ns(const CostModel& cost, double sequences, double resident) {
  return cost.step({.tokens = sequences, .resident = resident, .hits = expected_hits(resident)}).total;
}

}  // namespace

// Only CSA layers select rows.
double copying_rows_ns(const CostModel& cost, const RowOffload& o) {
  double ns = 0;
  for (const LayerCosts& l : cost.model().layers) {
    if (!l.selects()) continue;
    const double bytes = o.miss_rate * o.sequences * static_cast<double>(l.topk) * l.row_bytes;
    ns += o.gather_ns + 1e9 * bytes / cost.machine().gpus[0].h2d_bytes_per_second;
  }
  return ns;
}

RowPrice price_of_rows(const CostModel& cost, const RowOffload& o) {
  RowPrice price{.freed_bytes = o.freed_bytes, .spent_ns = copying_rows_ns(cost, o)};
  if (cost.model().routed_bytes() <= 0) return price;  // nobody else wants the bytes
  const double more = std::min(1.0, o.resident + o.freed_bytes / cost.model().routed_bytes());
  price.saved_ns = decode_ns(cost, o.sequences, o.resident) - decode_ns(cost, o.sequences, more);
  return price;
}

std::string to_string(const RowPrice& p, bool host) {
  const double gib = p.freed_bytes / (1 << 30), saved = p.saved_ns / 1e6, spent = p.spent_ns / 1e6;
  return host ? fmt::format("{:.1f} GiB for experts save {:.2f} ms of a step, copying rows takes {:.2f} ms", gib, saved,
                            spent)
              : fmt::format("{:.1f} GiB for experts would save {:.2f} ms of a step, copying rows would take {:.2f} ms",
                            gib, saved, spent);
}

}  // namespace thermocline::sched
