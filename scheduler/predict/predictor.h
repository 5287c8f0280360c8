// Which experts a layer will choose, said before its router has run. A predictor is asked, then told what was chosen;
// pure, so a trace says what it would have been worth. Source: spec/scheduler.md 2.6.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "scheduler/stats/decayed_counts.h"
#include "scheduler/trace/trace.h"

namespace thermocline::sched {

struct Guess {
  uint16_t expert = 0;
  float p = 0;  // of being chosen
};

/// What is known when a layer is guessed.
struct Known {
  uint32_t request = 0;
  int32_t token_id = -1;
  std::span<const TracePick> before = {};    // chosen by the layer before
  std::span<const TracePick> asked[2] = {};  // what the router said, asked one layer ahead, and two
};

class ExpertPredictor {
 public:
  virtual ~ExpertPredictor() = default;
  /// The likeliest first, `most` at most, into `out`.
  virtual void guess(int layer, const Known& known, int most, std::vector<Guess>& out) = 0;
  virtual void observe(int layer, const Known& known, std::span<const TracePick> chosen) = 0;
};

struct PredictorInfo {
  std::string_view name, description;
  std::unique_ptr<ExpertPredictor> (*make)(int layers, int experts);
};
std::span<const PredictorInfo> predictors();

// One a file:
/// What was used most of late: the bar that the others have to clear.
std::unique_ptr<ExpertPredictor> make_popularity_predictor(int layers, int experts);
/// What the request's token before chose.
std::unique_ptr<ExpertPredictor> make_last_token_predictor(int layers, int experts);
/// What followed the experts that the layer before has just chosen.
std::unique_ptr<ExpertPredictor> make_coactivation_predictor(int layers, int experts);
/// What the layer's own router said, asked one layer ahead or two, of the state it was to see changed; where it was not
/// asked, popularity.
std::unique_ptr<ExpertPredictor> make_router_predictor(int layers, int experts);
std::unique_ptr<ExpertPredictor> make_router_two_ahead_predictor(int layers, int experts);
/// Layers that the token id routes: exact. `table`: [layers, vocabulary, top_k], outlives it; other layers get no
/// guess.
std::unique_ptr<ExpertPredictor> make_hash_predictor(std::span<const int32_t> table, int layers, int64_t vocabulary,
                                                     int top_k);

/// How good a predictor was over a trace, decode tokens only; the first half teaches it.
struct PredictorScore {
  double recall = 0;     // share of the chosen experts that were among the guesses
  double precision = 0;  // share of the guesses that were chosen
};
PredictorScore score(ExpertPredictor& predictor, const Trace& trace, int guesses);

}  // namespace thermocline::sched
