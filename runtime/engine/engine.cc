#include "runtime/engine/engine.h"

#include <algorithm>

#include <xxhash.h>

#include "kernels_gpu/open_device.h"
#include "runtime/base/log.h"
#include "runtime/engine/cache_identity.h"
#include "runtime/engine/engine_memory.h"
#include "runtime/engine/machine_info.h"
#include "runtime/engine/model_costs.h"
#include "runtime/engine/stored_profile.h"
#include "runtime/hw/host_memory.h"
#include "runtime/io/file.h"
#include "runtime/model/deepseek_v4/config.h"

namespace thermocline {
namespace {

// A file that a flag names is no part of the model.
Error of_flag(const char* flag, Error error) {
  error.field = flag;
  return error;
}

Status settle_context(const ModelGeometry& geometry, EngineOptions& options) {
  const int64_t limit = geometry.max_position_embeddings;
  if (options.max_context == 0) options.max_context = std::min(limit, EngineOptions::kDefaultContext);
  if (options.max_context < 1 || options.max_context > limit)
    return invalid("a context of " + std::to_string(options.max_context) + " tokens is outside 1.." +
                   std::to_string(limit) + ", the model's limit");
  if (options.max_sequences < 1 || options.max_sequences > 4096)
    return invalid("--max-num-seqs is " + std::to_string(options.max_sequences) + ", outside 1..4096");
  // Everybody who decodes has a token in every step, and a row of logits.
  options.max_chunk =
      std::max<int64_t>(std::clamp<int64_t>(options.max_chunk, 1, options.max_context), options.max_sequences);
  options.max_logit_rows = std::max<int64_t>(options.max_logit_rows, options.max_sequences);
  return {};
}

Status check(const EngineOptions& o) {
  if (o.int8_activations && o.numerics == Numerics::fp32)
    return invalid("INT8 activations and the fp32 numerics exclude each other");
  if (o.kv_dtype != KvDtype::automatic && o.numerics == Numerics::fp32)
    return invalid("the fp32 numerics keep the KV cache in f32: leave out --kv-cache-dtype");
  if (o.threads < 0 || o.threads > 4096)
    return invalid("a thread count of " + std::to_string(o.threads) + " is outside 0..4096");
  return {};
}

// Experts behind the chosen ones that a trace keeps too.
int near_misses(const ModelGeometry& g, const EngineOptions& o) {
  return o.record_trace.empty() ? 0 : std::min(g.n_activated_experts, g.n_routed_experts - g.n_activated_experts);
}

std::string unused_device_settings(const EngineOptions& o) {
  std::string unused = o.gpu_memory > 0 ? "--gpu-memory" : "";
  if (o.gpu.experts >= 0) unused += unused.empty() ? "--experts-on-gpu" : " and --experts-on-gpu";
  return unused;
}

// Experts that a trace keeps of a router asked ahead.
int guesses(const ModelGeometry& g, const EngineOptions& o) {
  constexpr int kMost = 64;  // that a trace keeps
  return o.record_trace.empty() ? 0 : std::min({g.n_activated_experts + 2, g.n_routed_experts, kMost});
}

}  // namespace

Result<std::unique_ptr<Engine>> Engine::open(const EngineOptions& options) {
  std::unique_ptr<Engine> engine(new Engine());
  engine->options_ = options;
  EngineOptions& o = engine->options_;
  TC_ASSIGN(engine->geometry_, deepseek_v4::read_config(o.model));
  TC_RETURN_IF_ERROR(settle_context(engine->geometry_, o));
  TC_ASSIGN(engine->topology_, read_topology(o.topology));
  if (!engine->topology_.note.empty()) log_warn("{}", engine->topology_.note);
  TC_RETURN_IF_ERROR(check(o));
  if (const std::string note = engine->topology_.threads_note(); o.threads == 0 && !note.empty())
    log_info("threads: {}", note);
  TC_ASSIGN(const gpu::DeviceChoice choice, gpu::parse_device(o.device));
  TC_ASSIGN(std::vector<std::unique_ptr<gpu::Device>> devices, gpu::open_devices(choice, o.gpu_memory));
  engine->cpu_ = detect_cpu_features();
  if (const std::string unused = unused_device_settings(o); devices.empty() && !unused.empty())
    log_warn("without a device {} changes nothing", unused);
  engine->table_ =
      o.numerics == Numerics::fp32 ? cpu::scalar::table() : cpu::make_kernel_table(engine->cpu_, o.max_isa);
  log_debug("{}; {}", engine->cpu_.model, engine->table_.to_string());
  if (const int best = engine->topology_.default_threads(); o.threads > 2 * best && !engine->topology_.synthetic)
    log_warn("{} threads where {} would be best wait for each other: leave out {}", o.threads, best, o.threads_source);
  engine->pool_ = std::make_unique<WorkerPool>(engine->topology_, o.threads);
  const cpu::CpuContext cpu{*engine->pool_, engine->table_};
  if (!o.machine && o.calibrated) o.machine = calibrated_profile(machine_of(*engine));

  // What refuses a model does so from its headers, before its weights are read.
  TC_ASSIGN(deepseek_v4::WeightLoader loader,
            deepseek_v4::WeightLoader::open(o.model, engine->geometry_,
                                            {.read_mode = o.direct_io ? ReadMode::direct : ReadMode::buffered,
                                             .mtp = o.mtp,
                                             .quiet = o.quiet,
                                             .threads = o.threads,
                                             .pool = engine->pool_.get(),
                                             .cancel = o.cancel,
                                             .progress = o.progress}));
  const ExecOptions wanted{.max_tokens = o.max_chunk,
                           .max_logit_rows = o.max_logit_rows,
                           .max_context = o.max_context,
                           .mtp = o.mtp,
                           .near_misses = devices.empty() ? near_misses(engine->geometry_, o) : 0,
                           .guesses = devices.empty() ? guesses(engine->geometry_, o) : 0,
                           .int8_activations = o.int8_activations,
                           .fp8_rows = o.kv_dtype != KvDtype::bf16 && o.numerics != Numerics::fp32};
  if (!devices.empty()) {
    const Status supported = DeepseekV4GpuStep::supported(engine->geometry_, loader.shapes(), o.numerics, wanted);
    if (!supported.ok() && choice.kind != gpu::DeviceChoice::Kind::automatic) return supported.error();
    if (!supported.ok()) {
      log_warn("the CPU does all of it: {}", supported.error().message);
      devices.clear();
    }
  }
  if (o.kv_dtype == KvDtype::bf16 && !devices.empty())
    return invalid("devices keep the KV cache in FP8, exactly: leave out --kv-cache-dtype bf16, or use --device none");
  engine->interpreted_ = !devices.empty() && devices[0]->kind() == gpu::DeviceKind::simt;
  if (!devices.empty()) engine->settle_prefetch();
  TC_ASSIGN(const EngineMemory memory,
            plan_engine_memory(o, engine->geometry_, loader, cpu, wanted, devices, free_memory()));
  log_debug("memory\n{}", memory.plan.to_string());
  o.kv_tokens = memory.kv.max_tokens;
  o.max_sequences = memory.kv.max_sequences;
  o.prefix_cache_bytes = memory.prefix_cache_bytes;
  const ExecOptions& exec = memory.exec;

  TC_RETURN_IF_ERROR(engine->open_recorder(devices.empty()));
  std::string names;  // of the devices
  for (const std::unique_ptr<gpu::Device>& device : devices) names += device->name() + ";";
  TC_RETURN_IF_ERROR(engine->open_disk());
  TC_ASSIGN(engine->weights_, loader.load());
  const HostMemoryLedger ledger;
  TC_ASSIGN(engine->kv_, KvStore::create(engine->geometry_, memory.kv));
  if (devices.empty()) {
    TC_ASSIGN(engine->step_, DeepseekV4Step::create(engine->geometry_, *engine->weights_, cpu, o.numerics, exec));
  } else {
    engine->know_costs();
    TC_ASSIGN(std::unique_ptr<DeepseekV4GpuStep> step,
              DeepseekV4GpuStep::create(engine->geometry_, *engine->weights_, cpu, o.numerics, exec, o.gpu,
                                        *engine->kv_, std::move(devices)));
    engine->gpu_step_ = step.get();
    engine->kv_->attach(*step);
    if (!o.quiet)
      for (const std::string& line : step->describe()) log_info("{}", line);
    engine->step_ = std::move(step);
  }
  if (engine->kv_disk_) {
    TC_ASSIGN(engine->cache_identity_, cache_identity(o, *engine->weights_, cpu, engine->kv_->layout(), names));
  }
  engine->open_forecast();
  engine->open_tiers(memory.plan);
  engine->step_->set_recorders(engine->recorders());
  engine->driver_ = std::make_unique<StepDriver>(*engine->step_, *engine->kv_);
  if (o.cancel && *o.cancel) return Error{ErrorCode::cancelled, "loading was cancelled"};
  ledger.make_resident(*engine->pool_);
  o.cancel = nullptr;  // both belong to the caller, and to loading
  o.progress = nullptr;
  return engine;
}

// Near misses: where steps report them, on the CPU.
Status Engine::open_recorder(bool on_cpu) {
  EngineOptions& o = options_;
  if (o.record_trace.empty() && o.expert_profile.empty()) return {};
  TC_ASSIGN(const std::string config, read_text_file(o.model / "config.json"));
  const sched::TraceHeader header{.model = o.model.filename().string(),
                                  .model_hash = XXH3_64bits(config.data(), config.size()),
                                  .layers = geometry_.n_layers,
                                  .experts = geometry_.n_routed_experts,
                                  .top_k = geometry_.n_activated_experts,
                                  .near_misses = on_cpu ? near_misses(geometry_, o) : 0,
                                  .token_ids = o.trace_token_ids,
                                  .guesses = on_cpu ? guesses(geometry_, o) : 0};
  if (!o.record_trace.empty() && o.record_trace == o.expert_profile)
    return invalid("--record-trace and --expert-profile name the same file");
  if (!o.expert_profile.empty()) {
    const ExpertProfile model{header.model_hash, header.layers, header.experts, {}};
    Result<ExpertProfile> profile = read_expert_profile(o.expert_profile, model);
    if (!profile && profile.error().code != ErrorCode::not_found)
      return of_flag("--expert-profile", std::move(profile).error());
    if (profile) o.gpu.profile.assign(profile->uses.begin(), profile->uses.end());
  }
  auto recorder = ExpertRecorder::open({o.record_trace, o.expert_profile}, header);
  if (!recorder) return of_flag("--record-trace", std::move(recorder).error());
  recorder_ = std::move(*recorder);
  return {};
}

// One that another server uses is a service less, not a reason to serve nobody.
Status Engine::open_disk() {
  if (options_.kv_disk.folder.empty()) return {};
  if (options_.prefix_cache_bytes == 0)
    return invalid("a folder for the KV cache, and no prefix cache: leave out --kv-disk-dir or --no-prefix-cache");
  Result<std::unique_ptr<NvmeTier>> disk = NvmeTier::open(options_.kv_disk);
  if (!disk && disk.error().code == ErrorCode::invalid_argument) return std::move(disk).error().with("--kv-disk-dir");
  if (disk)
    kv_disk_ = std::move(*disk);
  else
    log_warn("{}: going on without it", disk.error().message);
  return {};
}

Status Engine::start(const Tokenizer& tokenizer, const LoopOptions& options) {
  TC_CHECK(!loop_, "an engine is started once");
  meters_ = std::make_unique<StepMeters>(*step_, *pool_, geometry_, model_costs(geometry_, step_->options().fp8_rows),
                                         !gpu_step_);
  TC_ASSIGN(
      loop_,
      StepLoop::start(
          {.step = *step_,
           .kv = *kv_,
           .pool = *pool_,
           .geometry = geometry_,
           .tokenizer = tokenizer,
           .max_context = options_.max_context,
           .prefix_cache = {.bytes = options_.prefix_cache_bytes, .model = cache_identity_, .disk = kv_disk_.get()},
           .recorders = recorders(),
           .forecast = forecast_.get(),
           .meters = meters_.get()},
          options));
  return {};
}

// A worker's own cache beside what it works on. In the interpreter the device's attention is the CPU's own work:
// nothing to be had but what a test asks for.
void Engine::settle_prefetch() {
  ExpertPrefetch::Options& prefetch = options_.gpu.prefetch;
  if (prefetch.mode == ExpertPrefetch::Mode::automatic && interpreted_) prefetch.mode = ExpertPrefetch::Mode::off;
  constexpr uint64_t kUsualCache = 1 << 20;
  const uint64_t cache = topology_.core_cache_bytes > 0 ? topology_.core_cache_bytes : kUsualCache;
  if (prefetch.worker_bytes == 0) prefetch.worker_bytes = static_cast<int64_t>(cache / 4 * 3);
}

// What steps on devices would otherwise have to measure or to guess.
void Engine::know_costs() {
  if (!options_.machine || options_.machine->gpus.empty() || interpreted_) return;
  const sched::ModelCosts model = model_costs(geometry_, true);
  const sched::CostModel cost(model, *options_.machine);
  options_.gpu.costs = sched::expert_costs(cost);
  options_.gpu.idle_copies = sched::idle_copies(cost);
}

// What was planned; of experts on devices, the slots there are.
void Engine::open_tiers(const sched::MemoryPlan& plan) {
  uint64_t expert_bytes = 0;
  for (const deepseek_v4::LayerWeights& layer : weights_->layers)
    for (const cpu::ExpertWeights& expert : layer.experts) expert_bytes += expert.bytes();
  tiers_ = thermocline::memory_tiers(plan, expert_bytes);
  for (int i = 0; gpu_step_ && i < gpu_step_->parts(); ++i) {
    const SlotPool& slots = gpu_step_->part(i).slots();
    tiers_[static_cast<size_t>(i)].part("experts").bytes = static_cast<uint64_t>(slots.slots() * slots.layout().bytes);
  }
}

std::vector<MemoryTier> Engine::memory_tiers(const EngineStats& stats) const {
  const auto part_of = [](uint64_t bytes, int64_t part, int64_t whole) {
    return whole > 0 ? static_cast<uint64_t>(static_cast<double>(bytes) * static_cast<double>(part) /
                                             static_cast<double>(whole))
                     : 0;
  };
  std::vector<MemoryTier> tiers = tiers_;
  for (MemoryTier& tier : tiers)
    for (TierPart& part : tier.parts) {
      if (part.kind == "kv") part.used_bytes = part_of(part.bytes, stats.kv_tokens_used, stats.kv_tokens_total);
      if (part.kind == "prefix") part.used_bytes = static_cast<uint64_t>(stats.prefix_cache.checkpoint_bytes);
      if (part.kind == "experts" && tier.name != "ram")
        part.used_bytes = part_of(part.bytes, stats.measures.resident_experts, stats.experts.slots);
    }
  if (kv_disk_)
    tiers.push_back(
        {"nvme", options_.kv_disk.space_bytes, {{"kv", static_cast<uint64_t>(stats.prefix_cache.disk.log.bytes)}}});
  return tiers;
}

bool Engine::predictable() const {
  if (!options_.machine || options_.int8_activations || options_.numerics == Numerics::fp32) return false;
  return !gpu_step_ || (!options_.machine->gpus.empty() && !interpreted_);
}

void Engine::open_forecast() {
  if (!predictable()) return;
  sched::MachineProfile box = *options_.machine;
  if (!gpu_step_) box.gpus.clear();
  forecast_ = std::make_unique<StepForecast>(model_costs(geometry_, step_->options().fp8_rows), std::move(box));
}

std::vector<StepExecutor::Recorder*> Engine::recorders() const {
  std::vector<StepExecutor::Recorder*> recorders;
  if (recorder_) recorders.push_back(recorder_.get());
  if (forecast_) recorders.push_back(forecast_.get());
  if (meters_) recorders.push_back(meters_.get());
  return recorders;
}

}  // namespace thermocline
