#include "runtime/exec/deepseek_v4_gpu_step.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include <fmt/format.h>

#include "kernels_cpu/ref/ops.h"
#include "runtime/hw/host_memory.h"

namespace thermocline {
namespace ref = cpu::ref;
using sched::ExpertId;
using sched::Segment;

Result<PrefillMode> parse_prefill_mode(std::string_view name) {
  if (name == "cpu") return PrefillMode::cpu;
  if (name == "stream") return PrefillMode::stream;
  if (name == "hybrid") return PrefillMode::hybrid;
  return invalid("unknown prefill mode '" + std::string(name) + "': use cpu, stream or hybrid");
}

namespace {

constexpr int kLayersAhead = 4;  // queued before the CPU answers: some 120 launches; CUDA takes about 1,000

uint32_t load_acquire(const uint32_t* p) {
  return std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(p)).load(std::memory_order_acquire);
}
void store_release(uint32_t* p, uint32_t x) { std::atomic_ref<uint32_t>(*p).store(x, std::memory_order_release); }

int64_t bucket_of(int64_t tokens) {
  int64_t bucket = 1;
  while (bucket < tokens) bucket *= 2;
  return bucket;
}

}  // namespace

DeepseekV4GpuStep::DeepseekV4GpuStep(const ModelGeometry& geometry, const deepseek_v4::Weights& weights,
                                     cpu::CpuContext cpu, Numerics numerics, const ExecOptions& options,
                                     const GpuOptions& gpu)
    : StepExecutor(options),
      g_(geometry),
      w_(weights),
      traffic_(cpu.pool.size(), cpu.pool.nodes()),
      cpu_{cpu.pool, cpu.table, &traffic_},
      round_(rounding_of(numerics)),
      gpu_(gpu) {
  frequencies_[0] = ref::rope_frequencies(g_.rope_head_dim, g_.rope_theta);
  frequencies_[1] = ref::rope_frequencies(g_.rope_head_dim, g_.compress_rope_theta, g_.rope_factor, g_.original_seq_len,
                                          g_.beta_fast, g_.beta_slow);
  routed_ids_.resize(static_cast<size_t>(g_.n_layers));
}

// What the kernels take. Every published V4 geometry passes.
Status DeepseekV4GpuStep::supported(const ModelGeometry& g, const deepseek_v4::Weights& w, Numerics numerics,
                                    const ExecOptions& options) {
  const auto refuse = [](const std::string& what) {
    return unsupported("on a device " + what + "; use --device none");
  };
  if (numerics == Numerics::fp32) return refuse("the fp32 numerics do not run: its tensor cores take bf16");
  if (options.int8_activations) return refuse("INT8 activations do not run");
  const auto multiple = [&](const char* name, int64_t value, int64_t of) -> Status {
    if (value % of == 0) return {};
    return refuse(fmt::format("{} should be a multiple of {}, and is {}", name, of, value));
  };
  TC_RETURN_IF_ERROR(multiple("hidden_size", g.dim, 32));
  TC_RETURN_IF_ERROR(multiple("q_lora_rank", g.q_lora_rank, 32));
  TC_RETURN_IF_ERROR(multiple("head_dim", g.head_dim, 32));
  TC_RETURN_IF_ERROR(multiple("qk_rope_head_dim", g.rope_head_dim, 16));
  TC_RETURN_IF_ERROR(multiple("index_head_dim", g.index_head_dim, 32));
  TC_RETURN_IF_ERROR(multiple("moe_intermediate_size", g.moe_inter_dim, 32));
  TC_RETURN_IF_ERROR(multiple("o_lora_rank", g.o_lora_rank, 16));
  TC_RETURN_IF_ERROR(multiple("o_groups x o_lora_rank", g.o_groups * g.o_lora_rank, 32));
  TC_RETURN_IF_ERROR(multiple("heads x head_dim / o_groups", g.n_heads * g.head_dim / g.o_groups, 32));
  const auto most = [&](const char* name, int64_t value, int64_t limit) -> Status {
    if (value <= limit) return {};
    return refuse(fmt::format("{} may be {}, and is {}", name, limit, value));
  };
  TC_RETURN_IF_ERROR(most("hidden_size", g.dim, 8192));
  TC_RETURN_IF_ERROR(most("head_dim", g.head_dim, 512));
  TC_RETURN_IF_ERROR(most("q_lora_rank", g.q_lora_rank, 2048));
  TC_RETURN_IF_ERROR(most("hc_mult", g.hc_mult, 5));
  TC_RETURN_IF_ERROR(most("o_groups", g.o_groups, 64));
  TC_RETURN_IF_ERROR(most("n_routed_experts", g.n_routed_experts, 1024));
  TC_RETURN_IF_ERROR(most("num_experts_per_tok", g.n_activated_experts, 32));
  TC_RETURN_IF_ERROR(most("index_n_heads", g.index_n_heads, 64));
  TC_RETURN_IF_ERROR(most("index_head_dim", g.index_head_dim, 256));
  for (const deepseek_v4::LayerWeights& layer : w.layers)
    if (layer.experts[0].w1.format == cpu::WeightFormat::int8 || layer.experts[0].w1.format == cpu::WeightFormat::int4)
      return refuse("INT8 and INT4 experts do not run");
  return {};
}

