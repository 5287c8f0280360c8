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
  int64_t heads = 0, head_dim = 0;          // of head_dim products a row for its score, as many for its value
  int64_t prefill_head_dim = 0;             // the same in a prompt's steps, where it differs; 0: it does not
  int64_t index_heads = 0, index_dim = 0;
  int64_t most_keys = INT64_MAX;  // that its index scores; 0: it attends to what a layer before has selected
  double row_bytes = 0, key_bytes = 0;
  bool own_rows = true;  // false: compressed rows and keys are those of a layer before

  bool routed = true;        // has routed experts
  bool hash_routed = false;  // the token id says which experts
  int64_t prompt_tail = 0;   // of a prompt only its last so many tokens pass through the layer; 0: all of them

  double compressed(double context) const { return ratio > 0 ? context / static_cast<double>(ratio) : 0; }
  /// Rows that a token at the end of a context attends to.
  double rows(double context) const;
  /// Keys that it scores: none while all rows are selected anyway.
  double keys(double context) const;
  bool selects() const { return topk > 0 && most_keys > 0; }
  /// Bytes that a token leaves for good.
  double kv_bytes_per_token() const {
    return ratio > 0 && own_rows ? (row_bytes + (topk > 0 ? key_bytes : 0)) / static_cast<double>(ratio) : 0;
  }
};

struct ModelCosts {
  std::string name;
  int64_t max_context = 0;
  int experts = 0, experts_per_token = 0;  // of a layer that has routed experts
  double expert_bytes = 0;                 // of one, with its scales
  WeightFormat expert_format = WeightFormat::mxfp4;
  double head_bytes = 0, embedding_bytes = 0;
  WeightFormat head_format = WeightFormat::bf16;
  std::vector<LayerCosts> layers;
  double sequence_bytes = 0;  // of KV at rest: windows and rings
  int64_t page_tokens = 1;    // of the KV cache: sequences hold whole pages
  // A table of n-grams, of which a token reads some rows here and there: in host memory, or on a disk.
  double table_bytes = 0, table_reads_per_token = 0;

  int layer_count() const { return static_cast<int>(layers.size()); }
  /// Layers with routed experts: what traces, policies and slots count.
  int routed_layer_count() const;
  int hash_layer_count() const;
  double routed_bytes() const { return expert_bytes * experts * routed_layer_count(); }
  double dense_bytes() const;         // with the head, without the embedding
  double kv_bytes_per_token() const;  // of a long context
  /// Experts of a layer that n tokens touch if routing is uniform. Source: spec 2.8.
  double unique_experts(double n) const;
};

}  // namespace thermocline::sched
