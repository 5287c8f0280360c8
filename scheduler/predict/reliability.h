// Reliability: what a predictor's p is worth. Guesses are counted in bins by what was claimed; what comes out is how
// often such a guess was right of late. Source: spec/scheduler.md 2.6.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>

namespace thermocline::sched {

class Reliability {
 public:
  static constexpr size_t kBins = 64;

  void observe(float claimed, bool right) {
    Bin& bin = bins_[bin_of(claimed)];
    bin.seen = bin.seen * kDecay + 1;
    bin.right = bin.right * kDecay + (right ? 1 : 0);
  }
  /// The precision of such guesses; until there were some, what was claimed counts as one of them.
  float measured(float claimed) const {
    const Bin& bin = bins_[bin_of(claimed)];
    return static_cast<float>((bin.right + kPrior * claimed) / (bin.seen + kPrior));
  }

 private:
  struct Bin {
    double seen = 0, right = 0;
  };
  static constexpr double kDecay = 0.999, kPrior = 8;
  static size_t bin_of(float p) {
    return std::min(kBins - 1, static_cast<size_t>(std::clamp(p, 0.0f, 1.0f) * static_cast<float>(kBins)));
  }
  std::array<Bin, kBins> bins_{};
};

}  // namespace thermocline::sched
