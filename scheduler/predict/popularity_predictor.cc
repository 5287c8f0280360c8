#include <algorithm>
#include <numeric>

#include "scheduler/predict/predictor.h"

namespace thermocline::sched {
namespace {

constexpr size_t kHalfLife = 2;  // 32 tokens

class PopularityPredictor final : public ExpertPredictor {
 public:
  PopularityPredictor(int layers, int experts)
      : experts_(static_cast<size_t>(experts)), counts_(static_cast<size_t>(layers) * experts_), order_(experts_) {}

  void guess(int layer, const Known&, int most, std::vector<Guess>& out) override {
    const size_t first = static_cast<size_t>(layer) * experts_,
                 count = std::min(order_.size(), static_cast<size_t>(most));
    std::iota(order_.begin(), order_.end(), uint16_t{0});
    std::partial_sort(order_.begin(), order_.begin() + static_cast<ptrdiff_t>(count), order_.end(),
                      [&](uint16_t a, uint16_t b) {
                        const double x = counts_.sum(first + a, kHalfLife), y = counts_.sum(first + b, kHalfLife);
                        return x > y || (x == y && a < b);
                      });
    out.clear();
    for (size_t i = 0; i < count; ++i)
      out.push_back({order_[i], static_cast<float>(std::min(1.0, counts_.rate(first + order_[i], kHalfLife)))});
  }
  void observe(int layer, const Known&, std::span<const TracePick> chosen) override {
    if (layer == 0) (void)counts_.advance(1);
    for (const TracePick& pick : chosen) counts_.use(static_cast<size_t>(layer) * experts_ + pick.expert, 1);
  }

 private:
  const size_t experts_;
  DecayedCounts counts_;
  std::vector<uint16_t> order_;
};

}  // namespace

std::unique_ptr<ExpertPredictor> make_popularity_predictor(int layers, int experts) {
  return std::make_unique<PopularityPredictor>(layers, experts);
}

}  // namespace thermocline::sched
