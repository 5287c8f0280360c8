// DecayedCounts: how often each expert was used of late, over several half-lives at once. Nothing is decayed: what
// comes later counts for more, by a factor that grows, so a step costs one addition a use and a half-life, and the
// order of what was not used stays. Source: spec/scheduler.md 2.3.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

namespace thermocline::sched {

class DecayedCounts {
 public:
  /// In steps.
  static constexpr std::array<int, 5> kHalfLives = {8, 16, 32, 64, 256};
  static constexpr size_t kCount = kHalfLives.size();

  explicit DecayedCounts(size_t experts) : sums_(experts) { growth_.fill(1); }

  /// So many steps go by. True: everything was scaled, what others copied from here is out of date.
  bool advance(double steps) {
    bool scaled = false;
    for (size_t h = 0; h < kCount; ++h) {
      growth_[h] *= std::exp2(steps / kHalfLives[h]);
      if (growth_[h] < kMostGrowth) continue;
      for (auto& sums : sums_) sums[h] /= growth_[h];
      growth_[h] = 1;
      scaled = true;
    }
    return scaled;
  }
  /// It was used, `times` of the steps that advance() let go by.
  void use(size_t expert, double times) {
    for (size_t h = 0; h < kCount; ++h) sums_[expert][h] += growth_[h] * times;
  }
  /// Grows with time; comparable between experts at one time.
  double sum(size_t expert, size_t half_life) const { return sums_[expert][half_life]; }
  /// The chance that a step uses it, if steps stay as they were.
  double rate(size_t expert, size_t half_life) const {
    return uses(expert, half_life) * (1 - std::exp2(-1.0 / kHalfLives[half_life]));
  }
  /// Uses, each halved with every half-life since.
  double uses(size_t expert, size_t half_life) const { return sums_[expert][half_life] / growth_[half_life]; }

 private:
  static constexpr double kMostGrowth = 1e150;
  std::vector<std::array<double, kCount>> sums_;
  std::array<double, kCount> growth_{};
};

}  // namespace thermocline::sched
