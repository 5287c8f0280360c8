#include "runtime/exec/step_executor.h"

namespace thermocline {

Status StepExecutor::check(const ModelGeometry& g, const ExecOptions& options, const sched::Batch& batch,
                           std::span<SequenceKv* const> sequences) {
  TC_CHECK(batch.size() <= options.max_tokens, "a batch of " + std::to_string(batch.size()) + " tokens");
  TC_CHECK(static_cast<int64_t>(batch.logit_rows.size()) <= std::min(options.max_tokens, options.max_logit_rows));
  for (const int32_t id : batch.token_ids)
    if (id < 0 || id >= g.vocab_size)
      return invalid("token id " + std::to_string(id) + " is outside the vocabulary of " +
                     std::to_string(g.vocab_size));
  for (const sched::Segment& segment : batch.segments) {
    TC_CHECK_EQ(segment.first_pos, sequences[segment.sequence]->length());
    if (segment.first_pos + segment.num_tokens > options.max_context)
      return invalid("the context is full: " + std::to_string(segment.first_pos + segment.num_tokens) + " tokens, " +
                     std::to_string(options.max_context) + " allowed");
  }
  return {};
}

}  // namespace thermocline
