#include "runtime/engine/rate_window.h"

#include <algorithm>

namespace thermocline {

void RateWindow::add(Clock::time_point at, const RateCounts& counts) {
  latest_ = {at, counts};
  if (size_ > 0 && at - ring_[(next_ + ring_.size() - 1) % ring_.size()].at < kEvery) return;
  ring_[next_] = latest_;
  next_ = (next_ + 1) % ring_.size();
  size_ = std::min(size_ + 1, ring_.size());
}

RateSpan RateWindow::span(Clock::time_point now) const {
  // The newest sample that is old enough, and not the latest one; else the oldest there is.
  const Sample* since = nullptr;
  for (size_t back = 1; back <= size_; ++back) {
    const Sample& sample = ring_[(next_ + ring_.size() - back) % ring_.size()];
    if (sample.at >= latest_.at) continue;
    since = &sample;
    if (sample.at <= now - kWindow) break;
  }
  if (!since) return {};
  const RateCounts &a = since->counts, &b = latest_.counts;
  RateSpan span{std::chrono::duration<double>(now - since->at).count(),
                {.prompt_tokens = b.prompt_tokens - a.prompt_tokens,
                 .answer_tokens = b.answer_tokens - a.answer_tokens,
                 .read_bytes = b.read_bytes - a.read_bytes,
                 .step_seconds = b.step_seconds - a.step_seconds,
                 .weight_seconds = b.weight_seconds - a.weight_seconds}};
  for (size_t i = 0; i < a.node_bytes.size(); ++i) span.counts.node_bytes[i] = b.node_bytes[i] - a.node_bytes[i];
  return span;
}

}  // namespace thermocline
