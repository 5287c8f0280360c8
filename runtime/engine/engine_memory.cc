#include "runtime/engine/engine_memory.h"

#include <fmt/format.h>

#include <algorithm>

#include "runtime/base/log.h"
#include "runtime/engine/model_costs.h"
#include "runtime/hw/host_memory.h"
#include "scheduler/cost/hardware_presets.h"
#include "scheduler/kv/residency.h"

namespace thermocline {
namespace {

constexpr int kHost = sched::MemoryPlan::kHost;
constexpr int64_t kMostTokens = kPageTokens << 31;  // pages are numbered by int32_t
constexpr uint64_t kMiB = 1 << 20;

struct KvSize {
  int64_t sequences = 1, tokens = 0;
  bool offload = false;  // CSA rows of devices in host memory
};

// The largest of [least, most] that fits, where smaller ones do too; `least` is taken for granted.
template <class Fits>
int64_t largest(int64_t least, int64_t most, const Fits& fits) {
  while (least < most) {
    const int64_t middle = least + (most - least + 1) / 2;
    if (fits(middle))
      least = middle;
    else
      most = middle - 1;
  }
  return least;
}

// Each node's workers scan the keys on their own node; with one node there is nothing to choose.
std::vector<int> kv_nodes(const WorkerPool& pool) {
  if (pool.nodes() == 1) return {-1};
  std::vector<int> nodes(static_cast<size_t>(pool.nodes()));
  for (int node = 0; node < pool.nodes(); ++node) nodes[static_cast<size_t>(node)] = pool.os_node(node);
  return nodes;
}

double mib(uint64_t bytes) { return static_cast<double>(bytes) / kMiB; }

class Planner {
 public:
  Planner(const EngineOptions& options, const ModelGeometry& geometry, const deepseek_v4::WeightLoader& weights,
          cpu::CpuContext cpu, const ExecOptions& exec, const std::vector<std::unique_ptr<gpu::Device>>& devices,
          const MemoryBudget& host)
      : o_(options), g_(geometry), weights_(weights), cpu_(cpu), exec_(exec), devices_(devices), host_(host) {}

  Result<KvSize> settle() const;
  EngineMemory plan(const KvSize& size) const;
  Status check(const EngineMemory& m) const;
  void tell(const EngineMemory& m) const;

 private:
  bool on_host() const { return devices_.empty(); }
  // Bytes that the rows of the KV cache were given, 0: none said; on the host checkpoints come out of them too.
  uint64_t budget() const { return on_host() ? o_.kv_host_bytes : o_.kv_gpu_bytes; }
  const char* flag() const { return on_host() ? "--kv-host-memory" : "--kv-gpu-memory"; }
  uint64_t of_budget(const EngineMemory& m) const;
  uint64_t host_bytes(const EngineMemory& m) const;
  int64_t least_tokens() const;
  int64_t wanted_tokens(int64_t sequences) const;
  int64_t most_sequences(bool offload) const;
  int64_t most_tokens(int64_t sequences, bool offload) const;
  KvSize size(bool offload) const;
  int64_t hot_rows(int64_t sequences) const;
  bool within(const EngineMemory& m) const;
  sched::MachineProfile box() const;
  sched::RowPrice price_of_rows(const EngineMemory& there, const EngineMemory& here) const;
  bool prefers_offload(const KvSize& on_device, const KvSize& offloaded) const;
  bool fits(const KvSize& size, const sched::MemoryPlan& least) const;
  uint64_t usual_checkpoints(const EngineMemory& m) const;
  int64_t checkpoint_bytes(const EngineMemory& m) const;
  uint64_t least_budget(const EngineMemory& m) const;

