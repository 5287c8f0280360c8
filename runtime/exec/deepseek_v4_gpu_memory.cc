// What a step on devices needs, and the KV cache that lives there.
#include <algorithm>
#include <cstring>

#include <fmt/format.h>

#include "runtime/exec/deepseek_v4_gpu_step.h"
#include "runtime/hw/host_memory.h"

namespace thermocline {
using sched::PrefillExperts;

// What the kernels take. Every published V4 geometry passes.
Status DeepseekV4GpuStep::supported(const ModelGeometry& g, const deepseek_v4::Weights& w, Numerics numerics,
                                    const ExecOptions& options) {
  const auto refuse = [](const std::string& what) {
    return Error{ErrorCode::unsupported, "on a device " + what + "; use --device none", "--device"};
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
    o.max_tokens = std::max(options.max_tokens, decode_bucket(std::min(options.max_tokens, kDecodeTokens)));
    o.max_logit_rows = std::max(options.max_logit_rows, decode_bucket(std::min(options.max_logit_rows, kDecodeTokens)));
    o.max_context = options.max_context;
    o.hot_rows = options.hot_rows;
    o.ask_ahead = gpu.prefetch.mode != ExpertPrefetch::Mode::off;
    o.mtp = options.mtp && !weights.mtp.empty() && o.last_layer == g.n_layers;
    o.round_linear = rounding_of(numerics).linear_inputs;
    o.experts = gpu.experts < 0 ? -1 : gpu.experts * (i + 1) / count - gpu.experts * i / count;
    o.staging = gpu.prefill == PrefillExperts::cpu ? 0 : 2 * std::min(8, g.n_routed_experts);
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
  if (gpu_.prefill != PrefillExperts::cpu) {
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

// A page's pieces in the order they lie in host memory: of every part its rows that are read in every step, then of
// every part the rows that an index selects.
std::vector<DeepseekV4GpuStep::Piece> DeepseekV4GpuStep::pieces(KvPool pool, int32_t page) {
  std::vector<Piece> pieces;
  for (const auto& part : parts_) pieces.push_back({part.get(), part->kv_page(pool, page), false, false});
  if (pool != KvPool::compressed) return pieces;
  for (const auto& part : parts_) {
    const auto [rows, on_host] = part->selected_rows(page);
    pieces.push_back({part.get(), rows, on_host, true});
  }
  return pieces;
}

void DeepseekV4GpuStep::Piece::copy(std::byte* to, const std::byte* from, gpu::CopyKind kind) const {
  if (on_host)
    std::memcpy(to, from, bytes.size());
  else
    part->stream().copy(to, from, bytes.size(), kind);
}

Status DeepseekV4GpuStep::read(KvPool pool, int32_t page, std::byte* to) {
  for (const Piece& piece : pieces(pool, page)) {
    piece.copy(to, piece.bytes.data(), gpu::CopyKind::d2h);
    to += piece.bytes.size();
  }
  return synchronize();
}

Status DeepseekV4GpuStep::write(KvPool pool, int32_t page, const std::byte* from) {
  for (const Piece& piece : pieces(pool, page)) {
    piece.copy(piece.bytes.data(), from, gpu::CopyKind::h2d);
    if (piece.selected) piece.part->forget_hot_rows(page);
    from += piece.bytes.size();
  }
  return synchronize();
}

Status DeepseekV4GpuStep::copy(KvPool pool, int32_t from, int32_t to) {
  const std::vector<Piece> sources = pieces(pool, from), targets = pieces(pool, to);
  for (size_t i = 0; i < sources.size(); ++i) {
    targets[i].copy(targets[i].bytes.data(), sources[i].bytes.data(), gpu::CopyKind::d2d);
    if (targets[i].selected) targets[i].part->forget_hot_rows(to);
  }
  for (const auto& part : parts_) TC_RETURN_IF_ERROR(part->stream().status());
  return {};
}

}  // namespace thermocline
