#include "runtime/cli/bench_step_report.h"

#include <fmt/format.h>

#include <algorithm>

#include "runtime/cli/prediction.h"
#include "runtime/engine/machine_info.h"

namespace thermocline::cli {
namespace {

using TableRow = std::vector<std::string>;

// The first row is the heading; the first `left` columns stand to the left, the others to the right.
std::string markdown_table(const std::vector<TableRow>& rows, size_t left) {
  std::vector<size_t> widths(rows[0].size());
  for (const TableRow& row : rows)
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  std::string text;
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t i = 0; i < widths.size(); ++i)
      text +=
          i < left ? fmt::format("| {:<{}} ", rows[r][i], widths[i]) : fmt::format("| {:>{}} ", rows[r][i], widths[i]);
    text += "|\n";
    for (size_t i = 0; r == 0 && i < widths.size(); ++i)
      text += "| " + std::string(widths[i] - (i >= left), '-') + (i < left ? " " : ": ") +
              (i + 1 < widths.size() ? "" : "|\n");
  }
  return text;
}

std::string percent_text(double share) { return fmt::format("{:.0f} %", 100 * share); }

// How far the prediction is above what was measured, in percent.
double off_by(const StepRow& row, StepPart part) {
  return 100 * (row.predicted_tokens_per_second / row.tokens_per_second(part) - 1);
}

double share_of_pairs(int64_t pairs, int64_t all) {
  return all > 0 ? static_cast<double>(pairs) / static_cast<double>(all) : 0;
}

std::string tests_table(const Engine& engine, const StepBench& bench) {
  const bool predicted = bench.rows[0].predicted_tokens_per_second > 0, parted = bench.rows[0].parted();
  TableRow heading = {"numerics", "test", "t/s", "MB a token", "bound t/s", "share of bound"};
  if (parted) heading.insert(heading.end(), {"without head", "layers, ms", "head, ms", "head of MB"});
  if (predicted) heading.insert(heading.end(), {"predicted t/s", "off by"});
  std::vector<TableRow> table = {heading};
  for (const StepRow& row : bench.rows) {
    const double tokens = row.all_tokens();
    TableRow cells = {std::string(kNumericsNames[static_cast<int>(engine.options().numerics)]),
                      row.name(),
                      fmt::format("{:.2f}", row.tokens_per_second(bench.part)),
                      fmt::format("{:.2f}", (row.bytes_per_token(bench.part) + row.kv.bytes) / 1e6),
                      fmt::format("{:.2f}", row.bound_tokens_per_second(bench.part)),
                      percent_text(row.share_of_bound(bench.part))};
    if (parted)
      cells.insert(cells.end(), {percent_text(row.share_of_bound(StepPart::layers)),
                                 fmt::format("{:.3f}", 1e3 * row.middle().seconds_of(StepPart::layers) / tokens),
                                 fmt::format("{:.3f}", 1e3 * row.middle().head_seconds / tokens),
                                 percent_text(row.head_share_of_bytes())});
    if (predicted)
      cells.insert(cells.end(), {fmt::format("{:.2f}", row.predicted_tokens_per_second),
                                 fmt::format("{:+.0f} %", off_by(row, bench.part))});
    table.push_back(std::move(cells));
  }
  return markdown_table(table, 2);
}

std::string kinds_table(const StepBench& bench) {
  std::vector<TableRow> table = {{"test", "weights", "MB a token", "GB/s", "of STREAM"}};
  for (const StepRow& row : bench.rows)
    for (const KindRow& kind : kind_rows(row, bench.part))
      table.push_back({row.name(), kind.name(), fmt::format("{:.2f}", kind.bytes / 1e6),
                       fmt::format("{:.1f}", kind.rate() / 1e9), percent_text(kind.share_of_stream)});
  return table.size() > 1 ? markdown_table(table, 2) : "";
}

void print_notes(const StepBench& bench) {
  fmt::print(
      "\nmiddle of {}; bound: weight bytes at the STREAM-read rate, or multiplications at the peak, whichever takes "
      "longer\n",
      bench.repetitions);
  if (bench.rows[0].parted())
    fmt::print("layers, head: ms of a token, of all sequences together; layers: all but the head\n");
  if (bench.part == StepPart::layers)
    fmt::print("--layers-only: the head was computed; its time and bytes are left out of rates, bounds and shares\n");
  if (bench.rows[0].predicted_tokens_per_second > 0)
    fmt::print("predicted: by the cost model from the machine's profile, with uniform routing (docs/calibration.md)\n");
  for (const StepRow& row : bench.rows)
    if (const std::string line = forecast_line(row.forecast); !line.empty()) fmt::print("{}: {}\n", row.name(), line);
  if (std::any_of(bench.rows.begin(), bench.rows.end(), [](const StepRow& row) { return row.context > 0; }))
    fmt::print(
        "@N: rows of a context of N tokens are synthetic; the bound has on top what a token reads or multiplies of "
        "them\n");
}

void print_projections(const Engine& engine, const StepBench& bench) {
  if (!bench.whole || !bench.rows[0].parted()) return;
  for (const StepRow& row : bench.rows) {
    if (const std::string reason = not_projected(row, engine.geometry(), *bench.whole); !reason.empty()) {
      fmt::print("{}: no projection to {} layers: {}\n", row.name(), bench.whole->layers, reason);
      continue;
    }
    const DepthProjection p = project_row(row, bench.part, engine.geometry(), *bench.whole);
    const std::string caveat = p.caveat();
    fmt::print("{}: projection to {} layers: {} a token, {:.2f} t/s (projected, not measured{})\n", row.name(),
               p.layers, p.formula(), 1 / p.seconds(), caveat.empty() ? "" : "; " + caveat);
  }
}

