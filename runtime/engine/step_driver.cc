#include "runtime/engine/step_driver.h"

namespace thermocline {
namespace {

class CancelFlag : public StopToken {
 public:
  explicit CancelFlag(const std::atomic<bool>* flag) : flag_(flag) {}
  bool stop_requested() const override { return flag_ && *flag_; }

 private:
  const std::atomic<bool>* const flag_;
};

}  // namespace

Status StepDriver::prefill(SequenceKv& sequence, std::span<const int32_t> ids, const std::atomic<bool>* cancel) {
  const CancelFlag stop(cancel);
  const int64_t begin = sequence.length(), end = begin + static_cast<int64_t>(ids.size());
  for (const int64_t chunk_end : sched::chunk_prefill(begin, end, step_.options().max_tokens)) {
    if (stop.stop_requested()) return Error{ErrorCode::cancelled, "cancelled"};
    sched::Batch batch;
    const int64_t pos = sequence.length();
    batch.add(0, pos, ids.data() + (pos - begin), chunk_end - pos);
    if (chunk_end == end) batch.logit_rows.push_back(static_cast<int32_t>(batch.size()) - 1);
    SequenceKv* const kv = &sequence;
    TC_RETURN_IF_ERROR(step_.run({batch, std::span(&kv, 1), {}, &stop}));
  }
  return {};
}

std::span<const float> StepDriver::logits() const {
  const TensorView<const float, 2> logits = step_.logits();
  return {logits.row(logits.shape[0] - 1), static_cast<size_t>(logits.shape[1])};
}

}  // namespace thermocline
