#include "scheduler/plan/box_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "scheduler/cost/hit_curve.h"

namespace thermocline::sched {
namespace {

constexpr int kHost = MemoryPlan::kHost;
constexpr double kGiB = 1 << 30, kMiB = 1 << 20;
constexpr double kDriverBytes = 600 * kMiB;  // of a device: context and modules, an estimate
constexpr int kMostStaged = 16;              // experts that pass through a device in long steps

uint64_t whole(double bytes) { return static_cast<uint64_t>(std::clamp(std::ceil(bytes), 0.0, 0x1p63)); }
std::string gib(double bytes) { return fmt::format("{:.1f} GiB", bytes / kGiB); }

// Bytes of the KV cache of some sequences, by where they may lie.
struct KvBytes {
  double near = 0;      // index keys, HCA rows, windows, rings: where attention runs
  double selected = 0;  // CSA rows
  double copies = 0;    // of them on a device, where they are in host memory
};

KvBytes kv_bytes(const ModelCosts& m, double context, int batch) {
  KvBytes kv;
  const auto page = static_cast<double>(m.page_tokens);
  const double pages = std::ceil(context / page) + 1, tokens = batch * pages * page;
  double csa_layers = 0, topk = 0, row_bytes = 0;
  for (const LayerCosts& l : m.layers) {
    if (l.selects()) {
      csa_layers += 1;
      topk = static_cast<double>(l.topk);
      row_bytes = l.row_bytes;
    }
    if (l.ratio == 0 || !l.own_rows) continue;
    const double rows = tokens / static_cast<double>(l.ratio);
    kv.near += rows * (l.topk > 0 ? l.key_bytes : l.row_bytes);
    if (l.topk > 0) kv.selected += rows * l.row_bytes;
  }
  kv.near += batch * m.sequence_bytes;
  kv.copies = std::min(kv.selected, csa_layers * row_bytes * topk * std::clamp(2 * batch, 4, 32));
  return kv;
}

// What of the KV cache lies where attention runs.
std::string near_rows(const ModelCosts& m) {
  bool keys = false, dense_rows = false, windows = false;
  for (const LayerCosts& l : m.layers) {
    keys = keys || l.topk > 0;
    dense_rows = dense_rows || (l.ratio > 0 && l.topk == 0);
    windows = windows || l.window > 0;
  }
  std::string names = keys ? "index keys" : "";
  if (dense_rows) names += std::string(names.empty() ? "" : ", ") + (windows ? "HCA rows" : "rows");
  if (windows) names += std::string(names.empty() ? "" : ", ") + "windows";
  return names;
}

// Where everything lies, for one number of sequences and one size of step.
class Layout {
 public:
  Layout(const BoxQuestion& q, int batch, const ChunkBuffers& buffers)
      : q_(q), batch_(batch), buffers_(buffers), kv_(kv_bytes(q.model, q.context, batch)) {
    if (devices() > 0) decide_rows();
    for (size_t i = 0; i < devices(); ++i) slots_.push_back(slots(i));
  }

  size_t devices() const { return q_.machine.gpus.size(); }
  bool host_rows() const { return host_rows_; }
  bool rows_crowd() const { return rows_crowd_; }
  const RowPrice& rows() const { return rows_; }
  const KvBytes& kv() const { return kv_; }
  double device_kv() const { return devices() == 0 ? 0 : kv_.near + (host_rows_ ? kv_.copies : kv_.selected); }
  bool kv_crowds() const {
    for (size_t i = 0; i < devices(); ++i)
      if (device_kv() / count() > std::max(0.0, room(i) + device_kv() / count()) / 2) return true;
    return false;
  }
  int64_t device_experts() const {
    int64_t sum = 0;
    for (const int64_t slots : slots_) sum += slots;
    return sum;
  }
  /// Of the experts of a device's layers, the share that has a slot there.
  double resident(size_t device) const {
    return std::min(1.0, static_cast<double>(slots_[device]) * count() / experts());
  }
  double resident() const { return devices() == 0 ? 0 : static_cast<double>(device_experts()) / experts(); }
  MemoryPlan plan() const;
  std::string refusal() const;
  /// It leaves RAM to the experts where there is a disk that it can be read from.
  bool table_on_disk() const {
    const double ram = q_.machine.cpu.memory_bytes, table = q_.model.table_bytes;
    return table > 0 && q_.machine.disk.read_bytes_per_second > 0 && (ram <= 0 || bytes_beside_table() + table > ram);
  }
  bool devices_hold() const {
    for (size_t i = 0; i < devices(); ++i)
      if (room(i) < 0) return false;
    return true;
  }