// The layers in equal shares, a part a device.
std::vector<PartOptions> DeepseekV4GpuStep::part_options(const ModelGeometry& g, const deepseek_v4::Weights& weights,
                                                         Numerics numerics, const ExecOptions& options,
                                                         const GpuOptions& gpu, size_t devices) {
  const int count = std::min(static_cast<int>(devices), g.n_layers);
  std::vector<PartOptions> parts(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    PartOptions& o = parts[static_cast<size_t>(i)];
    o.first_layer = g.n_layers * i / count;
    o.last_layer = g.n_layers * (i + 1) / count;
    // A captured decode step has as many rows as its bucket.
    o.max_tokens = std::max(options.max_tokens, bucket_of(std::min(options.max_tokens, kDecodeTokens)));
    o.max_logit_rows = std::max(options.max_logit_rows, bucket_of(std::min(options.max_logit_rows, kDecodeTokens)));
    o.max_context = options.max_context;
    o.hot_rows = options.hot_rows;
    o.mtp = options.mtp && !weights.mtp.empty() && o.last_layer == g.n_layers;
    o.round_linear = rounding_of(numerics).linear_inputs;
    o.experts = gpu.experts < 0 ? -1 : gpu.experts * (i + 1) / count - gpu.experts * i / count;
    o.staging = gpu.prefill == PrefillMode::cpu ? 0 : 2 * std::min(8, g.n_routed_experts);
  }
  return parts;
}

// What the CPU's half of a step works on.
Status DeepseekV4GpuStep::allocate_host_side(int64_t m) {
  TC_ASSIGN(x_, cpu::GemmInput::allocate(m, g_.dim));
  TC_ASSIGN(moe_, cpu::MoeWorkspace::allocate(cpu_.pool.size(), m, g_.n_activated_experts, g_.n_routed_experts, g_.dim,
                                              g_.moe_inter_dim));
  TC_ASSIGN(ids_, HostArray<int32_t>::allocate(m * g_.n_activated_experts));
  TC_ASSIGN(weights_, HostArray<float>::allocate(m * g_.n_activated_experts));
  TC_ASSIGN(taken_, HostArray<int32_t>::allocate(m));
  if (gpu_.prefill != PrefillMode::cpu) {
    TC_ASSIGN(pair_rows_, HostArray<bf16>::allocate(m * g_.n_activated_experts * g_.dim));
  }
  return {};
}

void DeepseekV4GpuStep::plan_memory(sched::MemoryPlan& plan, const ModelGeometry& g, const deepseek_v4::Weights& shapes,
                                    cpu::CpuContext cpu, Numerics numerics, const ExecOptions& options,
                                    const GpuOptions& gpu, const KvStore& kv,
                                    const std::vector<std::unique_ptr<gpu::Device>>& devices) {
  constexpr int kHost = sched::MemoryPlan::kHost;
  const std::string lower_kv = "lower --max-model-len, --max-num-seqs or --kv-gpu-memory";
  const std::vector<PartOptions> parts = part_options(g, shapes, numerics, options, gpu, devices.size());
  uint64_t pinned = 0, host_rows = 0, interpreted = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const gpu::Device& device = *devices[i];
    const DevicePart::Sizes s = DevicePart::sizes(g, shapes, kv, parts[i]);
    const int tier = static_cast<int>(i);
    const int64_t residents = std::clamp<int64_t>(parts[i].experts, 0, s.experts) * s.slot;
    plan.set_capacity(tier, device.free_bytes(), device.name());
    plan.add(tier, "dense weights", static_cast<uint64_t>(s.dense), "give --gpu-memory more");
    plan.add(tier, KvStore::kPlanOwner, static_cast<uint64_t>(s.kv()), lower_kv);
    plan.add(tier, "step buffers", static_cast<uint64_t>(s.buffers() + s.slot_table + DevicePart::Sizes::kSlack),
             "lower --max-num-batched-tokens");
    if (s.staging > 0)
      plan.add(tier, fmt::format("{} staged experts", parts[i].staging), static_cast<uint64_t>(s.staging));
    if (residents > 0)
      plan.add(tier, fmt::format("{} experts", residents / s.slot), static_cast<uint64_t>(residents),
               "lower --experts-on-gpu");
    pinned += static_cast<uint64_t>(s.pinned());
    host_rows += static_cast<uint64_t>(s.host_rows);
    const int64_t all = s.fixed() + (parts[i].experts < 0 ? s.experts * s.slot : residents);
    if (device.kind() == gpu::DeviceKind::simt)
      interpreted += std::min<uint64_t>(device.free_bytes(), static_cast<uint64_t>(all));
  }
  DeepseekV4GpuStep step(g, shapes, cpu, numerics, options, gpu);
  const HostMemoryMeasure measure;
  TC_CHECK(step.allocate_host_side(parts[0].max_tokens).ok());
  plan.add(kHost, "step buffers", measure.bytes() + pinned, "lower --max-num-batched-tokens");
  if (host_rows > 0) plan.add(kHost, KvStore::kPlanHostRows, host_rows, "lower --max-model-len or --kv-host-memory");
  if (interpreted > 0) plan.add(kHost, "memory of --device simt", interpreted, "lower --gpu-memory");
}

