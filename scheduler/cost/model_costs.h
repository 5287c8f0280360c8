// ModelCosts: what a model's layers weigh and multiply, as plain numbers. A model family makes them from its
// config.json; the cost model, the planner and the simulator know nothing else of a model.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "scheduler/cost/machine_profile.h"

namespace thermocline::sched {

struct LayerCosts {
  std::array<double, 3> dense_bytes{};  // by WeightFormat: read by every step; attention, router, shared expert
  double shared_bytes = 0;              // the shared expert's part of them
  WeightFormat shared_format = WeightFormat::fp8;
  int regions = 0;  // parallel regions of a step on the CPU; kernels on a device are some four times as many
  // Of a token: elements of the residual streams, as often as they are mixed; of queries, rows and results that are
  // normed, rotated and rounded.
  double stream_elements = 0, row_elements = 0;

  // Attention: a token sees `window` raw rows, and of its compressed ones all, or the `topk` that the index selects.
  int64_t window = 0, ratio = 0, topk = 0;  // ratio 0: no compressed rows; topk 0: all
  int64_t heads = 0, head_dim = 0;
  int64_t index_heads = 0, index_dim = 0;
  double row_bytes = 0, key_bytes = 0;

  bool hash_routed = false;  // the token id says which experts

  double compressed(double context) const { return ratio > 0 ? context / static_cast<double>(ratio) : 0; }
  /// Rows that a token at the end of a context attends to.
  double rows(double context) const;
  /// Keys that it scores: none while all rows are selected anyway.
  double keys(double context) const;
  /// Bytes that a token leaves for good.
  double kv_bytes_per_token() const {
    return ratio > 0 ? (row_bytes + (topk > 0 ? key_bytes : 0)) / static_cast<double>(ratio) : 0;
  }
};

struct ModelCosts {
  std::string name;
  int64_t max_context = 0;
  int experts = 0, experts_per_token = 0;  // routed, of a layer
  double expert_bytes = 0;                 // of one, with its scales
  WeightFormat expert_format = WeightFormat::mxfp4;
  double head_bytes = 0, embedding_bytes = 0;
  WeightFormat head_format = WeightFormat::bf16;
  std::vector<LayerCosts> layers;
  double sequence_bytes = 0;  // of KV at rest: windows and rings

  int layer_count() const { return static_cast<int>(layers.size()); }
  double routed_bytes() const { return expert_bytes * experts * layer_count(); }
  double dense_bytes() const;         // with the head, without the embedding
  double kv_bytes_per_token() const;  // of a long context
  /// Experts of a layer that n tokens touch if routing is uniform. Source: spec 2.8.
  double unique_experts(double n) const;
};

}  // namespace thermocline::sched
