// StepDriver: the engine's steps as calls, for logits, perplexity, benchmarks and tests. One thread, and no step loop
// beside it.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <span>

#include "runtime/exec/step_executor.h"

namespace thermocline {

class StepDriver {
 public:
  StepDriver(StepExecutor& step, KvStore& kv) : step_(step), kv_(kv) {}

  /// Errors: out_of_memory.
  Result<std::unique_ptr<SequenceKv>> new_sequence() { return kv_.new_sequence(); }
  KvStore& kv() { return kv_; }
  /// Feeds tokens to a sequence in chunks and leaves the logits of the last one in logits().
  /// Errors: cancelled when `cancel` turned true (tokens of finished chunks stay), and those of StepExecutor::run.
  Status prefill(SequenceKv& sequence, std::span<const int32_t> ids, const std::atomic<bool>* cancel = nullptr);
  /// One token of one sequence.
  Status decode(SequenceKv& sequence, int32_t id) { return prefill(sequence, std::span(&id, 1)); }
  /// Logits of the last prefilled or decoded token, [V].
  std::span<const float> logits() const;
  /// Its most likely successor, where a device has found it already (StepExecutor::most_likely).
  std::optional<int32_t> most_likely() const { return step_.most_likely(step_.logit_row_count() - 1); }

 private:
  StepExecutor& step_;
  KvStore& kv_;
};

}  // namespace thermocline