Result<std::unique_ptr<DeepseekV4GpuStep>> DeepseekV4GpuStep::create(
    const ModelGeometry& geometry, const deepseek_v4::Weights& weights, cpu::CpuContext cpu, Numerics numerics,
    const ExecOptions& options, const GpuOptions& gpu, const KvStore& kv,
    std::vector<std::unique_ptr<gpu::Device>> devices) {
  TC_RETURN_IF_ERROR(supported(geometry, weights, numerics, options));
  std::unique_ptr<DeepseekV4GpuStep> step(new DeepseekV4GpuStep(geometry, weights, cpu, numerics, options, gpu));
  const ModelGeometry& g = geometry;
  const std::vector<PartOptions> parts = part_options(g, weights, numerics, options, gpu, devices.size());
  const int count = static_cast<int>(parts.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    const PartOptions& o = parts[i];
    TC_ASSIGN(std::unique_ptr<DevicePart> part, DevicePart::create(std::move(devices[i]), g, weights, kv, o));
    TC_ASSIGN(const sched::PolicyInfo* const policy, sched::find_policy(gpu.policy));
    step->policies_.push_back(policy->make(step->policy_options(*part)));
    step->parts_.push_back(std::move(part));
  }
  // Copies from pageable memory would go through a bounce buffer, and not beside kernels.
  for (const NumaBuffer& arena : weights.arenas)
    TC_RETURN_IF_ERROR(step->parts_[0]->device().pin(arena.data(), arena.size()));
  TC_RETURN_IF_ERROR(step->allocate_host_side(parts[0].max_tokens));
  if (gpu.prefill == PrefillMode::hybrid) TC_RETURN_IF_ERROR(step->calibrate());
  // The slots are full before the first step; what a policy does later runs beside steps.
  for (int i = 0; i < count; ++i) {
    DevicePart& part = *step->parts_[static_cast<size_t>(i)];
    SlotPool& slots = part.slots();
    const std::unique_ptr<sched::ExpertPolicy> first = sched::make_static_policy(step->policy_options(part));
    for (const sched::Admission& a : first->plan(slots.residency(), slots.slots())) slots.fill(a.fill);
    TC_RETURN_IF_ERROR(slots.settle());
  }
  if (count == 1 && gpu.graphs) {
    DevicePart& part = *step->parts_[0];
    for (const bool scores : {false, true})
      for (int64_t tokens = 1; tokens <= bucket_of(std::min(options.max_tokens, kDecodeTokens)); tokens *= 2) {
        StepShape shape{tokens, std::min(tokens, part.options().max_logit_rows), 0, scores};
        part.host_tables(shape);
        part.stream().begin_capture();
        part.begin(shape);
        step->queue_decode(part);
        TC_ASSIGN(std::unique_ptr<gpu::Graph> graph, part.stream().end_capture());
        step->buckets_.push_back({shape, std::move(graph)});
      }
  }
  for (const std::unique_ptr<DevicePart>& part : step->parts_) part->device().seal();
  return step;
}

// Of a part, whose layers count from 0; an MTP block's is the last, without a profile.
sched::PolicyOptions DeepseekV4GpuStep::policy_options(const DevicePart& part) const {
  const PartOptions& o = part.options();
  sched::PolicyOptions options{.layers = o.last_layer - o.first_layer + (o.mtp ? 1 : 0),
                               .experts = g_.n_routed_experts,
                               .slots = part.slots().slots()};
  if (gpu_.profile.empty()) return options;
  const int64_t experts = g_.n_routed_experts;
  options.profile.assign(gpu_.profile.begin() + o.first_layer * experts, gpu_.profile.begin() + o.last_layer * experts);
  options.profile.resize(static_cast<size_t>(options.layers * experts));
  return options;
}

ExpertTraffic DeepseekV4GpuStep::expert_traffic() const {
  ExpertTraffic traffic{.pairs = counters_.pairs,
                        .device_pairs = counters_.pairs - counters_.cpu_pairs,
                        .layers = counters_.layers,
                        .zero_miss_layers = counters_.zero_miss_layers};
  for (const std::unique_ptr<DevicePart>& part : parts_) {
    const SlotPool::Counters& slots = part->slots().counters();
    traffic.slots += part->slots().slots();
    traffic.fills += slots.fills;
    traffic.evictions += slots.evictions;
    traffic.fill_bytes += slots.h2d_bytes;
  }
  return traffic;
}

DevicePart& DeepseekV4GpuStep::part_of(int layer) {
  for (const std::unique_ptr<DevicePart>& part : parts_)
    if (layer < part->options().last_layer) return *part;
  return *parts_.back();
}

// A greedy request never asks: V floats a row stay where they are.
TensorView<const float, 2> DeepseekV4GpuStep::logits() const {
  if (!logits_fetched_ && logit_rows_ > 0) {
    parts_.back()->fetch_logits(logit_rows_);
    (void)parts_.back()->stream().synchronize();  // a fault sticks, and fails the next step
    logits_fetched_ = true;
  }
  return {parts_.back()->logits(), {logit_rows_, g_.vocab_size}};
}
TensorView<const float, 2> DeepseekV4GpuStep::mtp_logits() const {
  return {parts_.back()->mtp_logits(), {mtp_rows_, g_.vocab_size}};
}

