#include "runtime/engine/engine_memory.h"

#include <algorithm>

#include "runtime/base/log.h"
#include "runtime/hw/host_memory.h"

namespace thermocline {
namespace {

constexpr int kHost = sched::MemoryPlan::kHost;
constexpr int64_t kMostTokens = kPageTokens << 31;  // pages are numbered by int32_t
constexpr uint64_t kProgramBytes = 128 << 20;       // tokenizer, requests, connections, code: an estimate

class Planner {
 public:
  Planner(const EngineOptions& options, const ModelGeometry& geometry, const deepseek_v4::WeightLoader& weights,
          cpu::CpuContext cpu, const ExecOptions& exec, const std::vector<std::unique_ptr<gpu::Device>>& devices,
          const MemoryBudget& host)
      : o_(options), g_(geometry), weights_(weights), cpu_(cpu), exec_(exec), devices_(devices), host_(host) {}

  EngineMemory plan(int64_t kv_tokens) const;
  int64_t most_tokens(int64_t wanted) const;

 private:
  int64_t checkpoint_bytes(const EngineMemory& m) const;
  bool fits(int64_t kv_tokens, const sched::MemoryPlan& least) const;

  const EngineOptions& o_;
  const ModelGeometry& g_;
  const deepseek_v4::WeightLoader& weights_;
  const cpu::CpuContext cpu_;
  const ExecOptions& exec_;
  const std::vector<std::unique_ptr<gpu::Device>>& devices_;
  const MemoryBudget& host_;
};

EngineMemory Planner::plan(int64_t kv_tokens) const {
  EngineMemory m;
  m.kv.bf16_rows = rounding_of(o_.numerics).results;
  m.kv.fp8_rows = exec_.fp8_rows || !devices_.empty();
  m.kv.mtp = o_.mtp;
  m.kv.max_tokens = kv_tokens;
  m.kv.max_sequences = o_.max_sequences;
  m.kv.max_chunk = o_.max_chunk;
  m.kv.host_rows = devices_.empty();
  m.plan.set_capacity(kHost, host_.bytes, host_.source);
  m.plan.add(kHost, "program", kProgramBytes);
  m.plan.add(kHost, "weights", weights_.arena_bytes());
  m.plan.add(kHost, "weights on their way", weights_.buffer_bytes());
  if (devices_.empty()) {
    m.plan.add(kHost, "KV pages", KvStore::bytes(g_, m.kv), "lower --max-model-len, --max-num-seqs or --kv-tokens");
    m.plan.add(kHost, "step buffers", StepBuffers::bytes(g_, exec_, cpu_.pool.size()),
               "lower --max-num-batched-tokens");
  } else {
    const HostMemoryMeasure no_memory;
    const std::unique_ptr<KvStore> numbers = std::move(KvStore::create(g_, m.kv)).value();
    DeepseekV4GpuStep::plan_memory(m.plan, g_, weights_.shapes(), cpu_, o_.numerics, exec_, o_.gpu, *numbers, devices_);
  }
  m.prefix_cache_bytes = o_.prefix_cache_bytes >= 0 ? o_.prefix_cache_bytes : checkpoint_bytes(m);
  m.plan.add(kHost, "prefix checkpoints", static_cast<uint64_t>(m.prefix_cache_bytes), "lower --prefix-cache-memory");
  return m;
}

// A quarter of the pages, or a few dozen checkpoints where those are small; an eighth of what is left at most.
int64_t Planner::checkpoint_bytes(const EngineMemory& m) const {
  const KvLayout layout(g_, m.kv);
  const int64_t pages = pages_of(m.kv.max_tokens, kPageTokens) * layout.compressed_page_bytes();
  const int64_t one = pages_of(g_.window_size, kWindowPageTokens) * layout.window_page_bytes() + layout.ring_bytes();
  const uint64_t room = m.plan.room(kHost) / 8;
  return static_cast<int64_t>(std::min<uint64_t>(room, static_cast<uint64_t>(std::max(pages / 4, 32 * one))));
}

// Of a device, what a KV cache of one context leaves is shared with the experts, half and half.
bool Planner::fits(int64_t kv_tokens, const sched::MemoryPlan& least) const {
  const sched::MemoryPlan plan = this->plan(kv_tokens).plan;
  if (!plan.check().ok()) return false;
  for (int device = 0; o_.gpu.experts < 0 && device < static_cast<int>(devices_.size()); ++device)
    if (plan.planned_bytes(device) - least.planned_bytes(device) > least.room(device) / 2) return false;
  return true;
}

// Between one context and `wanted`, in whole pages.
int64_t Planner::most_tokens(int64_t wanted) const {
  const sched::MemoryPlan least = plan(o_.max_context).plan;
  if (fits(wanted, least)) return wanted;
  int64_t good = 0, bad = (wanted - o_.max_context) / kPageTokens + 1;  // pages beyond one context
  while (bad - good > 1) {
    const int64_t middle = good + (bad - good) / 2;
    (fits(o_.max_context + middle * kPageTokens, least) ? good : bad) = middle;
  }
  return o_.max_context + good * kPageTokens;
}

}  // namespace

Result<EngineMemory> plan_engine_memory(const EngineOptions& options, const ModelGeometry& geometry,
                                        const deepseek_v4::WeightLoader& weights, cpu::CpuContext cpu,
                                        const ExecOptions& exec,
                                        const std::vector<std::unique_ptr<gpu::Device>>& devices,
                                        const MemoryBudget& host) {
  if (options.kv_tokens != 0 && options.kv_tokens < options.max_context)
    return invalid("a KV cache of " + std::to_string(options.kv_tokens) + " tokens does not hold one context of " +
                   std::to_string(options.max_context) + ": raise --kv-tokens, or lower --max-model-len");
  if (options.kv_tokens > kMostTokens)
    return invalid("a KV cache of " + std::to_string(options.kv_tokens) + " tokens is larger than the " +
                   std::to_string(kMostTokens) + " that pages can be numbered for: lower --kv-tokens");
  const Planner planner(options, geometry, weights, cpu, exec, devices, host);
  const int64_t all = std::min(kMostTokens, options.max_context * options.max_sequences);
  const int64_t tokens = options.kv_tokens != 0 ? options.kv_tokens : planner.most_tokens(all);
  EngineMemory memory = planner.plan(tokens);
  TC_RETURN_IF_ERROR(memory.plan.check());
  if (options.kv_tokens == 0 && tokens < all)
    spdlog::info("the KV cache holds {} tokens, not {} sequences of {}: more does not fit the memory", tokens,
                 options.max_sequences, options.max_context);
  return memory;
}

}  // namespace thermocline