void print_device(DeepseekV4GpuStep& step) {
  const DeepseekV4GpuStep::Counters& c = step.counters();
  for (const std::string& line : step.describe()) fmt::print("{}\n", line);
  fmt::print(
      "{:.0f} % of (token, expert) pairs on the CPU, {:.0f} % of layers without one; the bound is that of the CPU's "
      "bytes alone\n",
      100 * share_of_pairs(c.cpu_pairs, c.pairs), 100 * share_of_pairs(c.zero_miss_layers, c.layers));
}

Json kinds_json(const StepRow& row, StepPart part) {
  Json kinds = Json::array();
  for (const KindRow& kind : kind_rows(row, part))
    kinds.push_back({{"kind", kind.name()},
                     {"bytes_per_token", kind.bytes},
                     {"seconds", kind.seconds},
                     {"bytes_per_second", kind.rate()},
                     {"share_of_stream", kind.share_of_stream}});
  return kinds;
}

Json projection_json(const DepthProjection& p) {
  Json terms = Json::array();
  for (const DepthProjection::Term& term : p.terms)
    terms.push_back(
        {{"kind", term.kind}, {"layers", term.layers}, {"seconds", term.seconds}, {"measured", term.measured}});
  return {{"layers", p.layers},     {"formula", p.formula()},
          {"terms", terms},         {"head_seconds", p.head_seconds.value_or(0)},
          {"seconds", p.seconds()}, {"tokens_per_second", 1 / p.seconds()}};
}

Json forecast_json(const ForecastStats& forecast) {
  Json phases = Json::object();
  for (size_t i = 0; i < sched::kPhaseNames.size(); ++i)
    if (forecast.measured.phases[i] > 0)
      phases[sched::kPhaseNames[i]] = {{"ms", forecast.measured.phases[i] / 1e6},
                                       {"predicted_ms", forecast.predicted.phases[i] / 1e6}};
  return phases;
}

Json row_json(const StepRow& row, const ModelGeometry& geometry, const StepBench& bench) {
  Json json = {{"kind", row.kind},
               {"tokens", row.tokens},
               {"batch", row.batch},
               {"context", row.context},
               {"tokens_per_second", row.tokens_per_second(bench.part)},
               {"bytes_per_token", row.bytes_per_token(bench.part)},
               {"kv_bytes_per_token", row.kv.bytes},
               {"bound_tokens_per_second", row.bound_tokens_per_second(bench.part)},
               {"share_of_bound", row.share_of_bound(bench.part)},
               {"kinds", kinds_json(row, bench.part)},
               {"repetitions", row.samples.size()}};
  if (row.parted()) {
    json["layers_seconds"] = row.middle().seconds_of(StepPart::layers) / row.all_tokens();
    json["head_seconds"] = row.middle().head_seconds / row.all_tokens();
    json["head_share_of_bytes"] = row.head_share_of_bytes();
    json["share_of_bound_without_head"] = row.share_of_bound(StepPart::layers);
    if (bench.whole && not_projected(row, geometry, *bench.whole).empty())
      json["projection"] = projection_json(project_row(row, bench.part, geometry, *bench.whole));
  }
  if (row.predicted_tokens_per_second > 0) {
    json["predicted_tokens_per_second"] = row.predicted_tokens_per_second;
    json["predicted_off_by_percent"] = off_by(row, bench.part);
    json["steps"] = row.forecast.steps;
    json["phases"] = forecast_json(row.forecast);
  }
  return json;
}

}  // namespace

void print_step_bench(Engine& engine, const StepBench& bench) {
  for (const std::string& line : engine.weights().placement) fmt::print("{}\n", line);
  fmt::print("{}\nSTREAM read {:.1f} GB/s, multiply-add peak {:.0f} GFLOP/s, both measured between the rows\n\n{}",
             machine_line(machine_of(engine)), bench.peaks.read_bandwidth / 1e9, bench.peaks.flops / 1e9,
             tests_table(engine, bench));
  if (const std::string kinds = kinds_table(bench); !kinds.empty()) fmt::print("\n{}", kinds);
  print_notes(bench);
  print_projections(engine, bench);
  if (DeepseekV4GpuStep* const step = engine.gpu_step()) print_device(*step);
}

Json step_bench_json(Engine& engine, const std::string& model, const StepBench& bench) {
  Json results = Json::array();
  for (const StepRow& row : bench.rows) results.push_back(row_json(row, engine.geometry(), bench));
  Json document = {{"model", model},
                   {"numerics", kNumericsNames[static_cast<int>(engine.options().numerics)]},
                   {"machine", machine_json(machine_of(engine))},
                   {"weights", engine.weights().placement},
                   {"build", build_json()},
                   {"stream_read_bytes_per_second", bench.peaks.read_bandwidth},
                   {"peak_flops", bench.peaks.flops},
                   {"peak_resident_bytes", peak_resident_bytes()},
                   {"layers_only", bench.part == StepPart::layers},
                   {"results", results}};
  if (DeepseekV4GpuStep* const step = engine.gpu_step()) {
    const DeepseekV4GpuStep::Counters& c = step->counters();
    document["devices"] = step->describe();
    document["cpu_pair_share"] = share_of_pairs(c.cpu_pairs, c.pairs);
    document["zero_miss_layer_share"] = share_of_pairs(c.zero_miss_layers, c.layers);
  }
  return document;
}

}  // namespace thermocline::cli
