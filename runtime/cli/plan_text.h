// What `thermocline plan` found, as text and as data.
#pragma once

#include "runtime/cli/box.h"
#include "runtime/io/json_document.h"
#include "scheduler/plan/what_if.h"

namespace thermocline::cli {

struct PlanReport {
  std::string model;  // as the user named it
  Box box;
  sched::BoxQuestion question;
  sched::BoxPlan plan;
  std::vector<sched::WhatIf> what_ifs;
  std::string not_computed;  // the architecture, where this version cannot run it; empty: it can
  std::string serve;         // the command line; empty where it does not fit or is not computed
};

/// What is asked of the planner; of hardware, nothing is this box.
struct PlanRequest {
  std::string model;
  int64_t context = 0;  // 0: 32k, or the model's limit
  int batch = 8;
  HardwareFlags hardware = {};
};
/// Errors: those of planned_model and box_of; invalid_argument for numbers out of range.
Result<PlanReport> make_plan(const PlanRequest& request);

std::string plan_text(const PlanReport& report);
Json plan_json(const PlanReport& report);

}  // namespace thermocline::cli
