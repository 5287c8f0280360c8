#include "scheduler/trace/synthetic.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>
#include <numeric>

#include "runtime/base/check.h"
#include "runtime/base/number_formats.h"

namespace thermocline::sched {
namespace {

constexpr int kSubjectTokens = 200;

uint64_t mixed_bits(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

Result<Workload> parse_workload(std::string_view name) {
  constexpr std::string_view kNames[] = {"one", "domains", "mixed", "uniform", "cyclic"};
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (name == kNames[i]) return static_cast<Workload>(i);
  return invalid("unknown workload '" + std::string(name) + "': use one, domains, mixed, uniform or cyclic");
}

SyntheticRouter::SyntheticRouter(const SyntheticOptions& o)
    : o_(o),
      random_(o.seed),
      ahead_(o.seed + 0x5bd1e995),
      scores_(static_cast<size_t>(o.experts)),
      ahead_scores_(scores_.size()) {
  TC_CHECK(o.top_k + o.near_misses <= o.experts && o.guesses <= o.experts);
  model_.resize(static_cast<size_t>(o.layers) * o.experts);
  for (float& score : model_) score = o.model_sd * random_.normal();
  if (o.hash_layers > 0) zipf_.resize(static_cast<size_t>(o.vocabulary));
  double sum = 0;
  for (size_t rank = 0; rank < zipf_.size(); ++rank) zipf_[rank] = sum += 1.0 / static_cast<double>(rank + 1);
  order_.resize(static_cast<size_t>(o.experts));
  picks_.resize(static_cast<size_t>(header().picks_per_token()));
}

TraceHeader SyntheticRouter::header() const {
  return {.model = "synthetic",
          .layers = o_.layers,
          .experts = o_.experts,
          .top_k = o_.top_k,
          .near_misses = o_.near_misses,
          .guesses = o_.guesses};
}

SyntheticRouter::Random::Random(uint64_t seed) : state_{mixed_bits(seed), mixed_bits(seed + 1)} {}

double SyntheticRouter::Random::uniform() {
  const uint64_t a = state_[0], b = state_[1] ^ a, sum = state_[0] + state_[1];
  state_[0] = std::rotl(a, 24) ^ b ^ (b << 16);
  state_[1] = std::rotl(b, 37);
  return static_cast<double>((sum >> 11) + 1) * 0x1p-53;
}

float SyntheticRouter::Random::normal() {
  if (has_spare_) {
    has_spare_ = false;
    return spare_;
  }
  const double radius = std::sqrt(-2 * std::log(uniform())), angle = 2 * std::numbers::pi * uniform();
  spare_ = static_cast<float>(radius * std::sin(angle));
  has_spare_ = true;
  return static_cast<float>(radius * std::cos(angle));
}

void SyntheticRouter::change_subject(uint32_t number) {
  if (requests_.size() <= number) requests_.resize(number + 1);
  Request& request = requests_[number];
  request.subject.resize(model_.size());
  for (float& score : request.subject) score = o_.request_sd * random_.normal();
  if (!request.moment.empty()) return;
  request.moment.resize(model_.size());
  for (float& score : request.moment) score = o_.moment_sd * random_.normal();
}

std::span<const TracePick> SyntheticRouter::next(uint32_t number) {
  if (requests_.size() <= number || requests_[number].subject.empty()) change_subject(number);
  Request& request = requests_[number];
  const float step_sd = o_.moment_sd * std::sqrt(1 - o_.moment_rho * o_.moment_rho);
  const size_t experts = scores_.size(), picked = static_cast<size_t>(header().picks_per_layer());
  size_t token = 0;
  if (o_.hash_layers > 0)
    token = static_cast<size_t>(std::lower_bound(zipf_.begin(), zipf_.end(), random_.uniform() * zipf_.back()) -
                                zipf_.begin());
  for (size_t layer = 0; layer < static_cast<size_t>(o_.layers); ++layer) {
    const bool hashed = layer < static_cast<size_t>(o_.hash_layers);
    for (size_t e = 0; e < experts; ++e) {
      const size_t i = layer * experts + e;
      if (hashed) {  // a token's experts are the same whenever it comes
        scores_[e] = static_cast<float>(mixed_bits((token * 64 + layer) * 65536 + e) >> 40);
        continue;
      }
      if (step_sd > 0) request.moment[i] = o_.moment_rho * request.moment[i] + step_sd * random_.normal();
      const auto luck = static_cast<float>(-std::log(-std::log(random_.uniform() * (1 - 1e-12))));
      scores_[e] = model_[i] + request.subject[i] + request.moment[i] + luck;
    }
    choose(scores_, o_.top_k + o_.near_misses, &picks_[layer * picked]);
    guess(static_cast<int>(layer), hashed, &picks_[layer * picked + static_cast<size_t>(o_.top_k + o_.near_misses)]);
  }
  return picks_;
}

// What the router would have said one layer before, and two: of scores that those layers have yet to change. Hash
// layers are known but for the first, which nobody is ahead of.
void SyntheticRouter::guess(int layer, bool hashed, TracePick* out) {
  for (int distance = 1; distance <= 2; ++distance, out += o_.guesses) {
    if (layer < distance) {
      std::fill_n(out, o_.guesses, TracePick{TracePick::kNobody, 0});
      continue;
    }
    const float sd = hashed ? 0 : o_.ahead_sd * std::sqrt(static_cast<float>(distance));
    for (size_t e = 0; o_.guesses > 0 && e < scores_.size(); ++e)
      ahead_scores_[e] = scores_[e] + (sd > 0 ? sd * ahead_.normal() : 0);
    choose(ahead_scores_, o_.guesses, out);
  }
}

void SyntheticRouter::choose(const std::vector<float>& scores, int picked, TracePick* out) {
  std::iota(order_.begin(), order_.end(), 0);
  std::partial_sort(order_.begin(), order_.begin() + picked, order_.end(), [&](int a, int b) {
    const float x = scores[static_cast<size_t>(a)], y = scores[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  });
  for (int i = 0; i < picked; ++i)
    out[i] = {static_cast<uint16_t>(order_[static_cast<size_t>(i)]),
              float_to_bf16(1.0f / static_cast<float>(i < o_.top_k ? o_.top_k : 2 * o_.top_k))};
}

Trace synthesize_trace(const SyntheticOptions& options, Workload workload, int requests, int tokens, int cycle) {
  SyntheticOptions o = options;
  if (workload == Workload::cyclic) o.guesses = 0;
  if (workload == Workload::uniform) {
    o.model_sd = o.request_sd = o.moment_sd = 0;
    o.hash_layers = 0;
  }
  SyntheticRouter router(o);
  Trace trace(router.header());
  const auto picked = static_cast<size_t>(router.header().picks_per_layer());
  std::vector<TracePick> in_turn(static_cast<size_t>(o.layers) * picked);
  const int turn = std::clamp(cycle, static_cast<int>(picked), o.experts);
  for (int t = 0; t < tokens; ++t)
    for (int r = 0; r < requests; ++r) {
      const TraceToken token{
          .step = static_cast<uint32_t>(t), .request = static_cast<uint32_t>(r), .position = static_cast<uint32_t>(t)};
      if (workload == Workload::cyclic) {
        for (size_t i = 0; i < in_turn.size(); ++i) {
          const auto position =
              static_cast<int64_t>(t) * static_cast<int64_t>(picked) + static_cast<int64_t>(i % picked);
          in_turn[i] = {static_cast<uint16_t>(position % turn), float_to_bf16(1.0f / static_cast<float>(o.top_k))};
        }
        trace.add(token, in_turn);
        continue;
      }
      if (workload == Workload::domains && t % kSubjectTokens == 0) router.change_subject(static_cast<uint32_t>(r));
      trace.add(token, router.next(static_cast<uint32_t>(r)));
    }
  return trace;
}

}  // namespace thermocline::sched
