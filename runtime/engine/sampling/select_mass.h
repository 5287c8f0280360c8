// The token at a given share of a row's mass, by falling logit, without sorting the row: a histogram finds the few
// tokens among which it lies, halving finds it among them. A draw and the cut of top-p are both such a question.
#pragma once

#include <cstdint>
#include <span>

#include "runtime/engine/sampling/row_scan.h"
#include "runtime/engine/sampling/weights.h"

namespace thermocline::sampling {

/// Where the running mass first exceeds what was asked for.
struct Cut {
  int32_t id = -1;
  double mass = 0;  // of this token and all before it
};

/// The first of `list`, ordered by `before`, up to which the mass exceeds `target`, if all of it does; `mass_before`
/// is the mass of what comes before the list. Reorders the list; expected time is linear in it.
Cut find_mass(std::span<Candidate> list, double mass_before, double target);

/// The mass of a row in bins of falling logit. 40 KiB; one a worker.
class MassHistogram {
 public:
  void fill(std::span<const float> row, const Weighting& weighting);
  /// The weight of the whole row: at least 1, the best token's.
  double total() const { return total_; }
  /// The first token, ordered by `before`, up to which the mass exceeds `target` (< total()), in the row and weighting
  /// that filled it.  block_max: of scan_row;  candidates [V] scratch
  Cut find(std::span<const float> row, std::span<const float> block_max, const Weighting& weighting, double target,
           std::span<Candidate> candidates) const;

 private:
  // Exponents from 0 to -38 fall into bins of equal width; below, with less than 2^-54 of the best, nothing weighs.
  static constexpr int kBins = 1024;
  static constexpr int kCopies = 4;  // one a lane: neighbours in one bin do not wait for each other

  double copies_[kBins][kCopies];
  double bins_[kBins];
  double total_ = 0;
};

}  // namespace thermocline::sampling
