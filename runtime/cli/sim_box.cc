#include "runtime/cli/sim_box.h"

#include <fmt/format.h>

#include <algorithm>

#include "runtime/io/file.h"
#include "scheduler/trace/trace_csv.h"

namespace thermocline::cli {

Result<sched::Trace> read_trace(const std::string& file) {
  TC_ASSIGN(const std::string bytes, read_text_file(file));
  Result<sched::Trace> trace =
      bytes.starts_with(sched::kTraceCsvHead) ? sched::parse_trace_csv(bytes) : sched::parse_trace(bytes);
  if (!trace) return std::move(trace).error().with(file);
  if (trace->size() == 0) return invalid(file + " has no whole token in it");
  return trace;
}

std::vector<float> uses_of(const sched::Trace& trace, int64_t begin, int64_t end) {
  const sched::TraceHeader& h = trace.header();
  std::vector<float> uses(static_cast<size_t>(h.layers) * static_cast<size_t>(h.experts));
  for (int64_t i = begin; i < end; ++i)
    for (int layer = 0; layer < h.layers; ++layer)
      for (const sched::TracePick& pick : trace.picks(i, layer))
        ++uses[static_cast<size_t>(layer * h.experts) + pick.expert];
  return uses;
}

sched::ModelCosts costs_like(const sched::TraceHeader& h) {
  sched::ModelCosts costs;
  costs.name = h.model;
  costs.experts = h.experts;
  costs.experts_per_token = h.top_k;
  costs.expert_bytes = 13.37e6;
  costs.layers.resize(static_cast<size_t>(h.layers));
  for (sched::LayerCosts& layer : costs.layers) layer.dense_bytes = {60e6, 95e6, 0};
  return costs;
}

Result<std::vector<sched::SimReport>> simulate_policies(const sched::CostModel& cost, const sched::Trace& trace,
                                                        const std::vector<std::string>& names, double share,
                                                        const sched::SimOptions& base) {
  if (!(share >= 0 && share <= 1)) return invalid(fmt::format("a share of {} of the experts is outside 0..1", share));
  std::vector<sched::SimReport> reports;
  const int64_t half = trace.size() / 2;
  for (const std::string& name : names) {
    sched::SimOptions options = base;
    options.policy = name;
    options.slots = static_cast<int>(share * cost.model().experts * cost.model().routed_layer_count());
    options.profile = uses_of(trace, 0, half);
    options.measure_from = half;
    TC_ASSIGN(sched::SimReport report, simulate(cost, trace, options));
    reports.push_back(std::move(report));
  }
  return reports;
}

std::string sim_table_head() {
  return fmt::format(
      "| {:<26} | {:<9} | {:>7} | {:>7} | {:>7} | {:>6} | {:>6} | {:>6} | {:>11} | {:>5} | {:>7} |\n"
      "| {:-<26} | {:-<9} | {:->6}: | {:->6}: | {:->6}: | {:->5}: | {:->5}: | {:->5}: | {:->10}: | {:->4}: | {:->6}: "
      "|\n",
      "trace", "policy", "ms/step", "p95", "tok/s", "hits", "fills", "useful", "GPU/CPU/bus", "both", "J/token", "", "",
      "", "", "", "", "", "", "", "", "");
}

std::string sim_table_row(const std::string& what, const sched::SimReport& r) {
  const auto busy = [&](sched::Engine engine) { return 100 * r.busy_ns[static_cast<size_t>(engine)] / r.total_ns; };
  return fmt::format(
      "| {:<26} | {:<9} | {:7.3f} | {:7.3f} | {:7.1f} | {:4.1f} % | {:6.2f} | {:4.0f} % | {:3.0f}/{:3.0f}/{:3.0f} | "
      "{:3.0f} % | {:7.2f} |\n",
      what, r.policy, r.total_ns / 1e6 / static_cast<double>(r.steps), r.step_ms(95), r.tokens_per_second(),
      100 * r.hit_rate(), r.fills_per_token(), r.ended_fills > 0 ? 100 * r.useful_fills / r.ended_fills : 100,
      busy(sched::Engine::gpu), busy(sched::Engine::cpu), busy(sched::Engine::h2d), 100 * r.overlap_ns / r.total_ns,
      r.joules_per_token());
}

Json sim_json(const sched::SimReport& r) {
  Json json{{"policy", r.policy},
            {"tokens", r.tokens},
            {"steps", r.steps},
            {"ms_per_step", r.total_ns / 1e6 / static_cast<double>(r.steps)},
            {"step_ms", {{"p50", r.step_ms(50)}, {"p95", r.step_ms(95)}, {"p99", r.step_ms(99)}}},
            {"tokens_per_second", r.tokens_per_second()},
            {"hit_rate", r.hit_rate()},
            {"fills_per_token", r.fills_per_token()},
            {"useful_fill_share", r.ended_fills > 0 ? r.useful_fills / r.ended_fills : 1},
            {"zero_miss_layer_share", r.zero_miss_layers / r.layers},
            {"slack",
             {{"mean_us", r.slack_ns / 1e3},
              {"cpu_critical_share", r.cpu_critical},
              {"saved_by_one_more_us", r.saved_by_one_more_ns / 1e3},
              {"missing_experts", r.missing}}},
            {"overlap_share", r.overlap_ns / r.total_ns},
            {"staged_experts", r.staged},
            {"staged_right_share", r.staged > 0 ? r.staged_right / r.staged : 0},
            {"read_ahead_experts", r.read_ahead},
            {"read_ahead_right_share", r.read_ahead > 0 ? r.read_ahead_right / r.read_ahead : 0},
            {"staging", r.staging_verdict == sched::Referee::State::on    ? "on"
                        : r.staging_verdict == sched::Referee::State::off ? "off"
                                                                          : "testing"},
            {"bytes", {{"cpu", r.cpu_bytes}, {"gpu", r.gpu_bytes}, {"bus", r.bus_bytes}, {"disk", r.disk_bytes}}},
            {"joules_per_token", r.joules_per_token()}};
  for (size_t i = 0; i < sched::kEngineNames.size(); ++i)
    json["busy_share"][sched::kEngineNames[i]] = r.busy_ns[i] / r.total_ns;
  return json;
}

TimelinePlot timeline_of(const sched::SimReport& r) {
  TimelinePlot plot{"One step, engine by engine (" + r.policy + ")", {}, {}};
  plot.rows.assign(sched::kEngineNames.begin(), sched::kEngineNames.end());
  double first = INFINITY;
  for (const sched::SimSpan& span : r.spans) first = std::min(first, span.begin_ns);
  for (const sched::SimSpan& span : r.spans)
    plot.bars.push_back({static_cast<size_t>(span.engine), (span.begin_ns - first) / 1e6, (span.end_ns - first) / 1e6,
                         std::string(span.what)});
  return plot;
}

}  // namespace thermocline::cli
