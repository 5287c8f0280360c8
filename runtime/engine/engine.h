// Engine: a loaded model and the machinery that runs it, behind the calls everything above uses.
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "runtime/engine/expert_recorder.h"
#include "runtime/engine/memory_tiers.h"
#include "runtime/engine/step_driver.h"
#include "runtime/engine/step_loop.h"
#include "runtime/exec/deepseek_v4_gpu_step.h"
#include "runtime/exec/deepseek_v4_step.h"
#include "runtime/hw/cgroup.h"
#include "runtime/hw/topology.h"
#include "scheduler/cost/machine_profile.h"

namespace thermocline {

struct EngineOptions {
  std::filesystem::path model;
  Numerics numerics = Numerics::published;
  Isa max_isa = Isa::amx;
  int threads = 0;                           // 0: one per core this process may use
  std::string threads_source = "--threads";  // what said so, for messages
  std::string topology;                      // an hwloc description instead of this machine's, for tests
  int64_t max_context = 0;                   // 0: the model's own limit, at most kDefaultContext
  int64_t max_chunk = 512;                   // tokens of a prefill step
  int64_t max_logit_rows = 1;                // tokens of a step whose logits can be asked for
  int max_sequences = 1;                     // sequences that run together (--max-num-seqs)
  /// Tokens the KV cache holds, of all sequences together; at least max_context, or with kv_below_context a step's
  /// chunk. 0: max_context for each of max_sequences, or as many as fit the byte budget; without one the free memory,
  /// of a device half of it: the rest is for experts.
  int64_t kv_tokens = 0;
  bool kv_below_context = false;  // a cache smaller than max_context will do: what cannot fit is refused on its own
  /// Host memory for the KV cache: rows, where the CPU or devices keep them there, and checkpoints; 0: what is free.
  /// Where it does not hold the windows and a chunk of max_sequences, fewer run together.
  uint64_t kv_host_bytes = 0;
  uint64_t kv_gpu_bytes = 0;  // the same for rows on devices, all of them together
  KvOffload kv_offload = KvOffload::automatic;
  /// Host memory for checkpoints of prefixes (PrefixCache), their KV pages not among them; 0: none are kept, -1: by the
  /// size of the cache, an eighth of kv_host_bytes or of what is free at most.
  int64_t prefix_cache_bytes = -1;
  /// Prefixes outlive the process in a folder, and what memory cannot hold (NvmeTier); an empty folder: they do not.
  NvmeTierOptions kv_disk = {};
  bool mtp = false;
  KvDtype kv_dtype = KvDtype::automatic;
  bool int8_activations = false;  // routed experts take INT8 inputs: faster, not exact (docs/numerics.md)
  bool direct_io = false;         // read the checkpoint past the page cache
  bool quiet = false;             // no progress bar

  std::string device = "none";  // auto, cuda, simt or none; "cuda:2" for two cards
  uint64_t gpu_memory = 0;      // bytes of each device; 0: what is free (simt: 4 GiB)
  GpuOptions gpu;

  /// A trace of what the routers choose (scheduler/trace/trace.h), with token ids only where they may be kept.
  std::filesystem::path record_trace;
  bool trace_token_ids = false;
  /// How often experts are used, read at the start where it is there, and saved at the end: slots begin with those.
  std::filesystem::path expert_profile;

  /// What this machine can do: steps are held against what the cost model says of them (EngineStats::forecast), and
  /// fills of devices have the time that copies leave; what KV rows and experts make of a device's bytes. None: with
  /// `calibrated` what `thermocline calibrate` stored of it.
  std::optional<sched::MachineProfile> machine = {};
  bool calibrated = false;

  const std::atomic<bool>* cancel = nullptr;  // turned true while loading: open() ends with ErrorCode::cancelled
  std::function<void(double)> progress = {};  // told the share of the weights that is loaded (LoadOptions::progress)

  static constexpr int64_t kDefaultContext = 32768;
};

class Engine {
 public:
  /// Reads the config and the headers, checks that the devices can run it and that all of it fits the memory, loads,
  /// and makes every buffer resident. Errors: those of read_config and WeightLoader; invalid_argument for a context, a
  /// KV cache or a thread count out of range, a KV budget too small for a sequence, a KV dtype that numerics or devices
  /// exclude, a folder for the KV cache that cannot be used; unsupported and out_of_memory before a weight is read;
  /// cancelled.
  static Result<std::unique_ptr<Engine>> open(const EngineOptions& options);