std::vector<std::string> DeepseekV4GpuStep::describe() const {
  std::vector<std::string> lines;
  for (const std::unique_ptr<DevicePart>& part : parts_) lines.push_back(part->memory_map());
  if (gpu_.prefill == PrefillMode::hybrid)
    lines.push_back(fmt::format(
        "an expert: copied in {:.0f} us; CPU {:.0f} us for 1 token, {:.0f} for 128; device {:.0f} and {:.0f}; {}",
        costs_.h2d_ns / 1e3, costs_.cpu.ns(1) / 1e3, costs_.cpu.ns(128) / 1e3, costs_.gpu.ns(1) / 1e3,
        costs_.gpu.ns(128) / 1e3,
        costs_.crossover() > 0 ? fmt::format("copying pays from {} tokens", costs_.crossover())
                               : "copying never pays"));
  return lines;
}

// All parts, whatever the first says: none may still touch the caller's bytes.
Status DeepseekV4GpuStep::synchronize() {
  Status first;
  for (const auto& part : parts_)
    if (Status status = part->stream().synchronize(); first.ok() && !status.ok()) first = std::move(status);
  return first;
}

Status DeepseekV4GpuStep::read(KvPool pool, int32_t page, std::byte* to) {
  for (const auto& part : parts_) {
    const std::span<std::byte> piece = part->kv_page(pool, page);
    part->stream().copy(to, piece.data(), piece.size(), gpu::CopyKind::d2h);
    to += piece.size();
  }
  for (const auto& part : parts_) {
    if (pool == KvPool::compressed) {
      const auto [rows, on_host] = part->selected_rows(page);
      if (on_host)
        std::memcpy(to, rows.data(), rows.size());
      else
        part->stream().copy(to, rows.data(), rows.size(), gpu::CopyKind::d2h);
      to += rows.size();
    }
  }
  return synchronize();
}

Status DeepseekV4GpuStep::write(KvPool pool, int32_t page, const std::byte* from) {
  for (const auto& part : parts_) {
    const std::span<std::byte> piece = part->kv_page(pool, page);
    part->stream().copy(piece.data(), from, piece.size(), gpu::CopyKind::h2d);
    from += piece.size();
  }
  for (const auto& part : parts_) {
    if (pool == KvPool::compressed) {
      const auto [rows, on_host] = part->selected_rows(page);
      if (on_host)
        std::memcpy(rows.data(), from, rows.size());
      else
        part->stream().copy(rows.data(), from, rows.size(), gpu::CopyKind::h2d);
      part->forget_hot_rows(page);
      from += rows.size();
    }
  }
  return synchronize();
}

Status DeepseekV4GpuStep::copy(KvPool pool, int32_t from, int32_t to) {
  for (const auto& part : parts_) {
    const std::span<std::byte> source = part->kv_page(pool, from), target = part->kv_page(pool, to);
    part->stream().copy(target.data(), source.data(), source.size(), gpu::CopyKind::d2d);
    if (pool == KvPool::compressed) {
      const auto [rows, on_host] = part->selected_rows(from);
      std::byte* const copy = part->selected_rows(to).bytes.data();
      if (on_host)
        std::memcpy(copy, rows.data(), rows.size());
      else
        part->stream().copy(copy, rows.data(), rows.size(), gpu::CopyKind::d2d);
      part->forget_hot_rows(to);
    }
    TC_RETURN_IF_ERROR(part->stream().status());
  }
  return {};
}

void DeepseekV4GpuStep::fill_tables(DevicePart& part, const StepShape& shape, const sched::Batch& batch,
                                    std::span<SequenceKv* const> sequences, std::span<const int32_t> next_ids,
                                    std::span<const int32_t> mtp_rows) {
  const DevicePart::Tables t = part.host_tables(shape);
  *t.step = step_number_;
  int32_t pages = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const SequenceKv& kv = *sequences[i];
    gpu::SequenceInfo& info = t.sequences[i];
    info = {kv.ring(), static_cast<int32_t>(kv.first_window_page()), pages,
            pages + static_cast<int32_t>(kv.window_pages().size())};
    TC_CHECK(pages + static_cast<int64_t>(kv.window_pages().size() + kv.compressed_pages().size()) <=
             part.page_capacity());
    pages =
        static_cast<int32_t>(std::copy(kv.window_pages().begin(), kv.window_pages().end(), t.pages + pages) - t.pages);
    pages = static_cast<int32_t>(
        std::copy(kv.compressed_pages().begin(), kv.compressed_pages().end(), t.pages + pages) - t.pages);
  }
  const int64_t m = shape.tokens, pairs = g_.rope_head_dim / 2, real = batch.size();
  std::fill_n(t.tokens, m, gpu::TokenInfo());
  for (const Segment& segment : batch.segments)
    for (int64_t i = 0; i < segment.num_tokens; ++i)
      t.tokens[segment.first_token + i] = {batch.token_ids[static_cast<size_t>(segment.first_token + i)],
                                           static_cast<int32_t>(segment.first_pos + i),
                                           segment.sequence,
                                           static_cast<int32_t>(segment.first_pos),
                                           static_cast<int32_t>(segment.first_token),
                                           static_cast<int32_t>(segment.num_tokens)};
  for (int64_t token = 0; token < m; ++token) {
    const int64_t pos = std::max(t.tokens[token].pos, 0);
    const auto angles = [&](int64_t table, int kind, int64_t at) {
      ref::rope_angles(frequencies_[kind], at, t.cos + (table * m + token) * pairs,
                       t.sin + (table * m + token) * pairs);
    };
    angles(0, 0, pos);
    angles(1, 1, pos);
    for (size_t r = 0; r < part.ratios().size(); ++r)
      angles(2 + static_cast<int64_t>(r), 1, pos / part.ratios()[r] * part.ratios()[r]);
  }
  for (int64_t i = 0; i < shape.logit_rows; ++i)
    t.rows[i] = i < static_cast<int64_t>(batch.logit_rows.size()) ? batch.logit_rows[static_cast<size_t>(i)] : 0;
  std::copy(mtp_rows.begin(), mtp_rows.end(), t.mtp_rows);
  if (part.options().first_layer == 0)
    for (int64_t token = 0; token < m; ++token)
      std::copy_n(
          w_.embed + (token < real ? static_cast<int64_t>(batch.token_ids[static_cast<size_t>(token)]) : 0) * g_.dim,
          g_.dim, t.embed + token * g_.dim);
  if (shape.mtp_rows > 0) {
    for (int64_t token = 0; token < m; ++token) {
      const int64_t id = token < real ? std::max(next_ids[static_cast<size_t>(token)], 0) : 0;
      std::copy_n(w_.embed + id * g_.dim, g_.dim, t.mtp_embed + token * g_.dim);
    }
  }
}

