// The attention half of a layer on a device, in the order the data moves. Source: spec sections 3.6 - 3.8.
#include <algorithm>
#include <cmath>

#include "runtime/exec/device_part.h"

namespace thermocline {

using gpu::DeviceView;

void DevicePart::attention(int index) {
  const LayerKind kind = kind_of(index);
  hc_read(layer(index).hc_attn, layer(index).attn_norm);
  project_inputs(index);
  if (kind != LayerKind::swa) compress(index);
  if (kind == LayerKind::csa) {
    choose_rows(index);
    stage_rows(index);
  }
  attend(index);
  project_output(index);
}

LayerKind DevicePart::kind_of(int index) const { return index < g_.n_layers ? g_.kind(index) : LayerKind::swa; }

// What multiplies x; the raw row; what multiplies the query latent.
void DevicePart::project_inputs(int index) {
  const DeviceLayer& w = layer(index);
  const gpu::KernelTable& kernel = device_->kernels();
  const int64_t m = shape_.tokens, c = g_.head_dim, ci = g_.index_head_dim, heads = g_.n_heads, q_rank = g_.q_lora_rank;
  const bool csa = kind_of(index) == LayerKind::csa, scores = csa && shape_.scores;
  const int ratio = g_.compress_ratios[static_cast<size_t>(index)];
  const int64_t width = w.compressor.wkv.n, index_width = csa ? w.index_compressor.wkv.n : 0;
  const int rope_table = ratio > 0, rope_dim = static_cast<int>(g_.rope_head_dim);
  gemm({{&w.wq_a, b_.linear, g_.dim, b_.qr, q_rank},
        {&w.wkv, b_.linear, g_.dim, b_.kv, c},
        {&w.compressor.wkv, b_.plain, g_.dim, b_.a, width, false},
        {&w.compressor.wgate, b_.plain, g_.dim, b_.z, width, false},
        {&w.index_compressor.wkv, b_.plain, g_.dim, b_.index_a, index_width, false},
        {&w.index_compressor.wgate, b_.plain, g_.dim, b_.index_z, index_width, false},
        {scores ? &w.index_weights_proj : nullptr, b_.plain, g_.dim, b_.gates, g_.index_n_heads}});
  const DeviceView<float, 2> z{b_.z, {m, width}}, index_z{csa ? b_.index_z : nullptr, {m, index_width}};
  kernel.rows(*stream_, {step_,
                         pages(index),
                         {b_.kv, {m, c}},
                         {b_.qr, {m, q_rank}},
                         w.kv_norm,
                         w.q_norm,
                         {b_.qr_linear, {m, q_rank}},
                         z,
                         index_z,
                         w.compressor.ape,
                         w.index_compressor.ape,
                         ratio,
                         rope_dim,
                         g_.norm_eps,
                         options_.round_linear});
  gemm({{&w.wq_b, b_.qr_linear, q_rank, b_.q, heads * c},
        {scores ? &w.index_wq_b : nullptr, b_.qr_linear, q_rank, b_.index_q, g_.index_n_heads * ci}});
  kernel.queries(*stream_,
                 {step_, {b_.q, {m, heads, c}}, {b_.q_bf16, {m, heads, c}}, rope_table, rope_dim, g_.norm_eps});
}

void DevicePart::compress(int index) {
  const DeviceLayer& w = layer(index);
  const int64_t m = shape_.tokens;
  const bool csa = kind_of(index) == LayerKind::csa;
  const int ratio = g_.compress_ratios[static_cast<size_t>(index)];
  const int64_t width = w.compressor.wkv.n, index_width = csa ? w.index_compressor.wkv.n : 0;
  const KvLayout::Ring& ring = layout_.ring(index);
  const int table = 2 + static_cast<int>(std::find(ratios_.begin(), ratios_.end(), ratio) - ratios_.begin());
  device_->kernels().compress(*stream_,
                              {step_,
                               pages(index),
                               {b_.a, {m, width}},
                               {b_.z, {m, width}},
                               {csa ? b_.index_a : nullptr, {m, index_width}},
                               {csa ? b_.index_z : nullptr, {m, index_width}},
                               w.compressor.norm,
                               w.index_compressor.norm,
                               {reinterpret_cast<float*>(rings_.data()), {static_cast<int64_t>(rings_.size()) / 4}},
                               layout_.ring_floats(),
                               ring.offset,
                               ring.slots,
                               ratio,
                               table,
                               static_cast<int>(g_.rope_head_dim),
                               g_.head_dim,
                               csa ? g_.index_head_dim : 0,
                               g_.norm_eps});
}

// The rows a token attends to: all of them, or where there are more than index_topk those the indexer scores highest.
void DevicePart::choose_rows(int index) {
  const gpu::KernelTable& kernel = device_->kernels();
  const int64_t m = shape_.tokens, ci = g_.index_head_dim;
  const int ratio = g_.compress_ratios[static_cast<size_t>(index)], rope_dim = static_cast<int>(g_.rope_head_dim);
  if (shape_.scores) {
    const float gate_scale =
        static_cast<float>(1.0 / std::sqrt(static_cast<double>(ci)) / std::sqrt(static_cast<double>(g_.index_n_heads)));
    kernel.index_queries(*stream_, {step_,
                                    {b_.index_q, {m, g_.index_n_heads, ci}},
                                    {b_.index_q_bf16, {m, g_.index_n_heads, ci}},
                                    {b_.gates, {m, g_.index_n_heads}},
                                    gate_scale,
                                    rope_dim});
  }
  const int64_t rows = options_.max_context / 4 + 1;
  for (int64_t first = 0; first < m; first += b_.score_tokens) {
    const int64_t count = std::min(b_.score_tokens, m - first);
    if (shape_.scores)
      kernel.index_scores(*stream_, {step_,
                                     pages(index),
                                     {b_.index_q_bf16, {m, g_.index_n_heads, ci}},
                                     {b_.gates, {m, g_.index_n_heads}},
                                     {b_.index_scores, {count, rows}},
                                     ratio,
                                     g_.index_topk,
                                     first});
    kernel.select(*stream_, {step_, {b_.index_scores, {count, rows}}, {b_.selected, {m, g_.index_topk}}, ratio, first});
  }
}

// Copies of them on the device, where the rows are in host memory: all the heads read what crossed the bus once.
void DevicePart::stage_rows(int index) {
  const gpu::LayerPages pages = this->pages(index);
  if (!pages.slot_of.pointer) return;
  const int64_t slots = options_.hot_rows, csa = layout_.csa_layer(index);
  device_->kernels().stage_rows(*stream_, {step_,
                                           pages,
                                           {b_.selected, {shape_.tokens, g_.index_topk}},
                                           {hot_.entry_of + csa * slots, {slots}},
                                           {hot_.used + csa * slots, {slots}},
                                           {hot_.hand + csa, {1}},
                                           {hot_.counts, {3}},
                                           g_.compress_ratios[static_cast<size_t>(index)]});
}

void DevicePart::attend(int index) {
  const DeviceLayer& w = layer(index);
  const gpu::KernelTable& kernel = device_->kernels();
  const int64_t m = shape_.tokens, c = g_.head_dim, heads = g_.n_heads;
  const LayerKind kind = kind_of(index);
  const bool csa = kind == LayerKind::csa;
  const int ratio = g_.compress_ratios[static_cast<size_t>(index)];
  const int rope_table = ratio > 0, rope_dim = static_cast<int>(g_.rope_head_dim);
  gpu::AttendMergeArgs merge;
  gpu::AttendArgs& attend = merge.attend;
  attend.step = step_;
  attend.pages = pages(index);
  attend.q = {b_.q_bf16, {m, heads, c}};
  attend.selected = {b_.selected, {m, g_.index_topk}};
  attend.splits = max_splits(g_, options_.max_context);
  attend.partial = {b_.partial, {b_.partial_tokens * attend.splits, heads, c + 2}};
  attend.window = g_.window_size;
  attend.ratio = kind == LayerKind::swa ? 0 : ratio;
  attend.selects = csa;
  attend.rope_dim = rope_dim;
  attend.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(c)));
  merge.sinks = w.attn_sink;
  merge.out = {b_.o, {m, heads, c}};
  merge.rope_table = rope_table;
  merge.rope_dim = rope_dim;
  for (attend.first_token = 0; attend.first_token < m; attend.first_token += b_.partial_tokens) {
    attend.tokens = std::min(b_.partial_tokens, m - attend.first_token);
    kernel.attend(*stream_, attend);
    kernel.attend_merge(*stream_, merge);
  }
}

void DevicePart::project_output(int index) {
  const DeviceLayer& w = layer(index);
  const gpu::KernelTable& kernel = device_->kernels();
  const int64_t m = shape_.tokens, c = g_.head_dim, heads = g_.n_heads;
  // Grouped low-rank output projection.
  const int64_t groups = g_.o_groups, group_width = heads * c / groups, rank = g_.o_lora_rank;
  grouped_.clear();
  for (int64_t i = 0; i < groups; ++i)
    grouped_.push_back({&w.wo_a, b_.o + i * group_width, heads * c, b_.u + i * rank, groups * rank, true,
                        i * rank / cpu::kTileRows, rank / cpu::kTileRows});
  gemm(grouped_);
  kernel.linear_input(*stream_, {{b_.u, {m, groups * rank}}, {b_.u_linear, {m, groups * rank}}, options_.round_linear});
  gemm({{&w.wo_b, b_.u_linear, groups * rank, b_.y, g_.dim}});
  kernel.hc_write(*stream_, {streams(),
                             {b_.post, {m, g_.hc_mult}},
                             {b_.comb, {m, g_.hc_mult * g_.hc_mult}},
                             {b_.y, {m, g_.dim}},
                             {},
                             {},
                             {}});
}

}  // namespace thermocline
