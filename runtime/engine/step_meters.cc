#include "runtime/engine/step_meters.h"

#include <cmath>

namespace thermocline {
namespace {

constexpr std::chrono::milliseconds kLookEvery{200};
constexpr double kMostAge = 900;  // half-lives, fifteen hours: 2^900 is still a number, and so is the sum of many

template <class T>
void add(std::atomic<T>& to, T what) {
  to.store(to.load(std::memory_order_relaxed) + what, std::memory_order_relaxed);  // one thread writes
}

}  // namespace

StepMeters::StepMeters(const StepExecutor& step, const WorkerPool& pool, const ModelGeometry& geometry,
                       sched::ModelCosts costs, bool kv_on_host)
    : step_(step),
      pool_(pool),
      geometry_(geometry),
      costs_(std::move(costs)),
      tokens_(static_cast<size_t>(geometry.n_layers) * static_cast<size_t>(geometry.n_routed_experts)),
      recent_(tokens_.size()),
      on_device_(tokens_.size()) {
  measures_.kv_on_host = kv_on_host;
  measures_.nodes = std::min(pool.nodes(), static_cast<int>(RateCounts::kMostNodes));
}

void StepMeters::stepped(const StepInput& input, const StepReport& report) {
  measures_.seconds.add(kStepSeconds, report.time.total / 1e9);
  for (size_t i = 0; i < measures_.phases.size(); ++i)
    if (report.time.phases[i] > 0) measures_.phases[i].add(kStepSeconds, report.time.phases[i] / 1e9);
  measures_.tokens.add(kStepTokens, static_cast<double>(report.tokens));
  measures_.weight_bytes += report.weight_bytes;
  count_traffic();
  if (measures_.kv_on_host) count_rows(input.batch);
  const auto& segments = input.batch.segments;
  count_experts(report, std::any_of(segments.begin(), segments.end(), [](const auto& s) { return s.num_tokens > 1; }));
  if (std::chrono::steady_clock::now() - looked_ >= kLookEvery) look_at_slots();
}

void StepMeters::count_traffic() {
  const cpu::WeightTraffic& traffic = step_.traffic();
  measures_.weight_seconds += traffic.seconds();
  for (int worker = 0; worker < pool_.size(); ++worker)
    for (int node = 0; node < measures_.nodes; ++node) {
      const uint64_t bytes = traffic.bytes(worker, node);
      measures_.node_bytes[static_cast<size_t>(node)] += bytes;
      if (pool_.team(worker).node != node) measures_.remote_bytes += bytes;
    }
}

// A token of an answer reads its rows and keys; the tokens of a chunk share one reading of theirs.
void StepMeters::count_rows(const sched::Batch& batch) {
  double bytes = 0;
  for (const sched::Segment& segment : batch.segments) {
    const auto context = static_cast<double>(segment.first_pos + segment.num_tokens);
    for (const sched::LayerCosts& layer : costs_.layers)
      bytes += layer.rows(context) * layer.row_bytes + layer.keys(context) * layer.key_bytes;
  }
  measures_.kv_bytes += static_cast<uint64_t>(bytes);
}

// Hash layers route by token id and come first.
size_t StepMeters::group_of(int layer) const {
  if (geometry_.is_hash_layer(layer)) return 0;
  const int rest = geometry_.n_layers - geometry_.n_hash_layers, at = layer - geometry_.n_hash_layers;
  return 1 + static_cast<size_t>(at * 3 / rest);
}

void StepMeters::count_experts(const StepReport& report, bool prefill) {
  const RoutedExperts& routed = report.routed;
  if (routed.ids.empty()) return;
  const double weight = weight_of_now();
  const int64_t pairs = routed.tokens * routed.top_k;
  for (int layer = 0; layer < geometry_.n_layers; ++layer) {
    const size_t at = static_cast<size_t>(layer), first = at * static_cast<size_t>(geometry_.n_routed_experts);
    for (int64_t i = 0; i < pairs; ++i) {
      const size_t expert = first + static_cast<size_t>(routed.ids[at][i]);
      add(tokens_[expert], uint64_t{1});
      add(recent_[expert], weight);
    }
    const int64_t cpu = report.cpu_pairs.empty() ? pairs : report.cpu_pairs[at];
    auto& by_place = measures_.experts.pairs;
    by_place[0][prefill ? 0 : 1][group_of(layer)] += pairs - cpu;
    by_place[1][prefill ? 0 : 1][group_of(layer)] += cpu;
  }
}

// What comes later counts for more, so nothing has to decay (DecayedCounts does the same by steps).
double StepMeters::weight_of_now() {
  const auto now = std::chrono::steady_clock::now();
  const double age = std::chrono::duration<double>(now - epoch_) / kHalfLife;
  if (age < kMostAge) return std::exp2(age);
  for (std::atomic<double>& recent : recent_)
    recent.store(recent.load(std::memory_order_relaxed) * std::exp2(-age), std::memory_order_relaxed);
  epoch_ = now;
  return 1;
}

// Slots change between steps; a few looks a second are enough for whoever watches.
void StepMeters::look_at_slots() {
  looked_ = std::chrono::steady_clock::now();
  measures_.resident_experts = 0;
  for (int layer = 0; layer < geometry_.n_layers; ++layer) {
    const std::span<const int32_t> slots = step_.expert_slots(layer);
    const size_t first = static_cast<size_t>(layer) * static_cast<size_t>(geometry_.n_routed_experts);
    for (size_t i = 0; i < slots.size(); ++i) {
      on_device_[first + i].store(slots[i] >= 0, std::memory_order_relaxed);
      measures_.resident_experts += slots[i] >= 0;
    }
  }
}

ExpertMap StepMeters::experts() const {
  ExpertMap map{geometry_.n_layers, geometry_.n_routed_experts, {}, {}, {}};
  map.tokens.reserve(tokens_.size());
  for (size_t i = 0; i < tokens_.size(); ++i) {
    map.tokens.push_back(tokens_[i].load(std::memory_order_relaxed));
    map.recent.push_back(recent_[i].load(std::memory_order_relaxed));
    map.on_device.push_back(on_device_[i].load(std::memory_order_relaxed));
  }
  return map;
}

}  // namespace thermocline
