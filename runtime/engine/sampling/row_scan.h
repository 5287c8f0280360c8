// One pass over a row of logits: its best token, whether all is finite, and the maximum of every 64 neighbours, by
// which later passes skip most of the row.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace thermocline::sampling {

inline constexpr int64_t kBlock = 64;  // logits with one maximum; 4 lanes divide it

/// A token on its way to being chosen.
struct Candidate {
  float logit;
  int32_t id;
  float weight;  // of Weighting, once it is asked for
};

/// The order of every choice here: falling logit, the lower id among equals. No logit is NaN: scan_row has seen to it.
inline bool before(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

struct RowScan {
  float best = 0;       // where finite, or without NaN and +inf: the largest logit
  int32_t best_id = 0;  // the lowest id that has it
  bool finite = true;   // of all logits
};

/// row [V], V >= 1; block_max [ceil(V / 64)] out: the largest of each block.
RowScan scan_row(std::span<const float> row, std::span<float> block_max);

/// The n tokens that come first (fewer where fewer are above -inf), unordered; weights are left 0.
///   block_max, of scan_row; spare_max [the same size] scratch; candidates [V] scratch, holds the result
/// The n-th largest block maximum bounds the n-th largest logit from below, so little more than n is looked at.
std::span<Candidate> select_first(std::span<const float> row, std::span<const float> block_max, int64_t n,
                                  std::span<float> spare_max, std::span<Candidate> candidates);

}  // namespace thermocline::sampling