 private:
  double count() const { return static_cast<double>(devices()); }
  double experts() const { return static_cast<double>(q_.model.experts) * q_.model.routed_layer_count(); }
  int staged() const { return std::min(kMostStaged, 2 * q_.model.experts); }
  double buffer_bytes() const { return buffers_.device_bytes + staged() * q_.model.expert_bytes; }
  double fixed_bytes() const { return q_.model.dense_bytes() / count() + buffer_bytes() + kDriverBytes; }
  double room(size_t i) const { return q_.machine.gpus[i].memory_bytes - fixed_bytes() - device_kv() / count(); }
  int64_t slots(size_t i) const {
    const auto most = static_cast<int64_t>(std::ceil(experts() / count()));
    return std::clamp<int64_t>(static_cast<int64_t>(room(i) / q_.model.expert_bytes), 0, most);
  }
  double host_bytes() const { return bytes_beside_table() + (table_on_disk() ? 0 : q_.model.table_bytes); }
  double bytes_beside_table() const {
    return q_.system_bytes + static_cast<double>(kProgramBytes) + q_.model.routed_bytes() + q_.model.dense_bytes() +
           q_.model.embedding_bytes +
           (devices() == 0 ? kv_.near + kv_.selected
            : host_rows_   ? kv_.selected
                           : 0) +
           buffers_.host_bytes;
  }
  void decide_rows();
  std::string device_refusal(size_t i) const;

