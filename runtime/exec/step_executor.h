// StepExecutor: one step of a model over a Batch, wherever it runs. DeepseekV4Step runs it on the CPU,
// DeepseekV4GpuStep on devices with the CPU beside them.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "kernels_cpu/cpu_context.h"
#include "runtime/base/result.h"
#include "runtime/base/tensor_view.h"
#include "runtime/exec/step_buffers.h"
#include "runtime/exec/step_report.h"
#include "runtime/exec/stop_token.h"
#include "runtime/kv/kv_store.h"
#include "scheduler/batch/batch.h"

namespace thermocline {

/// What one step computes. sequences[segment.sequence] must be segment.first_pos tokens long.
struct StepInput {
  const sched::Batch& batch;
  std::span<SequenceKv* const> sequences;
  std::span<const int32_t> next_ids =
      {};  // [tokens] the token after each one, or -1: the MTP block runs on those tokens
  const StopToken* stop = nullptr;
};

class StepExecutor {
 public:
  /// Told after every step what it was given and what it did: statistics, traces.
  class Recorder {
   public:
    virtual ~Recorder() = default;
    virtual void stepped(const StepInput& input, const StepReport& report) = 0;
  };
  /// Called after every layer with the residual streams [tokens, S, D]: for tests and probes.
  using Observer = std::function<void(int layer, TensorView<const float, 3> streams)>;

  virtual ~StepExecutor() = default;

  /// Computes one step and stores its rows. A step that does not end leaves its sequences as they were, and they go on;
  /// but for those of a device that was stopped or failed between its layers: they are abandoned (SequenceKv).
  /// Errors: out_of_memory (no KV pages), invalid_argument (a token id outside the vocabulary), cancelled (input.stop
  /// said so: between layers), internal (a device fault; it stays).
  Result<StepReport> run(const StepInput& input) {
    Result<StepReport> report = compute(input);
    if (report && report->tokens > 0)
      for (Recorder* const recorder : recorders_) recorder->stepped(input, *report);
    return report;
  }

  /// Logits of batch.logit_rows, [rows, V], valid until the next run.
  virtual TensorView<const float, 2> logits() const = 0;
  /// MTP logits of those logit_rows that have a next token, [rows, V]: row t predicts the token at t + 2.
  virtual TensorView<const float, 2> mtp_logits() const = 0;

  /// Rows of logits().
  virtual int64_t logit_row_count() const = 0;
  /// The most likely token of a logit row, the lower id among equals, where the device has found it already.
  virtual std::optional<int32_t> most_likely(int64_t row) const {
    (void)row;
    return std::nullopt;
  }

  /// The device slot of each expert of a layer in the last step, negative: it has none; empty: there is no device.
  virtual std::span<const int32_t> expert_slots(int layer) const {
    (void)layer;
    return {};
  }

  /// Of all steps.
  virtual HotRows hot_rows() const { return {}; }
  virtual ExpertTraffic expert_traffic() const { return {}; }

  /// What the CPU read of the weights in the last run, by worker and node, and how long it was at it.
  virtual const cpu::WeightTraffic& traffic() const = 0;

  void set_observer(Observer observer) { observer_ = std::move(observer); }
  /// They outlive the steps. Not while one runs.
  void set_recorders(std::vector<Recorder*> recorders) { recorders_ = std::move(recorders); }
  const ExecOptions& options() const { return options_; }

 protected:
  explicit StepExecutor(const ExecOptions& options) : options_(options) {}
  virtual Result<StepReport> compute(const StepInput& input) = 0;
  /// What every step refuses. Errors: invalid_argument.
  static Status check(const ModelGeometry& geometry, const ExecOptions& options, const sched::Batch& batch,
                      std::span<SequenceKv* const> sequences);

  const ExecOptions options_;
  Observer observer_;

 private:
  std::vector<Recorder*> recorders_;
};

}  // namespace thermocline
