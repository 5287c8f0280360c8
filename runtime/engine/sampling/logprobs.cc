#include "runtime/engine/sampling/logprobs.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace thermocline {
namespace sampling {
namespace {

Error not_finite(float logit, size_t id) {
  return {ErrorCode::internal, "the model produced " + std::to_string(logit) + " as the logit of token " +
                                   std::to_string(id) + ": its weights are damaged or overflow; compare the files of " +
                                   "the checkpoint with their published checksums"};
}

}  // namespace

Result<RowScan> scan_logits(std::span<const float> logits, std::span<const int32_t> banned, SamplingScratch& scratch) {
  scratch.fit(logits.size());
  const RowScan scan = scan_row(logits, scratch.block_max);
  if (scan.finite) return scan;
  const auto allowed = [&](size_t id) {
    return std::isfinite(logits[id]) ||
           (logits[id] == -INFINITY &&
            std::find(banned.begin(), banned.end(), static_cast<int32_t>(id)) != banned.end());
  };
  size_t id = 0;
  while (id < logits.size() && allowed(id)) ++id;
  if (id < logits.size()) return not_finite(logits[id], id);
  if (scan.best == -INFINITY) return not_finite(scan.best, 0);
  return scan;
}

SampledToken logprobs_of(std::span<const float> logits, const RowScan& scan, int32_t id, int top,
                         SamplingScratch& scratch) {
  const double log_sum =
      log_of(total_weight(logits, Weighting::of(static_cast<int64_t>(logits.size()), scan.best, 1, 0)));
  const auto logprob = [&](float logit) {
    return static_cast<float>(static_cast<double>(logit) - static_cast<double>(scan.best) - log_sum);
  };
  SampledToken out{id, logprob(logits[static_cast<size_t>(id)]), {}};
  const std::span<Candidate> first =
      select_first(logits, scratch.block_max, top, scratch.spare_max, scratch.candidates);
  std::sort(first.begin(), first.end(), before);
  out.top.reserve(first.size());
  for (const Candidate& c : first) out.top.push_back({c.id, logprob(c.logit)});
  return out;
}

}  // namespace sampling

Result<SampledToken> logprobs_of(std::span<const float> logits, int32_t id, int top, SamplingScratch& scratch) {
  TC_CHECK(id >= 0 && static_cast<size_t>(id) < logits.size());
  TC_ASSIGN(const sampling::RowScan scan, sampling::scan_logits(logits, {}, scratch));
  return sampling::logprobs_of(logits, scan, id, top, scratch);
}

}  // namespace thermocline