  const BoxQuestion& q_;
  const int batch_;
  const ChunkBuffers& buffers_;
  const KvBytes kv_;
  bool host_rows_ = false, rows_crowd_ = false;
  RowPrice rows_;
  std::vector<int64_t> slots_;
};

// As the engine decides (--kv-offload auto): experts and rows share half and half what is left of a device. Freed bytes
// are nobody's where all experts are there already.
void Layout::decide_rows() {
  if (kv_.selected <= kv_.copies) return;
  double slots_there = 0;
  for (size_t i = 0; i < devices(); ++i) slots_there += static_cast<double>(slots(i));
  if (devices_hold() && slots_there >= experts()) return;
  rows_ = price_of_rows(CostModel(q_.model, q_.machine), {.freed_bytes = kv_.selected - kv_.copies,
                                                          .sequences = static_cast<double>(batch_),
                                                          .resident = slots_there / experts()});
  rows_crowd_ = kv_crowds();
  host_rows_ = rows_crowd_ || rows_.host_pays();
}

MemoryPlan Layout::plan() const {
  const ModelCosts& m = q_.model;
  MemoryPlan plan;
  if (q_.machine.cpu.memory_bytes > 0) plan.set_capacity(kHost, whole(q_.machine.cpu.memory_bytes), q_.memory_source);
  if (q_.system_bytes > 0) plan.add(kHost, "operating system", whole(q_.system_bytes));
  plan.add(kHost, "program", kProgramBytes);
  plan.add(kHost, "routed experts", whole(m.routed_bytes()));
  plan.add(kHost, devices() > 0 ? "dense weights, a second copy" : "dense weights", whole(m.dense_bytes()));
  plan.add(kHost, "embedding", whole(m.embedding_bytes));
  if (m.table_bytes > 0 && !table_on_disk()) plan.add(kHost, "n-gram table", whole(m.table_bytes));
  if (devices() == 0) plan.add(kHost, "KV cache", whole(kv_.near + kv_.selected), "lower --context or --batch");
  if (host_rows_) plan.add(kHost, "KV cache: CSA rows", whole(kv_.selected), "lower --context or --batch");
  plan.add(kHost, "step buffers", whole(buffers_.host_bytes));
  if (table_on_disk()) plan.add(MemoryPlan::kDisk, "n-gram table", whole(m.table_bytes));
  for (size_t i = 0; i < devices(); ++i) {
    const int tier = static_cast<int>(i);
    plan.set_capacity(tier, whole(q_.machine.gpus[i].memory_bytes), q_.machine.gpus[i].name);
    plan.add(tier, "driver", whole(kDriverBytes));
    plan.add(tier, "dense weights", whole(m.dense_bytes() / count()));
    plan.add(tier, fmt::format("step buffers, {} staged experts", staged()), whole(buffer_bytes()));
    plan.add(tier, "KV cache: " + near_rows(m), whole(kv_.near / count()));
    if (kv_.selected > 0)
      plan.add(tier, host_rows_ ? "KV cache: CSA rows in use" : "KV cache: CSA rows",
               whole((host_rows_ ? kv_.copies : kv_.selected) / count()));
    plan.add(tier, fmt::format("{} experts", slots_[i]), whole(static_cast<double>(slots_[i]) * m.expert_bytes));
  }
  return plan;
}

std::string Layout::device_refusal(size_t i) const {
  const GpuProfile& gpu = q_.machine.gpus[i];
  const double all = q_.model.dense_bytes() + device_kv(), each = buffer_bytes() + kDriverBytes,
               beside = gpu.memory_bytes - each;
  const std::string cards = beside > 0 && all / beside <= 16
                                ? fmt::format("{:.0f} such cards (each computes its share of the layers), ",
                                              std::max(count() + 1, std::ceil(all / beside)))
                                : "";
  return fmt::format(
      "{} of {} cannot hold its share of {} of dense weights and {} of KV cache for {} sequence{} of {:.0f} tokens, "
      "and "
      "{} of step buffers and driver: {}cards of {}, or --gpu none would do{}",
      gpu.name, gib(gpu.memory_bytes), gib(q_.model.dense_bytes()), gib(device_kv()), batch_, batch_ == 1 ? "" : "s",
      q_.context, gib(each), cards, gib(all / count() + each),
      device_kv() > gpu.memory_bytes / 4 ? "; so would a smaller --context or --batch" : "");
}

std::string Layout::refusal() const {
  const double ram = q_.machine.cpu.memory_bytes;
  if (ram > 0 && host_bytes() > ram) {
    const double table = table_on_disk() ? 0 : q_.model.table_bytes;
    return fmt::format(
        "the host has {} of RAM ({}) and needs {}, {} of it for the routed experts{}: this version reads experts from "
        "RAM "
        "only, as NVMe expert storage is not built yet",
        gib(ram), q_.memory_source, gib(host_bytes()), gib(q_.model.routed_bytes()),
        table > 0 ? fmt::format(" and {} for the n-gram table, which a disk (--nvme) would hold", gib(table)) : "");
  }
  for (size_t i = 0; i < devices(); ++i)
    if (room(i) < 0) return device_refusal(i);
  return "";
}

// Devices take turns, each with its share of the layers: a step takes the average of what each would take for all.
template <class Ns>
double over_devices(const BoxQuestion& q, const Layout& layout, const Ns& ns) {
  if (layout.devices() == 0) return ns(q.machine, 0.0);
  double sum = 0;
  for (size_t i = 0; i < layout.devices(); ++i) {
    MachineProfile machine = q.machine;
    std::swap(machine.gpus[0], machine.gpus[i]);
    sum += ns(machine, layout.resident(i));
  }
  return sum / static_cast<double>(layout.devices());
}

DecodeSpeed decode_speed(const BoxQuestion& q, int batch, const Layout& layout) {
  DecodeSpeed speed;
  speed.batch = batch;
  speed.fits = layout.refusal().empty();
  speed.resident = layout.resident();
  speed.hits = expected_hits(speed.resident);
  const double rows_ns = layout.host_rows()
                             ? copying_rows_ns(CostModel(q.model, q.machine), {.sequences = static_cast<double>(batch)})
                             : 0;
  const auto rate = [&](bool skewed) {
    const double ns = over_devices(q, layout, [&](const MachineProfile& machine, double resident) {
      const double hits = skewed ? expected_hits(resident) : resident;
      const CostModel cost(q.model, machine);
      const StepTime t = cost.step({.tokens = static_cast<double>(batch),
                                    .context = q.context,
                                    .resident = resident,
                                    .hits = hits,
                                    .table_on_disk = layout.table_on_disk()});
      if (skewed) speed.bottleneck = bottleneck_text(cost, t.bottleneck(), batch);
      return t.total;
    });
    return 1e9 * batch / (ns + rows_ns);
  };
  speed.uniform_tokens_per_second = rate(false);
  speed.tokens_per_second = rate(true);
  return speed;
}

PrefillSpeed prefill_speed(const BoxQuestion& q, PrefillExperts experts, int64_t chunk, const Layout& layout) {
  const double steps = std::ceil(q.context / static_cast<double>(chunk)), tokens = q.context / steps;
  constexpr int kSamples = 32;  // of the steps: time grows with the context nearly linearly
  const int samples = static_cast<int>(std::min<double>(steps, kSamples));
  PrefillSpeed speed;
  speed.experts = experts;
  speed.chunk = chunk;
  const double ns = over_devices(q, layout, [&](const MachineProfile& machine, double resident) {
    const CostModel cost(q.model, machine);
    double sum = 0;
    for (int i = 0; i < samples; ++i) {
      Phase phase = Phase::dense;
      double step = prefill_step_ns(cost, experts, tokens, q.context * (i + 0.5) / samples, resident, &phase);
      // Tokens are known, so rows are read while the step before computes.
      if (const double read = layout.table_on_disk() ? cost.table_ns(tokens) : 0; read > step) {
        step = read;
        phase = Phase::table;
      }
      sum += step;
      speed.bottleneck = bottleneck_text(cost, phase, tokens);
    }
    return sum / samples + prompt_end_ns(cost, experts, q.context, resident) / steps;
  });
  speed.seconds = ns * steps / 1e9;
  speed.tokens_per_second = q.context / speed.seconds;
  return speed;
}

// The best way for each size of step; then the smallest step within a tenth of the best, as its buffers cost experts.
PrefillSpeed best_prefill(const BoxQuestion& q) {
  std::vector<PrefillSpeed> of_chunk;
  const bool fits = Layout(q, q.batch, q.chunks.front()).refusal().empty();
  for (const ChunkBuffers& buffers : q.chunks) {
    const Layout layout(q, q.batch, buffers);
    const bool too_large = !layout.devices_hold() || (fits && !layout.refusal().empty());
    if (!of_chunk.empty() && too_large) break;
    PrefillSpeed best;
    for (const PrefillExperts experts : {PrefillExperts::cpu, PrefillExperts::stream, PrefillExperts::hybrid}) {
      if (layout.devices() == 0 && experts != PrefillExperts::cpu) continue;
      const PrefillSpeed speed = prefill_speed(q, experts, buffers.tokens, layout);
      // A simpler way wins unless it is slower by a hundredth.
      if (speed.tokens_per_second > 1.01 * best.tokens_per_second) best = speed;
    }
    of_chunk.push_back(best);
  }
  double most = 0;
  for (const PrefillSpeed& speed : of_chunk) most = std::max(most, speed.tokens_per_second);
  return *std::find_if(of_chunk.begin(), of_chunk.end(),
                       [&](const PrefillSpeed& speed) { return speed.tokens_per_second >= 0.9 * most; });
}

const ChunkBuffers& buffers_of(const BoxQuestion& q, int64_t chunk) {
  return *std::find_if(q.chunks.begin(), q.chunks.end(), [&](const ChunkBuffers& b) { return b.tokens == chunk; });
}

// Weights and their rate, or what is started for every layer.
bool starts_dominate(const CostModel& cost, double tokens) {
  double all = 0, bytes = 0;
  const auto& curves = cost.on_device() ? cost.machine().gpus[0].weights : cost.machine().cpu.weights;
  for (int layer = 0; layer < cost.model().layer_count(); ++layer) {
    all += cost.dense_ns(layer, tokens);
    const LayerCosts& l = cost.model().layers[static_cast<size_t>(layer)];
    for (size_t f = 0; f < l.dense_bytes.size(); ++f) bytes += l.dense_bytes[f] * curves[f].ns_per_byte(tokens);
  }
  return bytes < all / 2;
}

}  // namespace

std::string bottleneck_text(const CostModel& cost, Phase phase, double tokens) {
  const bool gpu = cost.on_device();
  switch (phase) {
    case Phase::dense:
      if (starts_dominate(cost, tokens)) return gpu ? "kernel launches" : "waking the workers";
      return gpu ? "dense weights on the GPU" : "dense weights from RAM";
    case Phase::attention:
      return gpu ? "attention on the GPU" : "attention on the CPU";
    case Phase::index:
      return gpu ? "index scan on the GPU" : "index scan on the CPU";
    case Phase::experts_cpu: {
      const ModelCosts& m = cost.model();
      const double each = tokens * m.experts_per_token / std::max(1.0, m.unique_experts(tokens));
      return cost.expert_cpu_ns(each) > 1.1 * cost.expert_cpu_ns(1) ? "expert multiplications on the CPU"
                                                                    : "expert bytes from RAM";
    }
    case Phase::experts_gpu:
      return "experts on the GPU";
    case Phase::handover:
      return "handing layers to the CPU and back";
    case Phase::copies:
      return "copying experts to the GPU";
    case Phase::head:
      return "the vocabulary matrix";
    case Phase::table:
      return "n-gram rows from the disk";
  }
  return "";
}

double disk_tokens_per_second(const ModelCosts& model, double disk_bytes_per_second, double hits) {
  const double bytes = (1 - hits) * model.expert_bytes * model.experts_per_token * model.routed_layer_count();
  return bytes > 0 ? disk_bytes_per_second / bytes : 0;
}

BoxPlan plan_box(const BoxQuestion& q) {
  BoxPlan plan;
  plan.prefill = best_prefill(q);
  const ChunkBuffers& buffers = buffers_of(q, plan.prefill.chunk);
  const Layout layout(q, q.batch, buffers);
  plan.memory = layout.plan();
  plan.refusal = layout.refusal();
  plan.host_rows = layout.host_rows();
  plan.rows_crowd = layout.rows_crowd();
  plan.rows = layout.rows();
  plan.kv_bytes = layout.kv().near + layout.kv().selected;
  plan.device_kv_bytes = layout.device_kv();
  plan.table_on_disk = layout.table_on_disk();
  plan.kv_crowds = layout.kv_crowds();
  plan.device_experts = layout.device_experts();
  for (const int batch : std::set<int>{1, q.batch, 32})
    plan.decode.push_back(decode_speed(q, batch, batch <= q.batch ? layout : Layout(q, batch, buffers)));
  return plan;
}

}  // namespace thermocline::sched