  /// Starts the step loop on its own thread; from then on only requests step this engine. `tokenizer` outlives it.
  /// Errors: invalid_argument for an option out of range, and those of a step: two are measured.
  Status start(const Tokenizer& tokenizer, const LoopOptions& options = {});

  // Of a started engine, any thread:

  /// A place in the queue before the request's prompt is made: atomics only. Errors: overloaded, unavailable.
  Result<QueueTicket> ticket(const QueueCounters::Amount& amount) { return loop().ticket(amount); }
  /// Hands a request to the step loop.
  /// Errors: invalid_argument, naming the field; context_length for what cannot ever fit; overloaded; unavailable.
  Result<std::shared_ptr<RequestHandle>> submit(Request request) { return loop().submit(std::move(request)); }
  /// No new requests; those that run and wait have until `deadline`, then they fail with unavailable. Returns at once;
  /// health() says stopped when the last one has ended. Called again, the earlier deadline counts.
  void drain(std::chrono::steady_clock::time_point deadline) { loop().drain(deadline); }
  /// Lets go of every prefix that is kept in memory, between two steps; `done` is told what went, on the step thread,
  /// or never, where the loop ends first.
  void flush_prefix_cache(std::function<void(const PrefixCacheFlush&)> done) {
    loop().flush_prefix_cache(std::move(done));
  }
  EngineHealth health() const { return loop().health(); }
  EngineStats stats() const { return loop().stats(); }
  ExpertMap experts() const { return meters_->experts(); }
  /// What it takes of each memory, and what of that is in use by `stats`.
  std::vector<MemoryTier> memory_tiers(const EngineStats& stats) const;

  /// The steps as calls, where no loop was started.
  StepDriver& driver() {
    TC_CHECK(!loop_, "the step loop drives this engine");
    return *driver_;
  }

  const ModelGeometry& geometry() const { return geometry_; }
  const deepseek_v4::Weights& weights() const { return *weights_; }
  const EngineOptions& options() const { return options_; }
  /// Tokens a sequence may reach: options().max_context, or what the KV cache holds where that is less.
  int64_t max_context() const { return step_->options().max_context; }
  const Topology& topology() const { return topology_; }
  const CpuFeatures& cpu() const { return cpu_; }
  const cpu::KernelTable& kernels() const { return table_; }
  WorkerPool& pool() { return *pool_; }
  StepExecutor& step() { return *step_; }
  /// Whether options().machine says how fast this engine is: of exact kernels, on devices that it knows.
  bool predictable() const;
  /// What the steps took and should have; empty where options().machine does not say. The loop's, once started, is in
  /// its stats().
  ForecastStats forecast() const { return forecast_ ? forecast_->stats() : ForecastStats(); }
  /// The step on devices; null where the CPU does all of it.
  DeepseekV4GpuStep* gpu_step() { return gpu_step_; }

 private:
  Engine() = default;
  Status open_disk();
  Status open_recorder(bool on_cpu);
  void know_costs();
  void settle_prefetch();
  void open_forecast();
  void open_tiers(const sched::MemoryPlan& plan);
  std::vector<StepExecutor::Recorder*> recorders() const;
  StepLoop& loop() const {
    TC_CHECK(loop_ != nullptr, "Engine::start comes first");
    return *loop_;
  }

  EngineOptions options_;
  ModelGeometry geometry_;
  Topology topology_;
  CpuFeatures cpu_;
  cpu::KernelTable table_;
  std::unique_ptr<WorkerPool> pool_;
  std::unique_ptr<deepseek_v4::Weights> weights_;
  std::unique_ptr<KvStore> kv_;
  std::unique_ptr<ExpertRecorder> recorder_;
  std::unique_ptr<StepForecast> forecast_;
  std::unique_ptr<StepMeters> meters_;  // once started
  std::vector<MemoryTier> tiers_;
  std::unique_ptr<StepExecutor> step_;
  DeepseekV4GpuStep* gpu_step_ = nullptr;  // step_, where it is one
  bool interpreted_ = false;               // its devices: what cards do says nothing of them
  std::unique_ptr<StepDriver> driver_;
  std::unique_ptr<NvmeTier> kv_disk_;
  std::string cache_identity_;      // where there is a disk
  std::unique_ptr<StepLoop> loop_;  // ends first
};

}  // namespace thermocline
