#include "runtime/exec/step_buffers.h"

#include <algorithm>

#include "kernels_cpu/attention.h"
#include "kernels_cpu/indexer.h"
#include "runtime/hw/host_memory.h"

namespace thermocline {

Result<StepBuffers> StepBuffers::allocate(const ModelGeometry& g, const ExecOptions& options, int workers) {
  StepBuffers b;
  const int64_t m = options.max_tokens, s = g.hc_mult, heads = static_cast<int64_t>(g.n_heads) * g.head_dim;
  const int64_t groups = static_cast<int64_t>(g.o_groups) * g.o_lora_rank,
                logit_rows = std::min(m, options.max_logit_rows);
  TC_ASSIGN(b.streams, HostArray<float>::allocate(m * s * g.dim));
  TC_ASSIGN(b.mtp_streams, HostArray<float>::allocate(options.mtp ? m * s * g.dim : 0));
  TC_ASSIGN(b.x, HostArray<float>::allocate(m * g.dim));
  TC_ASSIGN(b.y, HostArray<float>::allocate(m * g.dim));
  TC_ASSIGN(b.mixes, HostArray<float>::allocate(m * g.hc_outputs()));
  TC_ASSIGN(b.pre, HostArray<float>::allocate(m * s));
  TC_ASSIGN(b.post, HostArray<float>::allocate(m * s));
  TC_ASSIGN(b.comb, HostArray<float>::allocate(m * s * s));
  for (int table = 0; table < 2; ++table) {
    TC_ASSIGN(b.cos[table], HostArray<float>::allocate(m * g.rope_head_dim / 2));
    TC_ASSIGN(b.sin[table], HostArray<float>::allocate(m * g.rope_head_dim / 2));
  }
  TC_ASSIGN(b.qr, HostArray<float>::allocate(m * g.q_lora_rank));
  TC_ASSIGN(b.q, HostArray<float>::allocate(m * heads));
  TC_ASSIGN(b.o, HostArray<float>::allocate(m * heads));
  TC_ASSIGN(b.kv, HostArray<float>::allocate(m * g.head_dim));
  TC_ASSIGN(b.u, HostArray<float>::allocate(m * groups));
  TC_ASSIGN(b.a, HostArray<float>::allocate(m * 2 * g.head_dim));
  TC_ASSIGN(b.z, HostArray<float>::allocate(m * 2 * g.head_dim));
  TC_ASSIGN(b.index_a, HostArray<float>::allocate(m * 2 * g.index_head_dim));
  TC_ASSIGN(b.index_z, HostArray<float>::allocate(m * 2 * g.index_head_dim));
  int64_t ring_floats = 0;  // of a token
  for (int i = 0; i < g.n_layers; ++i)
    if (g.compress_ratios[i] > 0)
      ring_floats += 2 * (g.compressor_width(i, g.head_dim) +
                          (g.kind(i) == LayerKind::csa ? g.compressor_width(i, g.index_head_dim) : 0));
  TC_ASSIGN(b.ring_rows, HostArray<float>::allocate(m * ring_floats));
  TC_ASSIGN(b.index_q, HostArray<float>::allocate(m * g.index_n_heads * g.index_head_dim));
  TC_ASSIGN(b.index_g, HostArray<float>::allocate(m * g.index_n_heads));
  TC_ASSIGN(b.selected, HostArray<int32_t>::allocate(m * g.index_topk));
  TC_ASSIGN(b.selected_count, HostArray<int32_t>::allocate(m));
  TC_ASSIGN(b.scores, HostArray<float>::allocate(m * g.n_routed_experts));
  const int64_t layers = g.n_layers + (options.mtp ? 1 : 0), pairs = layers * m * g.n_activated_experts;
  TC_ASSIGN(b.expert_ids, HostArray<int32_t>::allocate(pairs));
  TC_ASSIGN(b.expert_weights, HostArray<float>::allocate(pairs));
  TC_ASSIGN(b.near_ids, HostArray<int32_t>::allocate(g.n_layers * m * options.near_misses));
  for (HostArray<int32_t>& ids : b.guess_ids) {
    TC_ASSIGN(ids, HostArray<int32_t>::allocate(g.n_layers * m * options.guesses));
  }
  TC_ASSIGN(b.hidden, HostArray<float>::allocate(logit_rows * g.dim));
  TC_ASSIGN(b.logits, HostArray<float>::allocate(logit_rows * g.vocab_size));
  TC_ASSIGN(b.mtp_logits, HostArray<float>::allocate(options.mtp ? logit_rows * g.vocab_size : 0));

  // The MTP block projects all S streams at once.
  TC_ASSIGN(b.linear_x, cpu::GemmInput::allocate(options.mtp ? m * s : m, g.dim));
  TC_ASSIGN(b.plain_x, cpu::GemmInput::allocate(options.mtp ? m * s : m, g.dim));
  TC_ASSIGN(b.int8_x, cpu::GemmInput::allocate(options.int8_activations ? m : 0, g.dim));
  TC_ASSIGN(b.qr_input, cpu::GemmInput::allocate(m, g.q_lora_rank));
  TC_ASSIGN(b.o_input, cpu::GemmInput::allocate(m * g.o_groups, heads / g.o_groups));
  TC_ASSIGN(b.u_input, cpu::GemmInput::allocate(m, groups));
  TC_ASSIGN(b.head_input, cpu::GemmInput::allocate(logit_rows, g.dim));
  TC_ASSIGN(b.moe,
            cpu::MoeWorkspace::allocate(workers, m, g.n_activated_experts, g.n_routed_experts, g.dim, g.moe_inter_dim));

  int64_t selected = 0, compressed = 0;
  for (int i = 0; i < g.n_layers; ++i) {
    if (g.kind(i) == LayerKind::csa) selected = std::max(selected, std::min(g.index_topk, options.max_context / 4));
    if (g.kind(i) == LayerKind::hca) compressed = std::max(compressed, options.max_context / g.compress_ratios[i]);
  }
  const int64_t window = std::min(g.window_size, options.max_context);
  b.max_rows = window + std::max(selected, compressed);
  b.slot_rows = std::min(b.max_rows, std::max(window + selected, cpu::kRowBlock));
  const int64_t unpacked = options.fp8_rows ? std::max(workers * b.slot_rows, b.max_rows) : 0;
  TC_ASSIGN(b.unpacked, HostArray<bf16>::allocate(unpacked * g.head_dim));
  b.row_floats = std::max({g.head_dim, g.index_head_dim, g.rope_head_dim}) * 2;
  TC_ASSIGN(b.rows, HostArray<const void*>::allocate(workers * b.row_stride()));
  b.attention_heads = options.fp8_rows && b.max_rows > b.slot_rows ? std::max(g.n_heads, kHeadBlock) : kHeadBlock;
  b.attention_floats = b.attention_heads * (b.max_rows + 1) + kHeadBlock * g.head_dim;
  b.index_rows = (options.max_context / 4 + cpu::kKeyGroup) / cpu::kKeyGroup * cpu::kKeyGroup;
  b.key_tiles = (g.index_head_dim + cpu::kTileCols - 1) / cpu::kTileCols;
  TC_ASSIGN(b.attention, HostArray<float>::allocate(workers * b.attention_floats));
  TC_ASSIGN(b.index_query, HostArray<cpu::Int8Chunk>::allocate(m * g.index_n_heads * b.key_tiles));
  TC_ASSIGN(b.index_dots, HostArray<float>::allocate(workers * g.index_n_heads * kIndexBlock));
  TC_ASSIGN(b.index_scores, HostArray<float>::allocate(workers * b.index_rows));
  TC_ASSIGN(b.index_order, HostArray<int32_t>::allocate(workers * b.index_rows));
  const bool splits_topk = b.index_rows > kSplitTopKRows;
  TC_ASSIGN(b.index_topk, HostArray<int32_t>::allocate(splits_topk ? workers * cpu::SplitTopK::kPartScratch : 0));
  if (b.max_rows > cpu::kRowBlock) {
    const int64_t blocks = (b.max_rows + cpu::kRowBlock - 1) / cpu::kRowBlock;
    TC_ASSIGN(b.split_scores, HostArray<float>::allocate(g.n_heads * b.max_rows));
    TC_ASSIGN(b.split_values, HostArray<float>::allocate(blocks * heads));
    TC_ASSIGN(b.denominators, HostArray<float>::allocate(g.n_heads));
  }
  for (int i = 0; i < g.n_layers; ++i) b.window_entries = std::max<int64_t>(b.window_entries, 2 * g.compress_ratios[i]);
  TC_ASSIGN(b.window, HostArray<const float*>::allocate(workers * 2 * b.window_entries));
  TC_ASSIGN(b.row, HostArray<float>::allocate(workers * b.row_floats));
  return b;
}

uint64_t StepBuffers::bytes(const ModelGeometry& geometry, const ExecOptions& options, int workers) {
  const HostMemoryMeasure measure;
  TC_CHECK(allocate(geometry, options, workers).has_value());
  return measure.bytes();
}

}  // namespace thermocline
