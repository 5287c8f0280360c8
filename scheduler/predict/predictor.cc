#include "scheduler/predict/predictor.h"

#include <algorithm>

namespace thermocline::sched {
namespace {

constexpr PredictorInfo kPredictors[] = {
    {"popularity", "used most of late", make_popularity_predictor},
    {"last-token", "chosen by the token before", make_last_token_predictor},
    {"coactivation", "followed what the layer before chose", make_coactivation_predictor},
    {"router", "the router asked one layer ahead", make_router_predictor},
    {"router-2", "the router asked two layers ahead", make_router_two_ahead_predictor},
};

}  // namespace

std::span<const PredictorInfo> predictors() { return kPredictors; }

PredictorScore score(ExpertPredictor& predictor, const Trace& trace, int guesses) {
  std::vector<Guess> out;
  int64_t chosen = 0, guessed = 0, right = 0;
  for (int64_t i = 0; i < trace.size(); ++i) {
    const TraceToken& token = trace.token(i);
    const bool counts = i >= trace.size() / 2 && token.phase == TracePhase::decode;
    Known known{token.request, token.token_id};
    for (int layer = 0; layer < trace.header().layers; ++layer) {
      const std::span<const TracePick> picks = trace.picks(i, layer);
      for (int distance = 1; distance <= 2; ++distance) known.asked[distance - 1] = trace.guesses(i, layer, distance);
      if (counts) {
        predictor.guess(layer, known, guesses, out);
        chosen += static_cast<int64_t>(picks.size());
        guessed += static_cast<int64_t>(out.size());
        for (const Guess& guess : out)
          right +=
              std::any_of(picks.begin(), picks.end(), [&](const TracePick& p) { return p.expert == guess.expert; });
      }
      predictor.observe(layer, known, picks);
      known.before = picks;
    }
  }
  const auto share = [](int64_t part, int64_t whole) {
    return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0;
  };
  return {share(right, chosen), share(right, guessed)};
}

}  // namespace thermocline::sched
