#include "runtime/engine/step_forecast.h"

#include "runtime/base/log.h"

namespace thermocline {
namespace {

constexpr double kWorthSaying = 0.1;  // of a step: less is nobody's trouble

}  // namespace

StepForecast::StepForecast(sched::ModelCosts model, sched::MachineProfile machine)
    : model_(std::move(model)), machine_(std::move(machine)), cost_(model_, machine_) {
  stats_.factors.fill(1);
}

ForecastStats ForecastStats::since(const ForecastStats& before) const {
  ForecastStats later = *this;
  later.steps -= before.steps;
  later.corrected_ns -= before.corrected_ns;
  for (const auto& [time, gone] :
       {std::pair(&later.predicted, &before.predicted), {&later.measured, &before.measured}}) {
    time->total -= gone->total;
    for (size_t i = 0; i < time->phases.size(); ++i) time->phases[i] -= gone->phases[i];
  }
  return later;
}

void StepForecast::stepped(const StepInput& input, const StepReport& report) {
  parts_.clear();
  for (const sched::Segment& segment : input.batch.segments) {
    const auto tokens = static_cast<double>(segment.num_tokens);
    parts_.push_back({.tokens = tokens,
                      .prefill = segment.num_tokens > 1,
                      .context = static_cast<double>(segment.first_pos) + tokens / 2});
  }
  const StepExperts& e = report.experts;
  const auto a_layer = [&](int64_t n) { return static_cast<double>(n) / static_cast<double>(e.layers); };
  const sched::StepTime predicted = cost_.step(parts_,
                                               {.here = a_layer(e.experts - e.cpu_experts),
                                                .here_pairs = a_layer(e.pairs - e.cpu_pairs),
                                                .missed = a_layer(e.cpu_experts),
                                                .missed_pairs = a_layer(e.cpu_pairs),
                                                .layers_with_miss = a_layer(e.layers_with_miss)},
                                               static_cast<double>(report.logit_rows));
  stats_.corrected_ns += correction_.corrected(predicted).total;
  correction_.observe(predicted, report.time);
  ++stats_.steps;
  stats_.predicted.total += predicted.total;
  stats_.measured.total += report.time.total;
  for (size_t i = 0; i < stats_.factors.size(); ++i) {
    const auto phase = static_cast<sched::Phase>(i);
    stats_.factors[i] = correction_.factor(phase);
    if (!(report.time[phase] > 0)) continue;
    stats_.predicted[phase] += predicted[phase];
    stats_.measured[phase] += report.time[phase];
    if (!correction_.alarmed(phase) || warned_ || report.time[phase] < kWorthSaying * report.time.total) continue;
    warned_ = true;
    log_warn(
        "{} has taken {:.0f} % of what was predicted for {} steps: a hot CPU, another program, or a profile of other "
        "times (thermocline doctor, thermocline calibrate)",
        sched::kPhaseNames[i], 100 * correction_.ratio(phase), sched::Correction::kAlarmSteps);
  }
}

}  // namespace thermocline