Result<StepReport> DeepseekV4GpuStep::compute(const StepInput& input) {
  const auto& [batch, sequences, next_ids, stop] = input;
  const auto start = std::chrono::steady_clock::now();
  TC_RETURN_IF_ERROR(check(g_, options_, batch, sequences));
  if (stop && stop->stop_requested()) return Error{ErrorCode::cancelled, "nobody wants this step any more"};
  for (const std::unique_ptr<DevicePart>& part : parts_) TC_RETURN_IF_ERROR(part->stream().status());
  if (batch.size() == 0) {
    logit_rows_ = mtp_rows_ = 0;
    return StepReport{};
  }
  const WorkerPool::StepScope scope(cpu_.pool);
  traffic_.reset();
  for (const Segment& segment : batch.segments)
    TC_RETURN_IF_ERROR(sequences[segment.sequence]->reserve(segment.num_tokens));

  StepShape shape;
  const int64_t rows = static_cast<int64_t>(batch.logit_rows.size());
  const bool decode = batch.size() <= kDecodeTokens;
  shape.tokens = decode ? bucket_of(batch.size()) : batch.size();
  for (int i = 0; i < g_.n_layers; ++i)
    if (g_.kind(i) == LayerKind::csa)
      for (const Segment& segment : batch.segments)
        shape.scores =
            shape.scores ||
            (segment.first_pos + segment.num_tokens) / g_.compress_ratios[static_cast<size_t>(i)] > g_.index_topk;
  const bool with_mtp = !next_ids.empty() && parts_.back()->options().mtp;
  std::vector<int32_t> mtp_rows;
  if (with_mtp)
    for (const int32_t row : batch.logit_rows)
      if (next_ids[static_cast<size_t>(row)] >= 0) mtp_rows.push_back(row);
  const int64_t wanted_mtp_rows = static_cast<int64_t>(mtp_rows.size());
  // The MTP block runs for its rows in the cache even where no logits of it are wanted.
  if (with_mtp && wanted_mtp_rows == 0) mtp_rows.push_back(0);
  shape.mtp_rows = static_cast<int64_t>(mtp_rows.size());

  const bool graph = decode && rows > 0 && !with_mtp && !observer_ && !buckets_.empty();
  shape.logit_rows = graph ? std::min(shape.tokens, parts_[0]->options().max_logit_rows) : rows;
  ++step_number_;
  for (const std::unique_ptr<DevicePart>& part : parts_) {
    part->slots().begin_step(part->stream());
    fill_tables(*part, shape, batch, sequences, next_ids, mtp_rows);
  }
  const bool host_split = !decode && gpu_.prefill != PrefillMode::cpu;
  const Status ran = graph ? run_graph(shape) : run_layers(shape, batch.size(), host_split, with_mtp);
  Status status = ran;
  for (const std::unique_ptr<DevicePart>& part : parts_) {
    const Status synced = part->stream().synchronize();
    if (status.ok() && !synced.ok()) status = synced;
    part->slots().end_step();
    const HotRows counts = part->take_hot_row_counts();
    hot_rows_ = {hot_rows_.found + counts.found, hot_rows_.copied + counts.copied, hot_rows_.left + counts.left};
  }
  TC_RETURN_IF_ERROR(std::move(status));
  logit_rows_ = rows;
  logits_fetched_ = false;
  mtp_rows_ = wanted_mtp_rows;
  for (const Segment& segment : batch.segments) sequences[segment.sequence]->commit(segment.num_tokens);
  observe_step(batch.size(), batch.segments.size() == 1 && batch.size() > 1);
  for (int layer = 0; layer < g_.n_layers; ++layer)
    routed_ids_[static_cast<size_t>(layer)] = part_of(layer).host_ids(layer);
  const std::chrono::duration<double, std::nano> ns = std::chrono::steady_clock::now() - start;
  return StepReport{batch.size(),
                    rows,
                    ns.count(),
                    traffic_.total_bytes(),
                    {batch.size(), g_.n_activated_experts, 0, routed_ids_, {}, {}}};
}

