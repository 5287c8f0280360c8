#include "scheduler/cost/model_costs.h"

#include <algorithm>
#include <cmath>

namespace thermocline::sched {

double LayerCosts::rows(double context) const {
  const double all = compressed(context);
  return std::min(context, static_cast<double>(window)) + (topk > 0 ? std::min(all, static_cast<double>(topk)) : all);
}

double LayerCosts::keys(double context) const {
  const double all = compressed(context);
  return topk > 0 && all > static_cast<double>(topk) ? std::min(all, static_cast<double>(most_keys)) : 0;
}

int ModelCosts::routed_layer_count() const {
  return static_cast<int>(std::count_if(layers.begin(), layers.end(), [](const LayerCosts& l) { return l.routed; }));
}

int ModelCosts::hash_layer_count() const {
  return static_cast<int>(
      std::count_if(layers.begin(), layers.end(), [](const LayerCosts& l) { return l.hash_routed; }));
}

double ModelCosts::dense_bytes() const {
  double bytes = head_bytes;
  for (const LayerCosts& layer : layers)
    for (const double of_format : layer.dense_bytes) bytes += of_format;
  return bytes;
}

double ModelCosts::kv_bytes_per_token() const {
  double bytes = 0;
  for (const LayerCosts& layer : layers) bytes += layer.kv_bytes_per_token();
  return bytes;
}

double ModelCosts::unique_experts(double n) const {
  return experts * (1 - std::pow(1 - static_cast<double>(experts_per_token) / experts, n));
}

}  // namespace thermocline::sched
