// What the cost model says of a loaded model on this box, to be held against what it then does.
#pragma once

#include <string>

#include "runtime/engine/engine.h"
#include "scheduler/cost/machine_profile.h"

namespace thermocline::cli {

/// Tokens a second, of all sequences together.
struct Prediction {
  double prefill = 0, decode = 0;
};

/// A prompt of `prompt` tokens alone; then a token of each of `batch` sequences a step, behind `context` tokens. With
/// devices: with what is resident on them, hits as sched::expected_hits.
Prediction predict(Engine& engine, const sched::MachineProfile& machine, double prompt, double batch, double context);

/// This box by a STREAM read that was measured, in bytes a second, for an engine without devices.
sched::MachineProfile profile_of(Engine& engine, double stream_bytes_per_second);

/// "predicted: prefill 812 t/s, decode 7.7 t/s"
std::string prediction_line(const Prediction& prediction);
/// The same and "; measured: prefill 93 %, decode 104 % of it". What was not measured is 0, and left out.
std::string prediction_line(const Prediction& prediction, const Prediction& measured);

/// "a step took 72.1 ms, 97 % of predicted, 100 as corrected: experts (CPU) 41.0 ms 95 %, dense ..", the longest first;
/// empty where nothing was predicted.
std::string forecast_line(const ForecastStats& forecast);

/// "experts: 37 % of 1,204 choices in 96 slots (12 fills, 16 a step at most), 8 % of layers without a miss; read ahead:
/// testing, 310, 84 % of them whole, 71 % needed"; empty without a device.
std::string expert_line(const ExpertTraffic& experts);

}  // namespace thermocline::cli