std::optional<int32_t> DeepseekV4GpuStep::most_likely(int64_t row) const {
  TC_CHECK(row >= 0 && row < logit_rows_);
  const int32_t id = parts_.back()->most_likely()[row];
  return id < 0 ? std::nullopt : std::optional(id);  // not finite: whoever reads the logits says so
}

void DeepseekV4GpuStep::queue_decode(DevicePart& part) {
  part.embed();
  for (int layer = 0; layer < g_.n_layers; ++layer) {
    part.attention(layer);
    part.experts_begin(layer);
    part.experts_end(layer);
  }
  part.head();
  part.end();
}

Status DeepseekV4GpuStep::run_graph(const StepShape& shape) {
  DevicePart& part = *parts_[0];
  for (Bucket& bucket : buckets_) {
    if (bucket.shape.tokens != shape.tokens || bucket.shape.scores != shape.scores) continue;
    part.stream().launch(*bucket.graph);
    ++counters_.graph_launches;
    for (int layer = 0; layer < g_.n_layers; ++layer) TC_RETURN_IF_ERROR(answer(part, layer, shape));
    return {};
  }
  TC_CHECK(false, "every bucket is captured");
  return {};
}

Status DeepseekV4GpuStep::run_layers(const StepShape& shape, int64_t tokens, bool host_split, bool with_mtp) {
  for (const std::unique_ptr<DevicePart>& part : parts_) part->begin(shape);
  int answered = 0;  // layers
  const auto answer_up_to = [&](int layer) -> Status {
    for (; !host_split && answered < layer; ++answered) TC_RETURN_IF_ERROR(answer(part_of(answered), answered, shape));
    return {};
  };
  const auto run_layer = [&](DevicePart& part, int layer) -> Status {
    // A driver's queue is finite, and a full one blocks: the layers it waits for must not wait for this thread.
    TC_RETURN_IF_ERROR(answer_up_to(layer - kLayersAhead));
    part.attention(layer);
    if (host_split) {
      TC_RETURN_IF_ERROR(split_on_host(part, layer, shape));
    } else {
      part.experts_begin(layer);
      part.experts_end(layer);
    }
    if (!observer_ || layer >= g_.n_layers) return {};
    TC_RETURN_IF_ERROR(answer_up_to(layer + 1));
    observed_.resize(static_cast<size_t>(shape.tokens * g_.hc_mult * g_.dim));
    part.read_streams(observed_.data());
    TC_RETURN_IF_ERROR(part.stream().synchronize());
    observer_(layer, {observed_.data(), {tokens, g_.hc_mult, g_.dim}});  // without the bucket's padding
    return {};
  };
  parts_[0]->embed();
  for (size_t i = 0; i < parts_.size(); ++i) {
    DevicePart& part = *parts_[i];
    if (i > 0) {
      parts_[i - 1]->stream().record(parts_[i - 1]->done());
      part.receive_streams(*parts_[i - 1]);
    }
    for (int layer = part.options().first_layer; layer < part.options().last_layer; ++layer)
      TC_RETURN_IF_ERROR(run_layer(part, layer));
  }
  DevicePart& last = *parts_.back();
  last.head();
  if (with_mtp) {
    last.mtp();
    TC_RETURN_IF_ERROR(run_layer(last, g_.n_layers));
    last.mtp_head();
  }
  for (const std::unique_ptr<DevicePart>& part : parts_) part->end();
  return answer_up_to(g_.n_layers + (with_mtp ? 1 : 0));
}

// The pairs in ids_ and weights_, from x in pinned memory, into out by rising expert, then token.
void DeepseekV4GpuStep::compute_pairs(DevicePart& part, int layer, int64_t tokens, bf16* out) {
  const cpu::InputFormat plain{cpu_.table.activation, false}, routed{cpu_.table.activation, round_.linear_inputs};
  const bf16* const x = part.host_x();
  x_.reshape(cpu_.table, plain.activation, tokens, g_.dim);
  cpu_.pool.split(tokens, [&](int64_t begin, int64_t end, int) {
    constexpr int64_t kPiece = 512;
    float piece[kPiece];
    for (int64_t token = begin; token < end; ++token) {
      const cpu::RowChunks chunks = x_.row({0, tokens}, token);
      for (int64_t at = 0; at < g_.dim; at += kPiece) {
        const int64_t count = std::min(kPiece, g_.dim - at);
        for (int64_t i = 0; i < count; ++i) piece[i] = bf16_to_float(x[token * g_.dim + at + i]);
        cpu::store_row(plain, piece, count, {chunks.first + at / cpu::kTileCols * chunks.stride, chunks.stride});
      }
    }
  });
  const int64_t k = g_.n_activated_experts;
  cpu::moe_pairs(cpu_, layer_weights(layer).experts, x_, {ids_.data(), {tokens, k}}, {weights_.data(), {tokens, k}},
                 {g_.swiglu_limit, true, routed, routed}, moe_, out);
}

