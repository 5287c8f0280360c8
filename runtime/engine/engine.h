// Engine: a loaded model and the machinery that runs it, behind the calls everything above uses. One thread steps it.
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "runtime/exec/deepseek_v4_gpu_step.h"
#include "runtime/exec/deepseek_v4_step.h"
#include "runtime/hw/cgroup.h"
#include "runtime/hw/topology.h"

namespace thermocline {

struct EngineOptions {
  std::filesystem::path model;
  Numerics numerics = Numerics::published;
  Isa max_isa = Isa::amx;
  int threads = 0;             // 0: one per core this process may use
  std::string topology;        // an hwloc description instead of this machine's, for tests
  int64_t max_context = 0;     // 0: the model's own limit, at most kDefaultContext
  int64_t max_chunk = 512;     // tokens of a prefill step
  int64_t max_logit_rows = 1;  // tokens of a step whose logits can be asked for
  int max_sequences = 1;
  /// Tokens the KV cache holds, of all sequences together; at least max_context. 0: max_context for each of
  /// max_sequences, or as many as fit the free memory, of a device half of it: the rest is for experts.
  int64_t kv_tokens = 0;
  bool mtp = false;
  bool int8_activations = false;  // routed experts take INT8 inputs: faster, not exact (docs/numerics.md)
  bool direct_io = false;         // read the checkpoint past the page cache
  bool quiet = false;             // no progress bar

  std::string device = "none";  // auto, cuda, simt or none; "cuda:2" for two cards
  uint64_t gpu_memory = 0;      // bytes of each device; 0: what is free (simt: 4 GiB)
  GpuOptions gpu;

  const std::atomic<bool>* cancel = nullptr;  // turned true while loading: open() ends with ErrorCode::cancelled
  std::function<void(double)> progress = {};  // told the share of the weights that is loaded (LoadOptions::progress)

  static constexpr int64_t kDefaultContext = 32768;
};

/// A request's state: the tokens whose rows are stored.
class Sequence {
 public:
  explicit Sequence(std::unique_ptr<SequenceKv> kv) : kv_(std::move(kv)) {}
  int64_t length() const { return kv_->length(); }
  SequenceKv* kv() { return kv_.get(); }

 private:
  std::unique_ptr<SequenceKv> kv_;
};

class Engine {
 public:
  /// Reads the config and the headers, checks that the devices can run it and that all of it fits the memory, loads,
  /// and makes every buffer resident. Errors: those of read_config and WeightLoader; invalid_argument for a context, a
  /// KV cache or a thread count out of range; unsupported and out_of_memory before a weight is read; cancelled.
  static Result<std::unique_ptr<Engine>> open(const EngineOptions& options);

  Result<std::unique_ptr<Sequence>> new_sequence();

  /// Feeds tokens to a sequence in chunks and leaves the logits of the last one in logits().
  /// Errors: cancelled when `cancel` turned true (tokens of finished chunks stay), and those of ForwardStep::run.
  Status prefill(Sequence& sequence, std::span<const int32_t> ids, const std::atomic<bool>* cancel = nullptr);
  /// One token of one sequence.
  Status decode(Sequence& sequence, int32_t id) { return prefill(sequence, std::span(&id, 1)); }
  /// Logits of the last prefilled or decoded token, [V].
  std::span<const float> logits() const;
  /// Its most likely successor, where a device has found it already (ForwardStep::most_likely).
  std::optional<int32_t> most_likely() const { return step_->most_likely(step_->logit_row_count() - 1); }

  const ModelGeometry& geometry() const { return geometry_; }
  const deepseek_v4::Weights& weights() const { return *weights_; }
  const EngineOptions& options() const { return options_; }
  int64_t max_context() const { return options_.max_context; }
  const Topology& topology() const { return topology_; }
  const CpuFeatures& cpu() const { return cpu_; }
  const cpu::KernelTable& kernels() const { return table_; }
  WorkerPool& pool() { return *pool_; }
  ForwardStep& step() { return *step_; }
  /// The step on devices; null where the CPU does all of it.
  DeepseekV4GpuStep* gpu_step() { return gpu_step_; }

 private:
  Engine() = default;

  EngineOptions options_;
  ModelGeometry geometry_;
  Topology topology_;
  CpuFeatures cpu_;
  cpu::KernelTable table_;
  std::unique_ptr<WorkerPool> pool_;
  std::unique_ptr<deepseek_v4::Weights> weights_;
  std::unique_ptr<KvCache> kv_;
  std::unique_ptr<ForwardStep> step_;
  DeepseekV4GpuStep* gpu_step_ = nullptr;  // step_, where it is one
};

}  // namespace thermocline
