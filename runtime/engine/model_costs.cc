#include "runtime/engine/model_costs.h"

#include <string_view>

#include "runtime/model/deepseek_v4/weights.h"

namespace thermocline {
namespace {

sched::WeightFormat format_of(DType dtype) {
  return dtype == DType::f8_e4m3 || dtype == DType::f8_e8m0 ? sched::WeightFormat::fp8
         : dtype == DType::i8                               ? sched::WeightFormat::mxfp4
                                                            : sched::WeightFormat::bf16;
}

// "layers.12.attn.wq_a.weight" -> 12, or -1.
int layer_of(std::string_view name) {
  if (!name.starts_with("layers.")) return -1;
  return std::stoi(std::string(name.substr(7, name.find('.', 7) - 7)));
}

}  // namespace

sched::ModelCosts model_costs(const ModelGeometry& g, bool fp8_rows) {
  sched::ModelCosts costs;
  costs.max_context = g.max_position_embeddings;
  costs.experts = g.n_routed_experts;
  costs.experts_per_token = g.n_activated_experts;
  costs.page_tokens = kPageTokens;
  const KvLayout layout(g, {.fp8_rows = fp8_rows});
  const auto row_bytes = static_cast<double>(layout.row_bytes()),
             key_bytes = static_cast<double>(layout.index_group_bytes()) / 16;
  for (int i = 0; i < g.n_layers; ++i) {
    sched::LayerCosts layer;
    const LayerKind kind = g.kind(i);
    layer.window = g.window_size;
    layer.heads = g.n_heads;
    layer.head_dim = g.head_dim;
    layer.row_bytes = row_bytes;
    layer.hash_routed = g.is_hash_layer(i);
    layer.regions = kLayerRegions;
    layer.stream_elements = 2.0 * static_cast<double>(g.hc_mult * g.dim);
    layer.row_elements =
        static_cast<double>(g.q_lora_rank + g.head_dim + 2 * g.n_heads * g.head_dim + g.o_groups * g.o_lora_rank);
    if (kind != LayerKind::swa) {
      layer.ratio = g.compress_ratios[static_cast<size_t>(i)];
      layer.regions += kCompressedRegions;
    }
    if (kind == LayerKind::csa) {
      layer.topk = g.index_topk;
      layer.index_heads = g.index_n_heads;
      layer.index_dim = g.index_head_dim;
      layer.key_bytes = key_bytes;
      layer.regions += kIndexRegions;
    }
    costs.layers.push_back(layer);
  }
  for (const TensorInfo& tensor : deepseek_v4::published_tensors(g)) {
    const auto bytes = static_cast<double>(tensor.bytes);
    const std::string_view name = tensor.name;
    const int layer = layer_of(name);
    if (name == "embed.weight") {
      costs.embedding_bytes = bytes;
    } else if (name == "head.weight") {
      costs.head_bytes = bytes;
    } else if (layer >= 0 && name.find(".ffn.experts.") != std::string_view::npos) {
      costs.expert_bytes += bytes / (static_cast<double>(g.n_layers) * g.n_routed_experts);
    } else if (layer >= 0 && name.find("tid2eid") == std::string_view::npos) {
      sched::LayerCosts& l = costs.layers[static_cast<size_t>(layer)];
      l.dense_bytes[static_cast<size_t>(format_of(tensor.dtype))] += bytes;
      if (name.find(".ffn.shared_experts.") != std::string_view::npos) l.shared_bytes += bytes;
    }
  }
  costs.sequence_bytes = static_cast<double>(pages_of(g.window_size, kWindowPageTokens) * layout.window_page_bytes() +
                                             layout.ring_bytes());
  return costs;
}

}  // namespace thermocline
