// The forward pass of DeepSeek-V4 on devices with the CPU beside them: attention, the shared expert and experts with a
// slot on the device that owns the layer, the other experts on the CPU in the same step. One thread drives it.
//
// A step is queued whole. In every layer the partition kernel splits the router's pairs by the slot table and raises a
// flag in pinned memory; the driving thread computes the pairs it finds there and answers; a layer without a miss waits
// for nobody. Every pair's result is a row of its own, added up on the device in one order, so which side computed an
// expert shows in nothing but that side's rounding. docs/gpu.md has the picture.
#pragma once

#include <bit>
#include <memory>
#include <vector>

#include "runtime/exec/device_part.h"
#include "runtime/exec/expert_prefetch.h"
#include "runtime/exec/numerics.h"
#include "runtime/exec/phase_clock.h"
#include "runtime/exec/step_executor.h"
#include "scheduler/cost/expert_cost.h"
#include "scheduler/placement/slot_scheduler.h"
#include "scheduler/plan/memory_plan.h"

namespace thermocline {

struct GpuOptions {
  int experts = -1;                                            // slots of all devices together; -1: all that fit
  std::string policy = "static";                               // sched::policies()
  std::vector<float> profile = {};                             // [layers, experts] uses by earlier runs, or empty
  sched::PrefillExperts prefill = sched::PrefillExperts::cpu;  // of long prompts
  int max_fills = 16;                                          // experts a policy may bring in per step and device
  sched::IdleCopies idle_copies = {};                          // of the machine, where it is known: fills then fit in
  sched::ExpertCosts costs = {};  // the same, for PrefillExperts::hybrid; else measured at the start
  ExpertPrefetch::Options prefetch = {};
  bool graphs = true;    // capture decode steps
  int64_t hot_rows = 0;  // of each CSA layer, copies on the device where --kv-offload puts rows in host memory; 0: by
                         // how many sequences run together
};

class DeepseekV4GpuStep : public StepExecutor, public KvMemory {
 public:
  /// Steps of at most this many tokens are padded to a bucket and captured as a graph.
  static constexpr int64_t kDecodeTokens = 16;
  /// The bucket, a power of two.
  static int64_t decode_bucket(int64_t tokens) {
    return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(tokens)));
  }

  /// Geometry, weights, CPU context and cache outlive the object; the cache holds numbers only (host_rows = false).
  /// Errors: out_of_memory; unsupported (a geometry or numerics the kernels do not take, saying which).
  static Result<std::unique_ptr<DeepseekV4GpuStep>> create(const ModelGeometry& geometry,
                                                           const deepseek_v4::Weights& weights, cpu::CpuContext cpu,
                                                           Numerics numerics, const ExecOptions& options,
                                                           const GpuOptions& gpu, const KvStore& kv,
                                                           std::vector<std::unique_ptr<gpu::Device>> devices);

  /// Adds what create() will take of the host and of each device at least, and of each device what it has. Before the
  /// weights are loaded: `shapes` are WeightLoader::shapes(), and of the cache the numbers count.
  static void plan_memory(sched::MemoryPlan& plan, const ModelGeometry& geometry, const deepseek_v4::Weights& shapes,
                          cpu::CpuContext cpu, Numerics numerics, const ExecOptions& options, const GpuOptions& gpu,
                          const KvStore& kv, const std::vector<std::unique_ptr<gpu::Device>>& devices);

  /// Whether devices can run this; else unsupported, saying what they cannot. The weights may be shapes only.
  static Status supported(const ModelGeometry& g, const deepseek_v4::Weights& weights, Numerics numerics,
                          const ExecOptions& options);

  // KvMemory: a page is a piece on every device; rows in host memory are read and written there. Between steps, when
  // nothing is queued that touches them.
  Status read(KvPool pool, int32_t page, std::byte* to) override;
  Status write(KvPool pool, int32_t page, const std::byte* from) override;
  Status copy(KvPool pool, int32_t from, int32_t to) override;
  TensorView<const float, 2> logits() const override;
  TensorView<const float, 2> mtp_logits() const override;
  int64_t logit_row_count() const override { return logit_rows_; }
  std::optional<int32_t> most_likely(int64_t row) const override;
  HotRows hot_rows() const override { return hot_rows_; }
  ExpertTraffic expert_traffic() const override;
  std::span<const int32_t> expert_slots(int layer) const override;
  const cpu::WeightTraffic& traffic() const override { return traffic_; }

  int parts() const { return static_cast<int>(parts_.size()); }
  DevicePart& part(int i) { return *parts_[static_cast<size_t>(i)]; }
  /// Decides what is resident on a device; for tests.
  void set_policy(int part, std::unique_ptr<sched::ExpertPolicy> policy) {
    schedulers_[static_cast<size_t>(part)]->set_policy(std::move(policy));
  }
  /// Called while a layer's pairs are on the CPU: for tests that meddle with a step in flight.
  void set_meddler(std::function<void(int layer)> meddler) { meddler_ = std::move(meddler); }
  /// For PrefillExperts::hybrid.
  const sched::ExpertCosts& costs() const { return costs_; }
  void set_costs(const sched::ExpertCosts& costs) { costs_ = costs; }

  /// The memory map of every device, and what was measured: for people.
  std::vector<std::string> describe() const;

  /// Of all steps so far.
  struct Counters {
    int64_t pairs = 0, cpu_pairs = 0, streamed_experts = 0, returned_experts = 0, zero_miss_layers = 0, layers = 0,
            graph_launches = 0;
  };
  const Counters& counters() const { return counters_; }

 protected:
  Result<StepReport> compute(const StepInput& input) override;

 private:
  DeepseekV4GpuStep(const ModelGeometry& geometry, const deepseek_v4::Weights& weights, cpu::CpuContext cpu,
                    Numerics numerics, const ExecOptions& options, const GpuOptions& gpu);

  static std::vector<PartOptions> part_options(const ModelGeometry& g, const deepseek_v4::Weights& weights,
                                               Numerics numerics, const ExecOptions& options, const GpuOptions& gpu,
                                               size_t devices);
  Status allocate_host_side(int64_t max_tokens);
  Status synchronize();
  struct Piece {
    DevicePart* part;
    std::span<std::byte> bytes;
    bool on_host, selected;
    void copy(std::byte* to, const std::byte* from, gpu::CopyKind kind) const;
  };
  std::vector<Piece> pieces(KvPool pool, int32_t page);
  void fill_tables(DevicePart& part, const StepShape& shape, const sched::Batch& batch,
                   std::span<SequenceKv* const> sequences, std::span<const int32_t> next_ids,
                   std::span<const int32_t> mtp_rows);
  Status run_layers(const StepShape& shape, int64_t tokens, bool host_split, bool with_mtp, const StopToken* stop);
  Status run_graph(const StepShape& shape);
  void queue_decode(DevicePart& part);
  Status answer(DevicePart& part, int layer, const StepShape& shape);
  void prefetch_layer(DevicePart& part, int layer, uint32_t& flag);
  std::string_view prefetch_name() const;
  /// Of a layer, by expert: its tokens in the step, and whether the device has it or gets it.
  struct HostSplit {
    std::vector<int64_t> tokens;
    std::vector<bool> on_device;
  };
  Status split_on_host(DevicePart& part, int layer, const StepShape& shape);
  void stream_experts(DevicePart& part, int layer, const std::vector<int>& streamed, HostSplit& split);
  void run_rest_on_cpu(DevicePart& part, int layer, const StepShape& shape, const HostSplit& split);
  void count_layer(int layer, int64_t tokens, int64_t pairs);
  void compute_pairs(DevicePart& part, int layer, int64_t tokens, bf16* out);
  sched::PolicyOptions policy_options(const DevicePart& part) const;
  void observe_step(int64_t tokens, bool prefill);
  Status measure_experts();
  DevicePart& part_of(int layer);
  const deepseek_v4::LayerWeights& layer_weights(int layer) const {
    return layer < g_.n_layers ? w_.layers[static_cast<size_t>(layer)] : w_.mtp[0].layer;
  }

  const ModelGeometry& g_;
  const deepseek_v4::Weights& w_;
  cpu::WeightTraffic traffic_;
  const cpu::CpuContext cpu_;
  const Rounding round_;
  const GpuOptions gpu_;
  std::vector<std::unique_ptr<DevicePart>> parts_;
  std::vector<std::unique_ptr<sched::SlotScheduler>> schedulers_;  // of the parts
  std::vector<const int32_t*> routed_ids_;                         // by layer, of the last step
  std::vector<float> frequencies_[2];
  ExpertPrefetch prefetch_;
  std::vector<int32_t> guesses_;
  int64_t asked_tokens_ = 0;  // of the step that runs, without its bucket's padding
  uint32_t step_number_ = 1;  // slots of rows begin at 0: that is no step before the first
  int64_t logit_rows_ = 0, mtp_rows_ = 0;
  mutable bool logits_fetched_ = false;  // they stay on the device until asked for

  // The CPU's side.
  cpu::GemmInput x_;
  cpu::MoeWorkspace moe_;
  HostArray<int32_t> ids_;     // [tokens, k]; -1: the device's
  HostArray<float> weights_;   // [tokens, k]
  HostArray<int32_t> taken_;   // [tokens]
  HostArray<bf16> pair_rows_;  // [pairs, D], of a host split
  std::vector<float> observed_;

  struct Bucket {
    StepShape shape;
    std::unique_ptr<gpu::Graph> graph;
  };
  std::vector<Bucket> buckets_;
  sched::ExpertCosts costs_;
  Counters counters_;
  PhaseClock clock_;
  DistinctCounter distinct_;
  StepExperts counted_;  // of the step that runs
  std::vector<int64_t> layer_cpu_pairs_;
  HotRows hot_rows_;
  std::function<void(int)> meddler_;
};

}  // namespace thermocline
