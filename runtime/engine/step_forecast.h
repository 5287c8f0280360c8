// StepForecast: what the cost model says of every step that runs, held against what it took.
#pragma once

#include "runtime/exec/step_executor.h"
#include "scheduler/cost/correction.h"
#include "scheduler/cost/cost_model.h"

namespace thermocline {

/// Of all steps so far. Phases that were not measured are 0 in both.
struct ForecastStats {
  int64_t steps = 0;  // 0: there is no profile of this machine to predict by
  sched::StepTime predicted = {}, measured = {};
  double corrected_ns = 0;                                  // the predictions as the steps before each corrected them
  std::array<double, sched::kPhaseNames.size()> factors{};  // of late, measured by predicted (sched::Correction)

  /// Of the steps since then.
  ForecastStats since(const ForecastStats& before) const;
};

class StepForecast final : public StepExecutor::Recorder {
 public:
  StepForecast(sched::ModelCosts model, sched::MachineProfile machine);

  void stepped(const StepInput& input, const StepReport& report) override;
  const ForecastStats& stats() const { return stats_; }

 private:
  const sched::ModelCosts model_;
  const sched::MachineProfile machine_;
  const sched::CostModel cost_;
  sched::Correction correction_;
  std::vector<sched::StepPart> parts_;
  ForecastStats stats_;
  bool warned_ = false;
};

}  // namespace thermocline
