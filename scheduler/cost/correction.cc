#include "scheduler/cost/correction.h"

#include <algorithm>
#include <cmath>

namespace thermocline::sched {

void Correction::observe(const StepTime& predicted, const StepTime& measured) {
  for (size_t i = 0; i < log_ratio_.size(); ++i) {
    if (!(predicted.phases[i] > 0) || !(measured.phases[i] > 0)) continue;
    const double now = std::log(measured.phases[i] / predicted.phases[i]);
    log_ratio_[i] += (seen_[i] ? kNew : 1) * (now - log_ratio_[i]);
    seen_[i] = true;
    off_[i] = std::abs(log_ratio_[i]) > kOff ? std::min(off_[i] + 1, kAlarmSteps) : 0;
  }
}

double Correction::ratio(Phase phase) const { return std::exp(log_ratio_[static_cast<size_t>(phase)]); }

double Correction::factor(Phase phase) const { return std::clamp(ratio(phase), kLeast, kMost); }

StepTime Correction::corrected(StepTime predicted) const {
  double sum = 0, corrected = 0;
  for (size_t i = 0; i < predicted.phases.size(); ++i) {
    sum += predicted.phases[i];
    predicted.phases[i] *= factor(static_cast<Phase>(i));
    corrected += predicted.phases[i];
  }
  if (sum > 0) predicted.total *= corrected / sum;
  return predicted;
}

}  // namespace thermocline::sched
