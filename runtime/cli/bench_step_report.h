// What `bench step` says of its tests: tables, lines and JSON.
#pragma once

#include "runtime/cli/bench_step_rows.h"
#include "runtime/engine/engine.h"
#include "runtime/io/json_document.h"

namespace thermocline::cli {

struct StepBench {
  std::vector<StepRow> rows = {};
  Peaks peaks = {};                      // the highest of all repetitions
  StepPart part = StepPart::whole;       // that rates and bounds are of
  std::optional<WholeModel> whole = {};  // that a slice's rows are projected to
  int repetitions = 0;
};

void print_step_bench(Engine& engine, const StepBench& bench);
Json step_bench_json(Engine& engine, const std::string& model, const StepBench& bench);

}  // namespace thermocline::cli