  const EngineOptions& o_;
  const ModelGeometry& g_;
  const deepseek_v4::WeightLoader& weights_;
  const cpu::CpuContext cpu_;
  const ExecOptions& exec_;
  const std::vector<std::unique_ptr<gpu::Device>>& devices_;
  const MemoryBudget& host_;
};

EngineMemory Planner::plan(const KvSize& size) const {
  EngineMemory m;
  m.kv.bf16_rows = rounding_of(o_.numerics).results;
  m.kv.fp8_rows = exec_.fp8_rows || !on_host();
  m.kv.mtp = o_.mtp;
  m.kv.max_tokens = size.tokens;
  m.kv.max_sequences = static_cast<int>(size.sequences);
  m.kv.max_chunk = o_.max_chunk;
  m.kv.host_rows = on_host();
  m.kv.nodes = kv_nodes(cpu_.pool);
  const HostMemoryMeasure rows;
  const std::unique_ptr<KvStore> numbers = std::move(KvStore::create(g_, m.kv)).value();
  m.exec = exec_;
  m.exec.hot_rows = size.offload ? hot_rows(size.sequences) : 0;
  m.exec.max_context = std::min(o_.max_context, numbers->most_tokens());
  m.plan.set_capacity(kHost, host_.bytes, host_.source);
  m.plan.add(kHost, "program", sched::kProgramBytes);
  m.plan.add(kHost, "weights", weights_.arena_bytes());
  m.plan.add(kHost, "weights on their way", weights_.buffer_bytes());
  if (on_host()) {
    m.plan.add(kHost, KvStore::kPlanOwner, rows.bytes(), "lower --max-model-len, --max-num-seqs or --kv-host-memory");
    m.plan.add(kHost, "step buffers", StepBuffers::bytes(g_, m.exec, cpu_.pool.size()),
               "lower --max-num-batched-tokens");
  } else {
    DeepseekV4GpuStep::plan_memory(m.plan, g_, weights_.shapes(), cpu_, o_.numerics, m.exec, o_.gpu, *numbers,
                                   devices_);
  }
  if (!o_.kv_disk.folder.empty()) m.plan.add(kHost, "KV on its way to the disk", o_.kv_disk.memory_bytes());
  m.prefix_cache_bytes = o_.prefix_cache_bytes >= 0 ? o_.prefix_cache_bytes : checkpoint_bytes(m);
  m.plan.add(kHost, "prefix checkpoints", static_cast<uint64_t>(m.prefix_cache_bytes), "lower --prefix-cache-memory");
  return m;
}

// A quarter of the pages, or a few dozen checkpoints where those are small.
uint64_t Planner::usual_checkpoints(const EngineMemory& m) const {
  const KvLayout layout(g_, m.kv);
  const int64_t pages = pages_of(m.kv.max_tokens, kPageTokens) * layout.compressed_page_bytes();
  const int64_t one = pages_of(g_.window_size, kWindowPageTokens) * layout.window_page_bytes() + layout.ring_bytes();
  return static_cast<uint64_t>(std::max(pages / 4, 32 * one));
}

// An eighth of the bytes at most, lest pages leave nothing; where the tokens are said, of what those leave.
int64_t Planner::checkpoint_bytes(const EngineMemory& m) const {
  uint64_t most = m.plan.room(kHost) / 8;
  if (on_host() && o_.kv_host_bytes > 0)
    most = o_.kv_host_bytes / 8;
  else if (on_host() && o_.kv_tokens == 0)
    most = (m.plan.room(kHost) + m.plan.owner_bytes(KvStore::kPlanOwner)) / 8;
  else if (o_.kv_host_bytes > 0)
    most = std::min(most, m.exec.hot_rows > 0 ? o_.kv_host_bytes / 8 : o_.kv_host_bytes);
  return static_cast<int64_t>(std::min(most, usual_checkpoints(m)));
}

uint64_t Planner::of_budget(const EngineMemory& m) const {
  return m.plan.owner_bytes(KvStore::kPlanOwner) + (on_host() ? static_cast<uint64_t>(m.prefix_cache_bytes) : 0);
}

// Of what devices leave to the host.
uint64_t Planner::host_bytes(const EngineMemory& m) const {
  return m.plan.owner_bytes(KvStore::kPlanHostRows) + static_cast<uint64_t>(m.prefix_cache_bytes);
}

// Whether it keeps the budgets that were given.
bool Planner::within(const EngineMemory& m) const {
  if (budget() > 0 && of_budget(m) > budget()) return false;
  return on_host() || o_.kv_host_bytes == 0 || host_bytes(m) <= o_.kv_host_bytes;
}

// Of a device, what the smallest cache leaves is shared with the experts, half and half.
bool Planner::fits(const KvSize& size, const sched::MemoryPlan& least) const {
  const EngineMemory m = plan(size);
  if (!within(m)) return false;
  if (budget() > 0) return on_host() || m.plan.planned_bytes(kHost) <= host_.bytes;
  if (!m.plan.check().ok()) return false;
  for (int device = 0; o_.gpu.experts < 0 && device < static_cast<int>(devices_.size()); ++device)
    if (m.plan.planned_bytes(device) - least.planned_bytes(device) > least.room(device) / 2) return false;
  return true;
}

int64_t Planner::wanted_tokens(int64_t sequences) const { return std::min(kMostTokens, o_.max_context * sequences); }

int64_t Planner::least_tokens() const {
  if (!o_.kv_below_context) return o_.max_context;
  return std::min(o_.max_context, pages_of(o_.max_chunk, kPageTokens) * kPageTokens);
}

// Whoever runs can hold a step's chunk beside its windows.
int64_t Planner::most_sequences(bool offload) const {
  if (budget() == 0 && !offload) return o_.max_sequences;
  return largest(1, o_.max_sequences, [&](int64_t sequences) {
    return within(plan({sequences, std::min(kMostTokens, sequences * least_tokens()), offload}));
  });
}

// In whole pages. Devices hold a context, if they can, before their experts get anything.
int64_t Planner::most_tokens(int64_t sequences, bool offload) const {
  const int64_t wanted = wanted_tokens(sequences);
  int64_t least = least_tokens();
  if (!on_host() && budget() == 0) {
    const EngineMemory m = plan({sequences, o_.max_context, offload});
    if (within(m) && m.plan.check().ok()) least = o_.max_context;
  }
  const sched::MemoryPlan smallest = plan({sequences, least, offload}).plan;
  const auto tokens = [&](int64_t pages) { return std::min(wanted, least + pages * kPageTokens); };
  return tokens(largest(0, pages_of(wanted - least, kPageTokens), [&](int64_t pages) {
    return fits({sequences, tokens(pages), offload}, smallest);
  }));
}

KvSize Planner::size(bool offload) const {
  if (o_.kv_tokens != 0) return {o_.max_sequences, o_.kv_tokens, offload};
  const int64_t sequences = most_sequences(offload);
  return {sequences, most_tokens(sequences, offload), offload};
}

// Of each CSA layer, copies on the device: what a few steps of every sequence select, as most of it is selected again.
int64_t Planner::hot_rows(int64_t sequences) const {
  if (o_.gpu.hot_rows > 0) return o_.gpu.hot_rows;
  return g_.index_topk * std::clamp<int64_t>(2 * sequences, 4, 32);
}

// What is known of it: measured, by its card's data sheet; a modest server stands for the rest.
sched::MachineProfile Planner::box() const {
  sched::MachineProfile box = o_.machine.value_or(sched::modest_server());
  const sched::GpuSheet* const card = sched::gpu_sheet_of_device(devices_[0]->name());
  if (card && (!o_.machine || box.gpus.empty()))
    box.gpus = {sched::gpu_profile(*card, box.cpu.read_bytes_per_second)};
  else if (box.gpus.empty())
    box.gpus = sched::modest_server().gpus;
  return box;
}

sched::RowPrice Planner::price_of_rows(const EngineMemory& there, const EngineMemory& here) const {
  const sched::ModelCosts model = model_costs(g_, here.kv.fp8_rows);
  const sched::MachineProfile machine = box();
  double slots_bytes = 0;
  for (int device = 0; device < static_cast<int>(devices_.size()); ++device)
    slots_bytes += static_cast<double>(there.plan.room(device));
  return sched::price_of_rows({model, machine},
                              {.freed_bytes = static_cast<double>(there.plan.owner_bytes(KvStore::kPlanOwner)) -
                                              static_cast<double>(here.plan.owner_bytes(KvStore::kPlanOwner)),
                               .sequences = static_cast<double>(here.kv.max_sequences),
                               .resident = std::min(1.0, slots_bytes / model.routed_bytes())});
}

bool Planner::prefers_offload(const KvSize& on_device, const KvSize& offloaded) const {
  const auto works = [&](const EngineMemory& m) { return within(m) && m.plan.check().ok(); };
  const EngineMemory there = plan(on_device), here = plan(offloaded);
  if (!works(here)) return false;
  if (!works(there)) return true;
  if (there.kv.max_sequences != here.kv.max_sequences) return here.kv.max_sequences > there.kv.max_sequences;
  if (there.kv.max_tokens != here.kv.max_tokens) return here.kv.max_tokens > there.kv.max_tokens;
  if (o_.gpu.experts >= 0) return false;  // the bytes would be nobody's
  const sched::RowPrice price = price_of_rows(there, here);
  log_debug("CSA rows {}: {}", price.host_pays() ? "in host memory" : "on the device",
            to_string(price, price.host_pays()));
  return price.host_pays();
}

Result<KvSize> Planner::settle() const {
  if (o_.kv_tokens != 0 && (o_.kv_tokens < least_tokens() || o_.kv_tokens > kMostTokens))
    return invalid(
        fmt::format("a KV cache of {} tokens is outside {}..{}: what it should hold, and the pages that can "
                    "be numbered",
                    o_.kv_tokens, least_tokens(), kMostTokens));
  const KvSize near = size(false);  // rows where they are computed
  const bool selects = KvLayout(g_, plan(near).kv).csa_layers() > 0;
  if (on_host() || o_.kv_offload == KvOffload::off || !selects) return near;
  const KvSize offloaded = size(true);
  return o_.kv_offload == KvOffload::on || prefers_offload(near, offloaded) ? offloaded : near;
}

// The smallest that would do instead of one that `m`, as small as may be, does not fit.
uint64_t Planner::least_budget(const EngineMemory& m) const {
  const uint64_t rows = m.plan.owner_bytes(KvStore::kPlanOwner);
  if (!on_host() || o_.prefix_cache_bytes >= 0) return of_budget(m);
  return rows + std::min(usual_checkpoints(m), rows / 7 + 1);  // an eighth of the sum
}

Status Planner::check(const EngineMemory& m) const {
  if (budget() > 0 && of_budget(m) > budget()) {
    const uint64_t least = least_budget(m);
    return invalid(
        fmt::format("{} is {:.1f} MiB, and a KV cache of {} tokens and {} sequence{} takes {:.1f} MiB{}: "
                    "give at least {}MiB",
                    flag(), mib(budget()), m.kv.max_tokens, m.kv.max_sequences, m.kv.max_sequences == 1 ? "" : "s",
                    mib(least), on_host() ? ", checkpoints included" : "", (least + kMiB - 1) / kMiB));
  }
  if (const uint64_t rows = m.plan.owner_bytes(KvStore::kPlanHostRows);
      rows > 0 && o_.kv_host_bytes > 0 && host_bytes(m) > o_.kv_host_bytes)
    return invalid(fmt::format(
        "--kv-host-memory is {:.1f} MiB, and the CSA rows of {} tokens take {:.1f} MiB, checkpoints "
        "{:.1f} MiB: give more, or --kv-offload off",
        mib(o_.kv_host_bytes), m.kv.max_tokens, mib(rows), mib(static_cast<uint64_t>(m.prefix_cache_bytes))));
  if (o_.kv_host_bytes > 0 && static_cast<uint64_t>(m.prefix_cache_bytes) > o_.kv_host_bytes)
    return invalid(fmt::format("--prefix-cache-memory is {:.1f} MiB, more than --kv-host-memory, {:.1f} MiB",
                               mib(static_cast<uint64_t>(m.prefix_cache_bytes)), mib(o_.kv_host_bytes)));
  return m.plan.check();
}

// Where the cache holds less than it was asked for.
void Planner::tell(const EngineMemory& m) const {
  if (o_.kv_gpu_bytes > 0 && on_host()) log_warn("--kv-gpu-memory counts for nothing: the CPU keeps the KV cache");
  if (o_.kv_offload == KvOffload::on && m.exec.hot_rows == 0)
    log_warn("--kv-offload on counts for nothing: {}", on_host() ? "the CPU keeps the KV cache" : "no layer selects");
  if (m.exec.hot_rows > 0)
    log_info("{:.0f} MiB of KV rows lie in host memory, {} rows of each layer have copies on a device",
             mib(m.plan.owner_bytes(KvStore::kPlanHostRows)), m.exec.hot_rows);
  if (m.kv.max_sequences < o_.max_sequences)
    log_info("{} sequences run together, not {}: no more fit {}", m.kv.max_sequences, o_.max_sequences, flag());
  if (o_.kv_tokens != 0 || m.kv.max_tokens >= wanted_tokens(m.kv.max_sequences)) return;
  log_info("the KV cache holds {} tokens, not {} sequences of {}: more does not fit {}", m.kv.max_tokens,
           m.kv.max_sequences, o_.max_context, budget() > 0 ? flag() : "the memory");
  if (m.exec.max_context < o_.max_context)
    log_info("that is less than one context: requests of more than {} tokens are refused", m.exec.max_context);
}

}  // namespace

Result<EngineMemory> plan_engine_memory(const EngineOptions& options, const ModelGeometry& geometry,
                                        const deepseek_v4::WeightLoader& weights, cpu::CpuContext cpu,
                                        const ExecOptions& exec,
                                        const std::vector<std::unique_ptr<gpu::Device>>& devices,
                                        const MemoryBudget& host) {
  const Planner planner(options, geometry, weights, cpu, exec, devices, host);
  TC_ASSIGN(const KvSize size, planner.settle());
  EngineMemory memory = planner.plan(size);
  TC_RETURN_IF_ERROR(planner.check(memory));
  planner.tell(memory);
  return memory;
}

}  // namespace thermocline
