#include "runtime/cli/prediction.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "runtime/cli/box.h"
#include "runtime/engine/model_costs.h"
#include "scheduler/cost/hit_curve.h"
#include "scheduler/plan/box_plan.h"

namespace thermocline::cli {
namespace {

double resident_share(Engine& engine) {
  DeepseekV4GpuStep* const step = engine.gpu_step();
  if (!step) return 0;
  double slots = 0;
  for (int i = 0; i < step->parts(); ++i) slots += static_cast<double>(step->part(i).slots().slots());
  const ModelGeometry& g = engine.geometry();
  return std::min(1.0, slots / (static_cast<double>(g.n_layers) * g.n_routed_experts));
}

}  // namespace

Prediction predict(Engine& engine, const sched::MachineProfile& machine, double prompt, double batch, double context) {
  const sched::ModelCosts costs = model_costs(engine.geometry(), engine.options().kv_dtype != KvDtype::bf16);
  sched::MachineProfile box = machine;
  if (!engine.gpu_step()) box.gpus.clear();
  const sched::CostModel cost(costs, box);
  const double resident = resident_share(engine), chunk = static_cast<double>(engine.options().max_chunk),
               steps = std::max(1.0, std::ceil(prompt / chunk)), tokens = std::max(1.0, prompt / steps);
  const sched::StepTime decode =
      cost.step({.tokens = batch, .context = context, .resident = resident, .hits = sched::expected_hits(resident)});
  const double prefill = sched::prefill_step_ns(cost, engine.options().gpu.prefill, tokens, prompt / 2, resident);
  return {.prefill = 1e9 * tokens / prefill, .decode = 1e9 * batch / decode.total};
}

sched::MachineProfile profile_of(Engine& engine, double stream_bytes_per_second) {
  sched::MachineProfile machine;
  machine.cpu = sched::cpu_profile({.cores = engine.pool().size(),
                                    .kernels = cpu_kernels(engine.kernels().isa),
                                    .read_bytes_per_second = sched::kStreamShare * stream_bytes_per_second});
  return machine;
}

std::string prediction_line(const Prediction& p) {
  return fmt::format("predicted: prefill {:.1f} t/s, decode {:.1f} t/s", p.prefill, p.decode);
}

std::string prediction_line(const Prediction& p, const Prediction& measured) {
  std::string shares;
  const auto add = [&](const char* what, double is, double should) {
    if (is > 0 && should > 0)
      shares += fmt::format("{}{} {:.0f} %", shares.empty() ? "; measured: " : ", ", what, 100 * is / should);
  };
  add("prefill", measured.prefill, p.prefill);
  add("decode", measured.decode, p.decode);
  return prediction_line(p) + shares + (shares.empty() ? "" : " of it");
}

std::string forecast_line(const ForecastStats& f) {
  if (f.steps == 0 || f.predicted.total <= 0) return "";
  std::vector<sched::Phase> phases;
  for (size_t i = 0; i < sched::kPhaseNames.size(); ++i)
    if (f.measured.phases[i] > 0 && f.predicted.phases[i] > 0) phases.push_back(static_cast<sched::Phase>(i));
  std::sort(phases.begin(), phases.end(),
            [&](sched::Phase a, sched::Phase b) { return f.measured[a] > f.measured[b]; });
  const auto ms = [&](double ns) { return ns / 1e6 / static_cast<double>(f.steps); };
  std::string line =
      fmt::format("a step took {:.1f} ms, {:.0f} % of predicted, {:.0f} as corrected", ms(f.measured.total),
                  100 * f.measured.total / f.predicted.total, 100 * f.measured.total / f.corrected_ns);
  const char* before = ": ";
  for (const sched::Phase phase : phases) {
    line += fmt::format("{}{} {:.1f} ms {:.0f} %", std::exchange(before, ", "),
                        sched::kPhaseNames[static_cast<size_t>(phase)], ms(f.measured[phase]),
                        100 * f.measured[phase] / f.predicted[phase]);
  }
  return line;
}

std::string expert_line(const ExpertTraffic& e) {
  if (e.pairs == 0) return "";
  const auto percent = [](int64_t part, int64_t whole) {
    return 100 * static_cast<double>(part) / static_cast<double>(std::max<int64_t>(1, whole));
  };
  std::string line =
      fmt::format("experts: {:.0f} % of {} choices in {} slots", percent(e.device_pairs, e.pairs), e.pairs, e.slots);
  if (e.fill_budget > 0) line += fmt::format(" ({} fills, {} a step at most)", e.fills, e.fill_budget);
  line += fmt::format(", {:.0f} % of layers without a miss", percent(e.zero_miss_layers, e.layers));
  if (e.staged > 0 || e.prefetch != "off")
    line += fmt::format("; read ahead: {}, {}, {:.0f} % of them whole, {:.0f} % needed", e.prefetch, e.staged,
                        percent(e.staged_whole, e.staged), percent(e.staged_right, e.staged));
  return line;
}

}  // namespace thermocline::cli
