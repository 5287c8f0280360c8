// Where the CSA rows of a KV cache should be: on the device, or in host memory with copies of the rows in use there.
// Pure: bytes and speeds in, a decision out. Source: spec of the scheduler, 2.11.
#pragma once

#include <cstdint>

namespace thermocline::sched {

struct RowOffload {
  int64_t freed_bytes = 0;  // of the device: all CSA rows, less the copies
  int64_t sequences = 1;    // in a step
  // The model.
  int64_t csa_layers = 0, topk = 0, row_bytes = 0;
  int64_t routed_experts = 0, active_experts = 0;
  // The machine; until it is measured, those of a modest server.
  double cpu_bytes_per_ns = 100;  // at which the CPU reads experts
  double pcie_bytes_per_ns = 25;
  double gather_ns = 10'000;  // of a layer that copies rows, however few
  double miss_rate = 0.1;     // of selected rows: most were selected for the token before
};

/// Nanoseconds of a step that experts in the freed bytes save, by uniform routing: skew saves more.
double saved_by_experts_ns(const RowOffload& o);
/// Nanoseconds of a step that go into copying rows.
double spent_on_rows_ns(const RowOffload& o);
/// Whether rows belong in host memory although the device could hold them.
inline bool offload_pays(const RowOffload& o) { return saved_by_experts_ns(o) > spent_on_rows_ns(o); }

}  // namespace thermocline::sched
