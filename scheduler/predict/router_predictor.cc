// What the layer's own router would choose if it were asked before the layers between have changed the state: the best
// there is to know, but for what those layers add. How much a rank is worth is learned.
#include <algorithm>
#include <array>

#include "scheduler/predict/predictor.h"

namespace thermocline::sched {
namespace {

constexpr size_t kRanks = 32;
constexpr double kForget = 0.999, kPrior = 8;  // guesses of a rank that say 0.5 before there were any

class RouterPredictor final : public ExpertPredictor {
 public:
  RouterPredictor(int layers, int experts, int distance)
      : distance_(distance),
        ranks_(static_cast<size_t>(layers)),
        popularity_(make_popularity_predictor(layers, experts)) {}

  void guess(int layer, const Known& known, int most, std::vector<Guess>& out) override {
    const std::span<const TracePick> said = asked(known);
    if (said.empty()) return popularity_->guess(layer, known, most, out);
    out.clear();
    for (size_t rank = 0; rank < said.size() && static_cast<int>(rank) < most; ++rank)
      out.push_back({said[rank].expert, static_cast<float>(ranks_[static_cast<size_t>(layer)][rank].p())});
  }
  void observe(int layer, const Known& known, std::span<const TracePick> chosen) override {
    popularity_->observe(layer, known, chosen);
    const std::span<const TracePick> said = asked(known);
    for (size_t rank = 0; rank < said.size(); ++rank)
      ranks_[static_cast<size_t>(layer)][rank].count(
          std::any_of(chosen.begin(), chosen.end(), [&](const TracePick& p) { return p.expert == said[rank].expert; }));
  }

 private:
  struct Rank {
    double seen = 0, right = 0;
    double p() const { return (right + 0.5 * kPrior) / (seen + kPrior); }
    void count(bool was_right) {
      seen = seen * kForget + 1;
      right = right * kForget + (was_right ? 1 : 0);
    }
  };
  std::span<const TracePick> asked(const Known& known) const {
    std::span<const TracePick> said = known.asked[distance_ - 1];
    const auto end =
        std::find_if(said.begin(), said.end(), [](const TracePick& p) { return p.expert == TracePick::kNobody; });
    return said.first(std::min(kRanks, static_cast<size_t>(end - said.begin())));
  }

  const int distance_;
  std::vector<std::array<Rank, kRanks>> ranks_;  // by layer
  std::unique_ptr<ExpertPredictor> popularity_;
};

}  // namespace

std::unique_ptr<ExpertPredictor> make_router_predictor(int layers, int experts) {
  return std::make_unique<RouterPredictor>(layers, experts, 1);
}
std::unique_ptr<ExpertPredictor> make_router_two_ahead_predictor(int layers, int experts) {
  return std::make_unique<RouterPredictor>(layers, experts, 2);
}

}  // namespace thermocline::sched
