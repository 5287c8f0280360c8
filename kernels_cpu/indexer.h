// The lightning indexer of CSA layers: keys and queries in FP4, their scores, the exact top-k. Source: spec 3.8.3.
#pragma once

#include <cstdint>

#include "kernels_cpu/kernel_table.h"

namespace thermocline::cpu {

/// Keys of 16 neighbouring compressed rows lie together as one mxfp4 row group: its tiles, then its scales.
inline constexpr int64_t kKeyGroup = kTileRows;

/// Stores the key of row `r` (0..15) of a group. key [c] f32 holds FP4 values already (ref::fake_fp4), so nothing is
/// lost. Different rows of a group may be stored by different threads at once.
void store_index_key(const float* key, int64_t c, int64_t r, uint8_t* group);

/// One query head as index_scores_fp4 takes it. q [c] f32 holds FP4 values; out [ceil(c / 32)].
void pack_index_query(const float* q, int64_t c, Int8Chunk* out);

/// scores[i] = sum_h gates[h] max(0, q[h] . key i) over keys in f32, for the fp32 numerics.
///   q [heads, c], keys [n] pointers, dots [heads, n] scratch
void index_scores_f32(const KernelTable& table, const float* q, int heads, const void* const* keys, int64_t n,
                      int64_t c, const float* gates, float* dots, float* scores);

/// The k rows with the highest scores, in rising order; a tie goes to the lower row. Scores that are NaN (of damaged
/// weights) lie beyond the infinity of their sign, so the rows chosen are always k different ones.
///   order  [n] scratch; out [min(k, n)]
/// A histogram of the upper 12 bits finds the one bin that must be sorted.
void select_topk(const float* scores, int64_t n, int64_t k, int32_t* order, int32_t* out);

/// select_topk by several workers, a part of the scores each, with the same result; k < n. count, gather and write run
/// once for every part, side by side; find and choose once, between them and in this order:
///   count -> find -> gather -> choose -> write
///   scratch  [parts * kPartScratch]; others as select_topk
class SplitTopK {
 public:
  static constexpr int kBits = 12;
  static constexpr uint32_t kBins = 1 << kBits;
  static constexpr int64_t kPartScratch = kBins + 4;

  SplitTopK(const float* scores, int64_t n, int64_t k, int parts, int32_t* scratch, int32_t* order, int32_t* out);
  /// The first score of a part: parts are whole key groups.
  int64_t first(int part) const;
  void count(int part);
  void find();
  void gather(int part);
  void choose();
  void write(int part);

 private:
  // Of a part, behind its histogram: candidates and chosen ones before it, what it has above the bin, what is written
  // before it.
  enum : uint32_t { kCandidates = kBins, kAbove, kChosen, kWritten };
  int32_t* of(int part) const { return scratch_ + part * kPartScratch; }
  uint32_t bin_of(int64_t i) const;

  const float* const scores_;
  const int64_t n_, k_;
  const int parts_;
  int32_t *const scratch_, *const order_, *const out_;
  uint32_t bin_ = 0;
  int64_t wanted_ = 0, candidates_ = 0;  // of the bin
};

}  // namespace thermocline::cpu
