#include "runtime/cli/bench_step_rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

namespace thermocline::cli {
namespace {

const cpu::KindTraffic& head_of(const cpu::TrafficByKind& kinds) {
  return kinds[static_cast<size_t>(cpu::WeightKind::head)];
}

template <class Fn>
double median_over(const std::vector<StepSample>& samples, const Fn& fn) {
  std::vector<double> values;
  for (const StepSample& sample : samples) values.push_back(fn(sample));
  return median(std::move(values));
}

}  // namespace

void StepSample::add(const StepReport& report, const cpu::WeightTraffic& traffic) {
  head_seconds += report.time[sched::Phase::head] / 1e9;
  layer_seconds.resize(report.layer_ns.size());
  for (size_t layer = 0; layer < layer_seconds.size(); ++layer) layer_seconds[layer] += report.layer_ns[layer] / 1e9;
  for (size_t kind = 0; kind < kinds.size(); ++kind) {
    kinds[kind].bytes += traffic.kinds()[kind].bytes;
    kinds[kind].seconds += traffic.kinds()[kind].seconds;
  }
}

double StepSample::bytes_of(StepPart part) const {
  uint64_t sum = 0;
  for (const cpu::KindTraffic& kind : kinds) sum += kind.bytes;
  return static_cast<double>(part == StepPart::whole ? sum : sum - head_of(kinds).bytes);
}

std::vector<double> StepSample::whole_layer_seconds() const {
  std::vector<double> whole = layer_seconds;
  const double timed = std::accumulate(whole.begin(), whole.end(), 0.0);
  for (double& layer : whole) layer *= seconds_of(StepPart::layers) / timed;
  return whole;
}

double KvNeed::seconds(const Peaks& peaks) const {
  return std::max(bytes / peaks.read_bandwidth, flops / peaks.flops + int8_ops / peaks.int8_ops);
}

std::string StepRow::name() const {
  return (prefill() ? "pp" : "tg") + std::to_string(tokens) + (batch > 1 ? " x" + std::to_string(batch) : "") +
         (context > 0 ? " @" + std::to_string(context) : "");
}

const StepSample& StepRow::middle() const {
  std::vector<const StepSample*> sorted;
  for (const StepSample& sample : samples) sorted.push_back(&sample);
  std::sort(sorted.begin(), sorted.end(), [](const auto* a, const auto* b) { return a->seconds < b->seconds; });
  return *sorted.at(sorted.size() / 2);
}

double StepRow::head_share_of_bytes() const {
  return 1 - bytes_per_token(StepPart::layers) / bytes_per_token(StepPart::whole);
}

// Layers wait for their attention: what a long context takes comes on top.
double StepRow::bound_seconds(const StepSample& sample, StepPart part) const {
  const double flops = 2 * (part == StepPart::whole ? macs : macs - head_macs);
  return std::max(sample.bytes_of(part) / sample.peaks.read_bandwidth, flops / sample.peaks.flops) +
         all_tokens() * kv.seconds(sample.peaks);
}

double StepRow::bound_tokens_per_second(StepPart part) const {
  return median_over(samples, [&](const StepSample& sample) {
    const double seconds = bound_seconds(sample, part);
    return seconds > 0 ? all_tokens() / seconds : 0;
  });
}

double StepRow::share_of_bound(StepPart part) const {
  return median_over(samples,
                     [&](const StepSample& sample) { return bound_seconds(sample, part) / sample.seconds_of(part); });
}

std::vector<KindRow> kind_rows(const StepRow& row, StepPart part) {
  const StepSample& sample = row.middle();
  std::vector<KindRow> rows;
  for (size_t i = 0; i < sample.kinds.size(); ++i) {
    const cpu::KindTraffic& read = sample.kinds[i];
    const auto kind = static_cast<cpu::WeightKind>(i);
    if (read.bytes == 0 || (part == StepPart::layers && kind == cpu::WeightKind::head)) continue;
    KindRow& out = rows.emplace_back(
        KindRow{kind, static_cast<double>(read.bytes) / row.all_tokens(), read.seconds / row.all_tokens()});
    out.share_of_stream = out.rate() / sample.peaks.read_bandwidth;
  }
  return rows;
}

std::string not_projected(const StepRow& row, const ModelGeometry& slice, const WholeModel& whole) {
  if (row.step_tokens == 1 || whole.routed_experts <= slice.n_routed_experts) return "";
  return fmt::format("{} tokens a step choose among {} experts a layer, not {}", row.step_tokens,
                     slice.n_routed_experts, whole.routed_experts);
}

DepthProjection project_row(const StepRow& row, StepPart part, const ModelGeometry& slice, const WholeModel& whole) {
  const StepSample& sample = row.middle();
  std::vector<double> layers = sample.whole_layer_seconds();
  for (double& layer : layers) layer /= row.all_tokens();
  return project_depth(slice, layers,
                       part == StepPart::whole ? std::optional(sample.head_seconds / row.all_tokens()) : std::nullopt,
                       whole);
}

}  // namespace thermocline::cli
