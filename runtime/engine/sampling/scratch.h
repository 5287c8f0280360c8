// Buffers of one worker that samples.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/engine/sampling/select_mass.h"

namespace thermocline {

/// Used by one thread at a time, for any Sampler and any row; nothing of one call is seen by the next. Grows to the
/// largest row it has met, so calls over one vocabulary allocate nothing after the first (or none: see `vocab`).
class SamplingScratch {
 public:
  explicit SamplingScratch(int64_t vocab = 0) { fit(static_cast<size_t>(vocab)); }

  // For the units of this folder.
  void fit(size_t vocab) {
    const size_t blocks = (vocab + sampling::kBlock - 1) / sampling::kBlock;
    if (vocab > edited.size()) edited.resize(vocab), candidates.resize(vocab);
    block_max.resize(blocks), edited_max.resize(blocks), spare_max.resize(blocks);
  }
  std::vector<float> edited;                            // [V] the row with bias, penalties and bans
  std::vector<float> block_max, edited_max, spare_max;  // [ceil(V / 64)] of the row, of `edited`, for select_first
  std::vector<sampling::Candidate> candidates;          // [V]
  sampling::MassHistogram histogram;
};

}  // namespace thermocline
