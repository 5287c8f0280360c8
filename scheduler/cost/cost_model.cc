#include "scheduler/cost/cost_model.h"

#include <algorithm>
#include <cmath>

namespace thermocline::sched {
namespace {

// Kernels of a device by parallel regions of the CPU: norms, roundings and scatters are launches of their own there.
constexpr double kKernelsPerRegion = 4;
// Of a disk, assumed: what it reads for a row, and how long the first one of a step takes.
constexpr double kDiskPageBytes = 4096, kDiskLatencyNs = 100'000;

// Different experts among those of one side that `tokens` tokens touch, when they find `share` of their pairs there.
double unique_of(double experts, double pairs_a_token, double tokens) {
  if (experts <= 0 || pairs_a_token <= 0) return 0;
  return experts * (1 - std::pow(1 - std::min(1.0, pairs_a_token / experts), tokens));
}

}  // namespace

Phase StepTime::bottleneck() const {
  Phase worst = Phase::dense;
  for (size_t i = 0; i < phases.size(); ++i)
    if (phases[i] > (*this)[worst]) worst = static_cast<Phase>(i);
  return worst;
}

double CostModel::dense_ns(int layer, double tokens) const {
  const LayerCosts& l = m_.layers[static_cast<size_t>(layer)];
  const std::array<KernelCurve, 3>& curves = on_device() ? box_.gpus[0].weights : box_.cpu.weights;
  double ns = on_device() ? l.regions * kKernelsPerRegion * box_.gpus[0].kernel_ns
                          : l.regions * box_.cpu.region_ns + l.stream_elements * box_.cpu.streams.ns(tokens) +
                                l.row_elements * box_.cpu.rows.ns(tokens);
  for (size_t f = 0; f < l.dense_bytes.size(); ++f)
    if (l.dense_bytes[f] > 0) ns += l.dense_bytes[f] * curves[f].ns_per_byte(tokens);
  return ns;
}

double CostModel::shared_ns(int layer, double tokens) const {
  const LayerCosts& l = m_.layers[static_cast<size_t>(layer)];
  return l.shared_bytes * weights(on_device() ? box_.gpus[0].weights : box_.cpu.weights, l.shared_format, tokens);
}

double CostModel::attention_ns(int layer, double tokens, double context, bool together) const {
  const LayerCosts& l = m_.layers[static_cast<size_t>(layer)];
  const int64_t head_dim = together && l.prefill_head_dim > 0 ? l.prefill_head_dim : l.head_dim;
  const double rows = tokens * l.rows(context), flops = 4 * rows * static_cast<double>(l.heads * head_dim);
  if (!on_device()) return 1e9 * flops / (together ? box_.cpu.attention_flops_many : box_.cpu.attention_flops_one);
  const GpuProfile& gpu = box_.gpus[0];
  return 1e9 * std::max(flops / gpu.attention_flops, together ? 0 : rows * l.row_bytes / gpu.bytes_per_second);
}

double CostModel::index_ns(int layer, double tokens, double context, bool together) const {
  const LayerCosts& l = m_.layers[static_cast<size_t>(layer)];
  const double keys = tokens * l.keys(context), ops = 2 * keys * static_cast<double>(l.index_heads * l.index_dim);
  if (!on_device()) return 1e9 * ops / (together ? box_.cpu.index_ops_many : box_.cpu.index_ops_one);
  const GpuProfile& gpu = box_.gpus[0];
  return 1e9 * std::max(ops / gpu.index_ops, together ? 0 : keys * l.key_bytes / gpu.bytes_per_second);
}

double CostModel::expert_gpu_ns(double n) const {
  return m_.expert_bytes * weights(box_.gpus[0].weights, m_.expert_format, n);
}

double CostModel::h2d_ns() const {
  return box_.gpus[0].h2d_ns + 1e9 * m_.expert_bytes / box_.gpus[0].h2d_bytes_per_second;
}

double CostModel::head_ns(double rows) const {
  const auto& curves = on_device() ? box_.gpus[0].weights : box_.cpu.weights;
  return rows > 0 ? m_.head_bytes * weights(curves, m_.head_format, rows) : 0;
}

double CostModel::table_ns(double tokens) const {
  const double rate = box_.disk.read_bytes_per_second;
  if (m_.table_bytes <= 0 || rate <= 0) return 0;
  return kDiskLatencyNs + 1e9 * tokens * m_.table_reads_per_token * kDiskPageBytes / rate;
}

ExpertLoad CostModel::expected_load(double n, double resident, double hits) const {
  const double k = m_.experts_per_token;
  if (!on_device()) resident = hits = 0;
  return {.here = unique_of(m_.experts * resident, k * hits, n),
          .here_pairs = n * k * hits,
          .missed = unique_of(m_.experts * (1 - resident), k * (1 - hits), n),
          .missed_pairs = n * k * (1 - hits),
          .layers_with_miss = 1 - std::pow(hits, k * n)};
}

StepTime CostModel::step(std::span<const StepPart> parts, const ExpertLoad& load, double logit_rows) const {
  double n = 0;
  for (const StepPart& part : parts) n += part.tokens;
  // Experts have pairs / unique tokens on average; a curve is flat at few of them, so the average stands for all.
  const double gpu_ns = load.here > 0 ? load.here * expert_gpu_ns(load.here_pairs / load.here) : 0,
               cpu_ns = load.missed > 0 ? load.missed * expert_cpu_ns(load.missed_pairs / load.missed) : 0;
  StepTime t;
  for (int layer = 0; layer < m_.layer_count(); ++layer) {
    const double dense = dense_ns(layer, n), shared = on_device() ? 0 : shared_ns(layer, n);
    double attention = 0, index = 0;
    for (const StepPart& part : parts) {
      attention += attention_ns(layer, part.tokens, part.context, part.prefill);
      index += index_ns(layer, part.tokens, part.context, part.prefill);
    }
    t[Phase::dense] += dense - shared;
    t[Phase::attention] += attention;
    t[Phase::index] += index;
    t[Phase::experts_cpu] += shared;
    t.total += dense + attention + index;
    if (!m_.layers[static_cast<size_t>(layer)].routed) continue;
    const double handover = on_device() ? load.layers_with_miss * handover_ns() : 0;
    t[Phase::experts_gpu] += gpu_ns;
    t[Phase::experts_cpu] += cpu_ns;
    t[Phase::handover] += handover;
    t.total += std::max(gpu_ns, cpu_ns) + handover;
  }
  t[Phase::head] = head_ns(logit_rows);
  t.total += t[Phase::head];
  return t;
}

StepTime CostModel::step(const StepQuestion& q) const {
  const StepPart part{q.tokens, q.prefill, q.context};
  StepTime t = step({&part, 1}, expected_load(q.tokens, q.resident, q.hits), q.prefill ? 1 : q.tokens);
  t[Phase::table] = q.table_on_disk ? table_ns(q.tokens) : 0;
  t.total += t[Phase::table];
  return t;
}

}  // namespace thermocline::sched