// Waits for a layer's flag and computes what it asks for. Errors: the stream's fault, as then no flag will come.
Status DeepseekV4GpuStep::answer(DevicePart& part, int layer, const StepShape& shape) {
  const DevicePart::Mail mail = part.mail(layer);
  for (int64_t spins = 1; load_acquire(&mail.flag[1]) != step_number_; ++spins) {
    __builtin_ia32_pause();
    if (spins % 1024 == 0) std::this_thread::yield();
    if (spins % 16384 == 0) TC_RETURN_IF_ERROR(part.stream().status());
  }
  const int64_t count = mail.flag[0], k = g_.n_activated_experts;
  counters_.cpu_pairs += count;
  ++counters_.layers;
  counters_.zero_miss_layers += count == 0;
  if (meddler_) meddler_(layer);
  if (count == 0) return {};
  std::fill_n(ids_.data(), shape.tokens * k, -1);
  std::fill_n(taken_.data(), shape.tokens, 0);
  for (int64_t i = 0; i < count; ++i) {
    const gpu::MissPair& miss = part.misses()[i];
    const int64_t at = miss.token * k + taken_[miss.token]++;
    ids_[at] = miss.expert;
    weights_[at] = miss.weight;
  }
  compute_pairs(part, layer, shape.tokens, part.host_y());
  store_release(mail.answer, step_number_);
  return {};
}

// Long prefill steps: the host sees the routing and splits it. Residents run at once; streamed experts follow in waves
// through the two halves of the staging slots, copies of one half beside the work on the other; the CPU does the rest.
Status DeepseekV4GpuStep::split_on_host(DevicePart& part, int layer, const StepShape& shape) {
  part.route_for_host(layer);
  part.shared_expert(layer);  // the device is busy while the host decides
  part.routed().synchronize();
  TC_RETURN_IF_ERROR(part.stream().status());
  const std::span<const int32_t> table = part.slots().step_table(layer - part.options().first_layer);
  const size_t experts = static_cast<size_t>(g_.n_routed_experts);
  HostSplit split{std::vector<int64_t>(experts), std::vector<bool>(experts)};
  for (int64_t i = 0; i < shape.tokens * g_.n_activated_experts; ++i)
    ++split.tokens[static_cast<size_t>(part.host_ids(layer)[i])];
  for (size_t e = 0; e < experts; ++e) split.on_device[e] = table[e] >= 0;
  part.run_wave(layer, 0, table);
  stream_experts(part, layer, choose_streamed(split), split);
  run_rest_on_cpu(part, layer, shape, split);
  part.write_streams(layer);
  // host_y and the tables are written again in the next layer.
  part.stream().record(part.done());
  part.done().synchronize();
  return part.stream().status();
}

// Missing experts that go to the device, those with the most tokens first.
std::vector<int> DeepseekV4GpuStep::choose_streamed(const HostSplit& split) const {
  std::vector<int64_t> missing_tokens, resident_tokens;
  std::vector<int> missing;
  for (size_t e = 0; e < split.tokens.size(); ++e) {
    if (split.tokens[e] == 0) continue;
    (split.on_device[e] ? resident_tokens : missing_tokens).push_back(split.tokens[e]);
    if (!split.on_device[e]) missing.push_back(static_cast<int>(e));
  }
  if (gpu_.prefill == PrefillMode::hybrid) {
    std::vector<int> chosen;
    for (const int i : sched::choose_streamed(missing_tokens, resident_tokens, costs_))
      chosen.push_back(missing[static_cast<size_t>(i)]);
    return chosen;
  }
  std::stable_sort(missing.begin(), missing.end(), [&](int a, int b) {
    return split.tokens[static_cast<size_t>(a)] > split.tokens[static_cast<size_t>(b)];
  });
  return missing;
}

// A half of the staging slots a wave. What no wave is left for stays with the CPU.
void DeepseekV4GpuStep::stream_experts(DevicePart& part, int layer, const std::vector<int>& streamed,
                                       HostSplit& split) {
  SlotPool& slots = part.slots();
  const int local = layer - part.options().first_layer, half = slots.staging() / 2;
  size_t at = 0;
  for (int wave = 1; at < streamed.size() && wave < DevicePart::kMaxWaves; ++wave) {
    const int side = wave % 2;
    const size_t first = at;
    std::vector<int32_t> row(split.tokens.size(), -1);
    slots.copies().wait(part.staging_free(side));
    for (int slot = side * half; slot < (side + 1) * half && at < streamed.size(); ++slot, ++at) {
      const size_t expert = static_cast<size_t>(streamed[at]);
      slots.stage({local, streamed[at]}, slot, slots.copies());
      row[expert] = slots.slots() + slot;
      split.on_device[expert] = true;
    }
    slots.copies().record(part.staging_filled(side));
    part.stream().wait(part.staging_filled(side));
    part.run_wave(layer, wave, row);
    // Prefill is the free moment to admit: the expert is on the device, a free slot costs one copy inside it.
    for (size_t i = first; i < at; ++i)
      slots.fill_from_device({local, streamed[i]}, slots.slot_data(row[static_cast<size_t>(streamed[i])]),
                             part.stream());
    part.stream().record(part.staging_free(side));
  }
  counters_.streamed_experts += static_cast<int64_t>(at);
}

