// For every expert the ones of the next layer that followed it most: a few each, counted with decay. What a layer has
// just chosen votes with its rows; where they say nothing, popularity does.
#include <algorithm>
#include <array>

#include "scheduler/predict/predictor.h"

namespace thermocline::sched {
namespace {

constexpr size_t kSuccessors = 32;
constexpr float kDecay = 0.98f;  // of a row, with each use of its expert

struct Row {
  struct Successor {
    uint16_t expert = 0;
    float count = 0;
  };
  std::array<Successor, kSuccessors> successors{};
  float sum = 0;

  void follow(std::span<const TracePick> chosen) {
    for (Successor& s : successors) s.count *= kDecay;
    sum = sum * kDecay + 1;
    for (const TracePick& pick : chosen) {
      auto at = std::find_if(successors.begin(), successors.end(),
                             [&](const Successor& s) { return s.count > 0 && s.expert == pick.expert; });
      if (at == successors.end()) {  // in place of the rarest
        at = std::min_element(successors.begin(), successors.end(),
                              [](const Successor& a, const Successor& b) { return a.count < b.count; });
        if (at->count >= 1) continue;
        *at = {pick.expert, 0};
      }
      at->count += 1;
    }
  }
};

class CoactivationPredictor final : public ExpertPredictor {
 public:
  CoactivationPredictor(int layers, int experts)
      : experts_(static_cast<size_t>(experts)),
        rows_(static_cast<size_t>(layers) * experts_),
        votes_(experts_),
        popularity_(make_popularity_predictor(layers, experts)) {}

  void guess(int layer, const Known& known, int most, std::vector<Guess>& out) override {
    popularity_->guess(layer, known, static_cast<int>(experts_), popular_);
    for (const Guess& guess : popular_) votes_[guess.expert] = guess.p;
    for (const TracePick& pick : known.before) {
      const Row& row = rows_[static_cast<size_t>(layer - 1) * experts_ + pick.expert];
      if (row.sum <= 0) continue;
      for (const Row::Successor& s : row.successors) votes_[s.expert] += s.count / row.sum;
    }
    const auto voters = static_cast<float>(known.before.size() + 1);
    for (Guess& guess : popular_) guess.p = std::min(1.0f, votes_[guess.expert] / voters);
    const auto count = std::min(popular_.size(), static_cast<size_t>(most));
    std::partial_sort(popular_.begin(), popular_.begin() + static_cast<ptrdiff_t>(count), popular_.end(),
                      [](const Guess& a, const Guess& b) { return a.p > b.p || (a.p == b.p && a.expert < b.expert); });
    out.assign(popular_.begin(), popular_.begin() + static_cast<ptrdiff_t>(count));
  }
  void observe(int layer, const Known& known, std::span<const TracePick> chosen) override {
    popularity_->observe(layer, known, chosen);
    for (const TracePick& pick : known.before)
      rows_[static_cast<size_t>(layer - 1) * experts_ + pick.expert].follow(chosen);
  }

 private:
  const size_t experts_;
  std::vector<Row> rows_;  // [layers, experts]: of the next layer
  std::vector<float> votes_;
  std::unique_ptr<ExpertPredictor> popularity_;
  std::vector<Guess> popular_;
};

}  // namespace

std::unique_ptr<ExpertPredictor> make_coactivation_predictor(int layers, int experts) {
  return std::make_unique<CoactivationPredictor>(layers, experts);
}

}  // namespace thermocline::sched
