#include "runtime/engine/sampling/penalties.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace thermocline::sampling {
namespace {

bool in_row(int32_t id, std::span<const float> row) { return id >= 0 && static_cast<size_t>(id) < row.size(); }

// A logit of 3e38 times a penalty is no infinity; -inf, a token that was banned already, stays.
float finite(float logit) {
  constexpr float kMax = std::numeric_limits<float>::max();
  return logit == -INFINITY ? logit : std::clamp(logit, -kMax, kMax);
}

float times(float logit, float factor) {
  return finite(logit == -INFINITY ? logit : std::max(logit * factor, std::numeric_limits<float>::lowest()));
}

}  // namespace

void add_bias(std::span<const std::pair<int32_t, float>> bias, std::span<float> row) {
  for (const auto& [id, value] : bias)
    if (in_row(id, row)) row[static_cast<size_t>(id)] = finite(row[static_cast<size_t>(id)] + value);
}

void ban(std::span<const int32_t> ids, std::span<float> row) {
  for (const int32_t id : ids)
    if (in_row(id, row)) row[static_cast<size_t>(id)] = -INFINITY;
}

Penalties::Penalties(const SamplingParams& params, std::span<const int32_t> prompt)
    : active_(params.penalises()),
      repetition_(static_cast<float>(params.repetition_penalty)),
      presence_(params.presence_penalty),
      frequency_(params.frequency_penalty) {
  if (repetition_ != 1)
    for (const int32_t id : prompt) answered(id);
}

int64_t& Penalties::answered(int32_t id) {
  const auto [at, is_new] = places_.try_emplace(id, tokens_.size());
  if (is_new) tokens_.push_back({id, 0});
  return tokens_[at->second].answered;
}

void Penalties::count(int32_t id) {
  if (active_) ++answered(id);
}

void Penalties::apply(std::span<float> row) const {
  for (const auto& [id, answered] : tokens_) {
    if (!in_row(id, row)) continue;
    float& logit = row[static_cast<size_t>(id)];
    if (repetition_ != 1) logit = times(logit, logit > 0 ? 1 / repetition_ : repetition_);
    if (answered > 0)
      logit = finite(logit - static_cast<float>(presence_ + frequency_ * static_cast<double>(answered)));
  }
}

}  // namespace thermocline::sampling