// The pairs of experts that are not on the device, and their rows to the places of those pairs.
void DeepseekV4GpuStep::run_rest_on_cpu(DevicePart& part, int layer, const StepShape& shape, const HostSplit& split) {
  const int64_t all = shape.tokens * g_.n_activated_experts;
  const int32_t* const ids = part.host_ids(layer);
  int64_t cpu_pairs = 0;
  for (int64_t i = 0; i < all; ++i) {
    const bool mine = !split.on_device[static_cast<size_t>(ids[i])];
    ids_[i] = mine ? ids[i] : -1;
    weights_[i] = part.host_weights()[i];
    cpu_pairs += mine;
  }
  counters_.cpu_pairs += cpu_pairs;
  ++counters_.layers;
  counters_.zero_miss_layers += cpu_pairs == 0;
  if (cpu_pairs == 0) return;
  compute_pairs(part, layer, shape.tokens, pair_rows_.data());
  const bf16* from = pair_rows_.data();
  int64_t pair = 0;
  for (size_t e = 0; e < split.tokens.size(); pair += split.tokens[e++]) {
    const int64_t n = split.tokens[e];
    if (split.on_device[e] || n == 0) continue;
    std::copy_n(from, n * g_.dim, part.host_y() + pair * g_.dim);
    part.take_pairs(pair, n);
    from += n * g_.dim;
  }
}

// What the routers chose goes to the policies, and what they decide to the slots.
void DeepseekV4GpuStep::observe_step(int64_t tokens, bool prefill) {
  const int64_t k = g_.n_activated_experts;
  counters_.pairs += tokens * k * g_.n_layers;
  for (size_t p = 0; p < parts_.size(); ++p) {
    DevicePart& part = *parts_[p];
    SlotPool& slots = part.slots();
    if (slots.slots() == 0 || (gpu_.policy == "static" && slots.residency().free_slots == 0)) continue;
    std::vector<sched::ExpertUse> uses;
    std::vector<int> count(static_cast<size_t>(g_.n_routed_experts));
    for (int layer = part.options().first_layer; layer < part.options().last_layer; ++layer) {
      std::fill(count.begin(), count.end(), 0);
      for (int64_t i = 0; i < tokens * k; ++i) ++count[static_cast<size_t>(part.host_ids(layer)[i])];
      for (int e = 0; e < g_.n_routed_experts; ++e)
        if (count[static_cast<size_t>(e)] > 0)
          uses.push_back({{layer - part.options().first_layer, e}, count[static_cast<size_t>(e)]});
    }
    policies_[p]->observe({uses, tokens, prefill});
    for (const sched::Admission& a : policies_[p]->plan(slots.residency(), gpu_.max_fills)) {
      if (a.evicts()) slots.evict(a.victim);
      slots.fill(a.fill);
    }
  }
}

// Times an expert on both sides and its copy, on the real paths with the real weights: medians of a few.
Status DeepseekV4GpuStep::calibrate() {
  using Clock = std::chrono::steady_clock;
  const WorkerPool::StepScope scope(cpu_.pool);  // as a step would find the workers
  DevicePart& part = *parts_[0];
  SlotPool& slots = part.slots();
  const auto median_ns = [](const auto& fn) -> Result<double> {
    double times[5];
    for (double& time : times) {
      const Clock::time_point start = Clock::now();
      TC_RETURN_IF_ERROR(fn());
      time = std::chrono::duration<double, std::nano>(Clock::now() - start).count();
    }
    std::sort(std::begin(times), std::end(times));
    return times[2];
  };
  int turn = 0;  // experts rotate, so that caches do not flatter the CPU
  const auto next = [&] { return ExpertId{0, turn++ % g_.n_routed_experts}; };
  TC_ASSIGN(costs_.h2d_ns, median_ns([&]() -> Status {
              slots.stage(next(), 0, slots.copies());
              return slots.copies().synchronize();
            }));
  std::array<double, 5> cpu_ns{}, gpu_ns{};
  const int64_t k = g_.n_activated_experts;
  for (size_t i = 0; i < sched::ExpertTime::kTokens.size(); ++i) {
    const int64_t tokens = std::min<int64_t>(sched::ExpertTime::kTokens[i], options_.max_tokens);
    const double scale = static_cast<double>(sched::ExpertTime::kTokens[i]) / static_cast<double>(tokens);
    TC_ASSIGN(cpu_ns[i], median_ns([&]() -> Status {
                std::fill_n(ids_.data(), tokens * k, -1);
                const int expert = next().expert;
                for (int64_t t = 0; t < tokens; ++t) {
                  ids_[t * k] = expert;
                  weights_[t * k] = 1;
                }
                compute_pairs(part, part.options().first_layer, tokens, pair_rows_.data());
                return {};
              }));
    TC_ASSIGN(gpu_ns[i], median_ns([&]() -> Status {
                part.expert_for_timing(tokens);
                return part.stream().synchronize();
              }));
    cpu_ns[i] *= scale;
    gpu_ns[i] *= scale;
  }
  costs_.cpu = sched::ExpertTime(cpu_ns);
  costs_.gpu = sched::ExpertTime(gpu_ns);
  return {};
}

}  // namespace thermocline
