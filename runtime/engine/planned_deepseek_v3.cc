// DeepSeek-V3 for the planner: multi-head latent attention over one row of 576 values a token, dense first layers,
// experts in FP8. Source: its published config.json and inference code.
#include <algorithm>

#include "runtime/engine/model_costs.h"
#include "runtime/engine/planned_model.h"
#include "runtime/kv/kv_layout.h"
#include "runtime/model/config_fields.h"

namespace thermocline::deepseek_v3 {
namespace {

/// The keys of config.json, with the values of the published model.
struct Sizes {
  int64_t hidden_size = 7168, num_hidden_layers = 61, first_k_dense_replace = 3;
  int64_t intermediate_size = 18432, moe_intermediate_size = 2048;  // of dense layers; of an expert
  int64_t n_routed_experts = 256, num_experts_per_tok = 8, n_shared_experts = 1;
  int64_t num_attention_heads = 128, q_lora_rank = 1536, kv_lora_rank = 512;
  int64_t qk_nope_head_dim = 128, qk_rope_head_dim = 64, v_head_dim = 128;
  int64_t vocab_size = 129280, max_position_embeddings = 163840;
  bool fp8 = true;
  int64_t block_rows = 128, block_cols = 128;  // of weights that share a scale of 4 bytes

  int64_t row() const { return kv_lora_rank + qk_rope_head_dim; }
  int64_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
};

// Steps of a prompt expand latents to keys and values, all of the context's once a step: of so many tokens, as the
// planner's middle one.
constexpr int64_t kExpandingStep = 2048;

sched::WeightFormat format_of(const Sizes& s) { return s.fp8 ? sched::WeightFormat::fp8 : sched::WeightFormat::bf16; }

double weight_bytes(const Sizes& s, int64_t weights) {
  return static_cast<double>(weights) * (s.fp8 ? 1 + 4.0 / static_cast<double>(s.block_rows * s.block_cols) : 2);
}

int64_t attention_weights(const Sizes& s) {
  const int64_t heads = s.num_attention_heads;
  return s.hidden_size * (s.q_lora_rank + s.row()) + s.q_lora_rank * heads * s.qk_head_dim() +
         s.kv_lora_rank * heads * (s.qk_nope_head_dim + s.v_head_dim) + heads * s.v_head_dim * s.hidden_size;
}

sched::LayerCosts layer_of(const Sizes& s, bool routed) {
  sched::LayerCosts layer;
  layer.routed = routed;
  layer.ratio = 1;  // every row of the context is seen
  layer.heads = s.num_attention_heads;
  // Against the latents themselves a head multiplies kv_lora + rope values for a score and kv_lora for the value.
  layer.head_dim = (s.row() + s.kv_lora_rank) / 2;
  layer.prefill_head_dim = (s.qk_head_dim() + s.v_head_dim) / 2 +
                           s.kv_lora_rank * (s.qk_nope_head_dim + s.v_head_dim) / (2 * kExpandingStep);
  layer.row_bytes = 2.0 * static_cast<double>(s.row());  // bf16
  layer.regions = kLayerRegions;
  layer.stream_elements = 2.0 * static_cast<double>(s.hidden_size);
  layer.row_elements =
      static_cast<double>(s.q_lora_rank + s.row() + s.num_attention_heads * (s.qk_head_dim() + s.v_head_dim));
  const int64_t width = routed ? s.n_shared_experts * s.moe_intermediate_size : s.intermediate_size;
  layer.dense_bytes[static_cast<size_t>(format_of(s))] =
      weight_bytes(s, attention_weights(s) + 3 * s.hidden_size * width);
  const int64_t norms = 2 * s.hidden_size + s.q_lora_rank + s.kv_lora_rank;
  layer.dense_bytes[static_cast<size_t>(sched::WeightFormat::bf16)] +=
      static_cast<double>(2 * norms + (routed ? s.n_routed_experts * (2 * s.hidden_size + 4) : 0));
  return layer;
}

PlannedModel model_of(const Sizes& s) {
  PlannedModel model;
  sched::ModelCosts& costs = model.costs;
  costs.max_context = s.max_position_embeddings;
  costs.experts = static_cast<int>(s.n_routed_experts);
  costs.experts_per_token = static_cast<int>(s.num_experts_per_tok);
  costs.page_tokens = kPageTokens;
  costs.expert_bytes = weight_bytes(s, 3 * s.hidden_size * s.moe_intermediate_size);
  costs.expert_format = format_of(s);
  costs.head_bytes = costs.embedding_bytes = 2.0 * static_cast<double>(s.vocab_size * s.hidden_size);
  for (int64_t i = 0; i < s.num_hidden_layers; ++i) costs.layers.push_back(layer_of(s, i >= s.first_k_dense_replace));

  ModelGeometry& g = model.widths;
  g.vocab_size = s.vocab_size;
  g.dim = s.hidden_size;
  g.n_layers = static_cast<int>(s.num_hidden_layers);
  g.n_heads = static_cast<int>(s.num_attention_heads);
  g.head_dim = s.qk_head_dim();
  g.rope_head_dim = s.qk_rope_head_dim;
  g.q_lora_rank = s.q_lora_rank;
  g.o_groups = 1;
  g.o_lora_rank = s.hidden_size;
  g.window_size = 1;
  g.compress_ratios.assign(static_cast<size_t>(g.n_layers), 0);
  g.index_n_heads = 1, g.index_head_dim = 32, g.index_topk = 1;
  g.n_routed_experts = costs.experts;
  g.n_activated_experts = costs.experts_per_token;
  g.moe_inter_dim = s.moe_intermediate_size;
  g.hc_mult = 1;
  model.not_computed = "DeepSeek-V3 (MLA attention, dense first layers, FP8 experts)";
  return model;
}

Status read_quantization(const Json& config, Sizes& s) {
  s.fp8 = config.contains("quantization_config");
  if (!s.fp8) return {};
  const Json& q = config["quantization_config"];
  TC_RETURN_IF_ERROR(require(q, "quant_method", "fp8"));
  std::vector<int64_t> block;
  TC_RETURN_IF_ERROR(read_ints(q, "weight_block_size", 1, 65536, block));
  if (block.size() != 2) return corrupt("field 'weight_block_size' is no pair");
  s.block_rows = block[0];
  s.block_cols = block[1];
  return {};
}

}  // namespace

PlannedModel published() { return model_of({}); }

Result<PlannedModel> planned(const Json& config) {
  Sizes s;
  TC_RETURN_IF_ERROR(require(config, "model_type", "deepseek_v3"));
  TC_RETURN_IF_ERROR(read_int(config, "hidden_size", 1, kMaxExtent, s.hidden_size));
  TC_RETURN_IF_ERROR(read_int(config, "num_hidden_layers", 1, 4096, s.num_hidden_layers));
  TC_RETURN_IF_ERROR(read_int(config, "first_k_dense_replace", 0, s.num_hidden_layers - 1, s.first_k_dense_replace));
  TC_RETURN_IF_ERROR(read_int(config, "intermediate_size", 1, kMaxExtent, s.intermediate_size));
  TC_RETURN_IF_ERROR(read_int(config, "moe_intermediate_size", 1, kMaxExtent, s.moe_intermediate_size));
  TC_RETURN_IF_ERROR(read_int(config, "n_routed_experts", 1, 65536, s.n_routed_experts));
  TC_RETURN_IF_ERROR(
      read_int(config, "num_experts_per_tok", 1, std::min<int64_t>(256, s.n_routed_experts), s.num_experts_per_tok));
  TC_RETURN_IF_ERROR(read_int(config, "n_shared_experts", 0, 256, s.n_shared_experts));
  TC_RETURN_IF_ERROR(read_int(config, "num_attention_heads", 1, 65536, s.num_attention_heads));
  TC_RETURN_IF_ERROR(read_int(config, "q_lora_rank", 1, kMaxExtent, s.q_lora_rank));
  TC_RETURN_IF_ERROR(read_int(config, "kv_lora_rank", 1, 65536, s.kv_lora_rank));
  TC_RETURN_IF_ERROR(read_int(config, "qk_nope_head_dim", 1, 65536, s.qk_nope_head_dim));
  TC_RETURN_IF_ERROR(read_int(config, "qk_rope_head_dim", 2, 65536, s.qk_rope_head_dim));
  TC_RETURN_IF_ERROR(read_int(config, "v_head_dim", 1, 65536, s.v_head_dim));
  TC_RETURN_IF_ERROR(read_int(config, "vocab_size", 1, kMaxExtent, s.vocab_size));
  TC_RETURN_IF_ERROR(read_int(config, "max_position_embeddings", 1, int64_t{1} << 40, s.max_position_embeddings));
  TC_RETURN_IF_ERROR(read_quantization(config, s));
  return model_of(s);
}

}  // namespace thermocline::deepseek_v3
