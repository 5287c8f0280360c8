// A simulated server: requests arrive, the production queue and step planner put steps together, a simulated box runs
// them. Source: spec/scheduler.md 3.1 and 3.5.
#pragma once

#include "scheduler/batch/step_planner.h"
#include "scheduler/sim/simulator.h"
#include "scheduler/trace/synthetic.h"

namespace thermocline::sched {

struct ServingOptions {
  SimOptions box;
  PlannerLimits limits;
  int requests = 32;
  int64_t prompt_tokens = 512, answer_tokens = 128;  // each; lengths vary by a third around them
  int clients = 0;                                   // each sends its next request when the last one is answered
  double requests_per_second = 0;                    // or Poisson arrivals, where clients is 0; 0: all at once
  int64_t kv_tokens = 1 << 20;
  SyntheticOptions routing;
};

struct ServingReport {
  std::vector<double> ttft_ms, tpot_ms;  // by request
  double seconds = 0;
  int64_t prompt_tokens = 0, answer_tokens = 0, preemptions = 0;
  SimReport box;
  double answer_tokens_per_second() const { return seconds > 0 ? static_cast<double>(answer_tokens) / seconds : 0; }
};

/// Errors: those of SimBox::create; invalid_argument for lengths that the KV cache cannot hold.
Result<ServingReport> simulate_serving(const CostModel& cost, const ServingOptions& options);

}  // namespace thermocline::sched
