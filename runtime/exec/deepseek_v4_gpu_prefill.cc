// Steps of long prompts on devices: the host sees the routing and says which missing experts are copied to the device.
#include "runtime/exec/deepseek_v4_gpu_step.h"

#include <algorithm>
#include <chrono>

namespace thermocline {
using sched::ExpertId;

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
  const sched::LayerSplit decided = sched::split_layer(gpu_.prefill, split.tokens, split.on_device, costs_);
  std::vector<int32_t> residents(table.begin(), table.end());
  for (const int e : decided.returned) {
    residents[static_cast<size_t>(e)] = -1;
    split.on_device[static_cast<size_t>(e)] = false;
  }
  counters_.returned_experts += static_cast<int64_t>(decided.returned.size());
  part.run_wave(layer, 0, residents);
  stream_experts(part, layer, decided.streamed, split);
  run_rest_on_cpu(part, layer, shape, split);
  part.write_streams(layer);
  // host_y and the tables are written again in the next layer.
  part.stream().record(part.done());
  part.done().synchronize();
  return part.stream().status();
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
  clock_.skip();
  count_layer(layer, shape.tokens, cpu_pairs);
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

// Times an expert on both sides and its copy, on the real paths with the real weights: medians of a few.
Status DeepseekV4GpuStep::measure_experts() {
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
