// StepMeters: what steps did, counted while a server runs: how long their phases took, what they read, which experts
// they used and where those were. Plain integers on the step thread; only the use of single experts is read from there
// by others.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <vector>

#include "runtime/engine/buckets.h"
#include "runtime/engine/rate_window.h"
#include "runtime/exec/step_executor.h"
#include "runtime/model/model_geometry.h"
#include "scheduler/cost/model_costs.h"

namespace thermocline {

/// (token, expert) pairs by who computed them, by the kind of step - one with a chunk of a prompt in it is a prefill
/// step - and by where the layer is: hash layers, then three equal parts of the rest.
struct ExpertPairs {
  static constexpr std::array<const char*, 2> kPlaces = {"gpu", "cpu"}, kPhases = {"prefill", "decode"};
  static constexpr std::array<const char*, 4> kGroups = {"hash", "early", "mid", "late"};
  std::array<std::array<std::array<int64_t, 4>, 2>, 2> pairs{};  // [place][phase][group]
};

/// Of all steps since the start.
struct StepMeasures {
  Buckets<kStepSeconds.size()> seconds;
  std::array<Buckets<kStepSeconds.size()>, sched::kPhaseNames.size()> phases;  // those that a step has
  Buckets<kStepTokens.size()> tokens;
  uint64_t weight_bytes = 0;  // that the CPU read, counted by its kernels
  uint64_t kv_bytes = 0;      // of rows and keys in host memory, by the lengths of the sequences
  double weight_seconds = 0;  // of the calls that read weights
  int nodes = 0;
  std::array<uint64_t, RateCounts::kMostNodes> node_bytes{};  // of weight_bytes, by the node they lie on
  uint64_t remote_bytes = 0;                                  // of weight_bytes, read by workers of another node
  bool kv_on_host = true;                                     // else devices keep the rows
  ExpertPairs experts;
  int64_t resident_experts = 0;  // now, on devices
};

/// Every expert of a model, by layer.
struct ExpertMap {
  int layers = 0, experts = 0;
  std::vector<uint64_t> tokens;    // [layers, experts] that it was chosen for, since the start
  std::vector<double> recent;      // the same with a half-life of StepMeters::kHalfLife; comparable among each other
  std::vector<uint8_t> on_device;  // has a slot
};

class StepMeters final : public StepExecutor::Recorder {
 public:
  static constexpr std::chrono::seconds kHalfLife{60};

  /// What it measures outlives it. `kv_on_host`: where rows lie that attention reads.
  StepMeters(const StepExecutor& step, const WorkerPool& pool, const ModelGeometry& geometry, sched::ModelCosts costs,
             bool kv_on_host);

  void stepped(const StepInput& input, const StepReport& report) override;
  /// Where experts are now; stepped() does it too, a few times a second.
  void look_at_slots();
  /// Step thread.
  const StepMeasures& measures() const { return measures_; }
  /// Any thread. While a step ends, some of it may have that step in and some not.
  ExpertMap experts() const;

 private:
  void count_traffic();
  void count_rows(const sched::Batch& batch);
  void count_experts(const StepReport& report, bool prefill);
  double weight_of_now();
  size_t group_of(int layer) const;

  const StepExecutor& step_;
  const WorkerPool& pool_;
  const ModelGeometry& geometry_;
  const sched::ModelCosts costs_;
  std::chrono::steady_clock::time_point epoch_ = std::chrono::steady_clock::now();  // a use counted 1 then
  std::chrono::steady_clock::time_point looked_{};

  StepMeasures measures_;
  // Written by the step thread alone.
  std::vector<std::atomic<uint64_t>> tokens_;
  std::vector<std::atomic<double>> recent_;
  std::vector<std::atomic<uint8_t>> on_device_;
};

}  // namespace thermocline
