#include "runtime/engine/sampler.h"

#include <algorithm>
#include <cmath>

namespace thermocline {
namespace {

int32_t argmax(const std::vector<float>& logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

Status in_range(const char* field, double value, double low, double high) {
  if (value >= low && value <= high) return {};
  Error error = invalid(std::string(field) + " is " + std::to_string(value) + ", outside " + std::to_string(low) +
                        " to " + std::to_string(high));
  error.field = field;
  return error;
}

}  // namespace

Status SamplingParams::check() const {
  TC_RETURN_IF_ERROR(in_range("temperature", temperature, 0, 100));
  TC_RETURN_IF_ERROR(in_range("top_p", top_p, 1e-9, 1));
  TC_RETURN_IF_ERROR(in_range("top_k", static_cast<double>(top_k), -1, 1e9));
  TC_RETURN_IF_ERROR(in_range("min_p", min_p, 0, 1));
  TC_RETURN_IF_ERROR(in_range("repetition_penalty", repetition_penalty, 1e-3, 100));
  TC_RETURN_IF_ERROR(in_range("presence_penalty", presence_penalty, -2, 2));
  return in_range("frequency_penalty", frequency_penalty, -2, 2);
}

Sampler::Sampler(const SamplingParams& params, std::span<const int32_t> prompt)
    : params_(params), random_(params.has_seed ? params.seed : std::random_device{}()) {
  for (const int32_t id : prompt) ++seen_[id];
}

int32_t Sampler::sample(std::span<const float> logits) {
  logits_.assign(logits.begin(), logits.end());
  penalise(logits_);
  const int32_t id = params_.temperature == 0 ? argmax(logits_) : draw(logits_);
  ++seen_[id];
  ++answered_[id];
  return id;
}

void Sampler::penalise(std::vector<float>& logits) const {
  const auto known = [&](int32_t id) { return id >= 0 && static_cast<size_t>(id) < logits.size(); };
  if (params_.repetition_penalty != 1.0) {
    const float penalty = static_cast<float>(params_.repetition_penalty);
    for (const auto& [id, count] : seen_)
      if (known(id)) logits[static_cast<size_t>(id)] *= logits[static_cast<size_t>(id)] > 0 ? 1 / penalty : penalty;
  }
  if (params_.presence_penalty == 0 && params_.frequency_penalty == 0) return;
  for (const auto& [id, count] : answered_)
    if (known(id))
      logits[static_cast<size_t>(id)] -=
          static_cast<float>(params_.presence_penalty + params_.frequency_penalty * static_cast<double>(count));
}

// Temperature, then the filters from cheap to dear: min-p, top-k, top-p; then one draw from what is left.
int32_t Sampler::draw(const std::vector<float>& logits) {
  struct Candidate {
    int32_t id;
    double weight;
  };
  const double best = logits[static_cast<size_t>(argmax(logits))];
  std::vector<Candidate> candidates;
  candidates.reserve(logits.size());
  for (size_t id = 0; id < logits.size(); ++id) {
    const double weight = std::exp((logits[id] - best) / params_.temperature);
    if (weight >= params_.min_p && weight > 0) candidates.push_back({static_cast<int32_t>(id), weight});
  }
  if (params_.top_k > 0 || params_.top_p < 1) {
    std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
      return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
    });
    if (params_.top_k > 0 && candidates.size() > static_cast<size_t>(params_.top_k))
      candidates.resize(static_cast<size_t>(params_.top_k));
  }
  double total = 0;
  for (const Candidate& c : candidates) total += c.weight;
  if (params_.top_p < 1) {
    double mass = 0;
    size_t kept = 0;
    while (kept < candidates.size() && mass < params_.top_p * total) mass += candidates[kept++].weight;
    candidates.resize(std::max<size_t>(kept, 1));
    total = mass;
  }
  double left = static_cast<double>(random_() >> 11) * 0x1p-53 * total;
  for (const Candidate& c : candidates) {
    left -= c.weight;
    if (left < 0) return c.id;
  }
  return candidates.back().id;
}

}  // namespace thermocline
