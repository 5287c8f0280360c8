// What the commands around the simulator share: traces from files, boxes to simulate, one table of policies.
#pragma once

#include <string>
#include <vector>

#include "runtime/cli/html_page.h"
#include "runtime/io/json_document.h"
#include "scheduler/sim/simulator.h"

namespace thermocline::cli {

/// A trace file, or CSV (trace_csv.h). Errors: those of the parsers; invalid_argument without a token; not_found; io.
Result<sched::Trace> read_trace(const std::string& file);

/// How often tokens [begin, end) use each expert, [layers, experts].
std::vector<float> uses_of(const sched::Trace& trace, int64_t begin, int64_t end);

/// Costs of a model with the sizes of a trace's, and V4-Flash's experts: for hits and fills alone.
sched::ModelCosts costs_like(const sched::TraceHeader& header);

/// Every policy of `names` with every share of the experts in slots, over the second half of the trace; the first half
/// warms up, and is the profile. Errors: invalid_argument.
Result<std::vector<sched::SimReport>> simulate_policies(const sched::CostModel& cost, const sched::Trace& trace,
                                                        const std::vector<std::string>& names, double share,
                                                        const sched::SimOptions& options);

std::string sim_table_head();
std::string sim_table_row(const std::string& what, const sched::SimReport& report);
Json sim_json(const sched::SimReport& report);
/// Its recorded steps.
TimelinePlot timeline_of(const sched::SimReport& report);

}  // namespace thermocline::cli
