// StepBuffers: every activation of a step, sized once for the largest batch. A step allocates nothing.
#pragma once

#include <algorithm>

#include "kernels_cpu/indexer.h"
#include "kernels_cpu/moe.h"
#include "runtime/base/number_formats.h"
#include "runtime/hw/numa_buffer.h"
#include "runtime/model/model_geometry.h"

namespace thermocline {

struct ExecOptions {
  int64_t max_tokens = 512;    // of one step
  int64_t max_logit_rows = 1;  // tokens of a step whose logits may be asked for
  int64_t max_context = 4096;  // positions a sequence may reach
  bool mtp = false;
  int near_misses = 0;  // experts behind the chosen ones that steps report too, on the CPU
  int guesses = 0;      // experts of each layer that its router, asked ahead, would choose: reported, on the CPU
  bool int8_activations = false;  // of routed experts whose weights are small integers
  bool fp8_rows = false;          // the KV cache's; attention reads them unpacked
  /// On devices: CSA rows are at home in host memory, and so many of each layer have a copy on the device. 0: all of
  /// them are on the device.
  int64_t hot_rows = 0;
};

/// Names and shapes follow the data path; M = max_tokens.
struct StepBuffers {
  static Result<StepBuffers> allocate(const ModelGeometry& geometry, const ExecOptions& options, int workers);
  /// Bytes that allocate() takes.
  static uint64_t bytes(const ModelGeometry& geometry, const ExecOptions& options, int workers);

  HostArray<float> streams;          // X [M, S, D]
  HostArray<float> mtp_streams;      // Z [M, S, D]
  HostArray<float> x;                // [M, D] read from the streams, normed
  HostArray<float> y;                // [M, D] written back
  HostArray<float> mixes;            // [M, (2+S)S]
  HostArray<float> pre, post, comb;  // [M, S], [M, S], [M, S, S]

  HostArray<float> cos[2], sin[2];    // [M, rd/2]: 0 window layers, 1 compressed layers
  HostArray<float> qr;                // [M, Q]
  HostArray<float> q, o;              // [M, H c]
  HostArray<float> kv;                // [M, c]
  HostArray<float> u;                 // [M, G O]
  HostArray<float> a, z;              // [M, compressor width]
  HostArray<float> index_a, index_z;  // [M, index compressor width]
  HostArray<float> index_q;           // [M, Hi ci]
  HostArray<float> index_g;           // [M, Hi]
  HostArray<float> ring_rows;         // of each layer that compresses, [M, a ring's slot] (KvLayout::Ring)
  HostArray<int32_t> selected;        // [M, K] rows the indexer chose
  HostArray<int32_t> selected_count;  // [M]

  HostArray<float> scores;        // [M, E] router
  HostArray<int32_t> expert_ids;  // [layers, M, k]
  HostArray<float> expert_weights;
  HostArray<int32_t> near_ids;      // [layers, M, near_misses]
  HostArray<int32_t> guess_ids[2];  // of the router asked one layer ahead, and two: [layers, M, guesses], -1: none

  HostArray<float> hidden;              // [rows, D] before the head
  HostArray<float> logits, mtp_logits;  // [rows, V]

  // Inputs of linears: x rounded as FP8 and FP4 linears take it, as it is, as INT8; then of wq_b, wo_a, wo_b, the head.
  cpu::GemmInput linear_x, plain_x, int8_x, qr_input, o_input, u_input, head_input;
  cpu::MoeWorkspace moe;

  HostArray<cpu::Int8Chunk> index_query;  // [M, Hi, key_tiles] FP4 queries

  // One token whose rows are split over the workers; empty where no context reaches a second block of rows.
  HostArray<float> split_scores;  // [H, max_rows]
  HostArray<float> split_values;  // [blocks of max_rows, H, c]
  HostArray<float> denominators;  // [H]

  // FP8 rows as attention reads them: a slot is what one token reads, of a worker that has whole tokens, or of a token
  // that workers share. Where contexts outgrow a slot (HCA rows), all of it is one token's, or a slot has a block of
  // rows.
  int64_t slot_rows = 0;
  HostArray<bf16> unpacked;  // [max(workers * slot_rows, max_rows), c]; empty where rows are read as they lie

  // Per worker.
  int64_t max_rows = 0;            // rows one token can attend to
  int64_t index_rows = 0;          // keys one token can score, in whole groups
  int64_t key_tiles = 0;           // of 32 dims in an index key
  int64_t attention_heads = 0;     // heads whose scores a worker keeps: kHeadBlock, or all where rows come in blocks
  int64_t attention_floats = 0;    // their scores and denominators, then kHeadBlock heads of values
  HostArray<const void*> rows;     // [workers, row_stride()]
  HostArray<float> attention;      // [workers, attention_floats]
  HostArray<float> index_dots;     // [workers, Hi, kIndexBlock]
  HostArray<float> index_scores;   // [workers, index_rows]
  HostArray<int32_t> index_order;  // the same
  HostArray<int32_t> index_topk;   // [workers, SplitTopK::kPartScratch]; empty where contexts are short
  HostArray<const float*> window;  // [workers, 2, window_entries]: what one compressed row pools
  HostArray<float> row;            // [workers, widest row]

  static constexpr int64_t kIndexBlock = 256;      // keys scored at a time
  static constexpr int64_t kSplitTopKRows = 8192;  // more keys than these are chosen from by all workers
  static constexpr int kHeadBlock = 8;             // heads that share one pass over the rows
  int64_t row_floats = 0, window_entries = 0;
  int64_t row_stride() const { return std::max(max_rows, kIndexBlock); }
};

}  // namespace thermocline
