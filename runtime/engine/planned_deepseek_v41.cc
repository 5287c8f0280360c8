// DeepSeek-V4.1 for the planner: compressed rows and index choices that layers share, an encoder and a decoder half,
// and a table of n-grams. Source: the published config.json and tensor shapes, its report on prefill. Vision tower and
// draft layers are left out, as nothing here would load them.
#include <algorithm>
#include <functional>

#include "runtime/engine/model_costs.h"
#include "runtime/engine/planned_model.h"
#include "runtime/kv/kv_layout.h"
#include "runtime/model/config_fields.h"

namespace thermocline::deepseek_v41 {
namespace {

std::vector<int64_t> published_ratios() {
  std::vector<int64_t> ratios(40, 1);
  std::fill_n(ratios.begin(), 20, 2);
  std::fill_n(ratios.begin(), 2, 0);
  return ratios;
}

/// The keys of config.json's text_config, with the values of V4.1-Flash.
struct Sizes {
  int64_t hidden_size = 5120, num_hidden_layers = 40;
  int64_t n_routed_experts = 384, num_experts_per_tok = 6, n_shared_experts = 1, moe_intermediate_size = 2304;
  int64_t num_attention_heads = 64, head_dim = 512, qk_rope_head_dim = 64, q_lora_rank = 1280;
  int64_t o_groups = 8, o_lora_rank = 1024, sliding_window = 128;
  int64_t index_n_heads = 32, index_head_dim = 128, index_topk = 512;
  int64_t candidate_source_layer_id = 20, candidate_topk_blocks = 2048, candidate_block_size = 8;
  int64_t hc_mult = 4, vocab_size = 129280, max_position_embeddings = 1048576;
  int64_t engram_max_ngram_size = 4, engram_n_heads = 8, engram_head_dim = 256;
  std::vector<int64_t> compress_ratios = published_ratios();  // of the rows that a layer sees; 0: none
  std::vector<int64_t> kv_source_layer_ids = {2, 8, 14, 20};  // whose rows later layers share
  std::vector<int64_t> index_source_layer_ids = {2, 8, 14, 20, 24, 28, 32, 36};  // whose choice
  std::vector<int64_t> engram_layer_ids = {1, 14}, engram_num_embeddings = {384006168, 384016682};
};

bool has(const std::vector<int64_t>& ids, int64_t id) { return std::find(ids.begin(), ids.end(), id) != ids.end(); }

// Of the rows that a token reads of one table.
int64_t engram_width(const Sizes& s) { return (s.engram_max_ngram_size - 1) * s.engram_n_heads * s.engram_head_dim; }

// A scale byte for 32 x 32 values of FP8, for 32 of MXFP4.
double fp8_bytes(int64_t weights) { return static_cast<double>(weights) * (1 + 1.0 / 1024); }
double mxfp4_bytes(int64_t weights) { return static_cast<double>(weights) * (0.5 + 1.0 / 32); }

void add_weights(const Sizes& s, int64_t id, sched::LayerCosts& layer) {
  const int64_t dim = s.hidden_size, heads = s.num_attention_heads * s.head_dim, groups = s.o_groups * s.o_lora_rank;
  int64_t fp8 = dim * (s.q_lora_rank + s.head_dim) + s.q_lora_rank * heads + heads * s.o_lora_rank + groups * dim +
                3 * dim * s.n_shared_experts * s.moe_intermediate_size;
  int64_t bf16 = 2 * dim + s.q_lora_rank + s.head_dim + dim * s.n_routed_experts;
  int64_t f32 =
      s.num_attention_heads + 2 * s.n_routed_experts + 2 * (2 + s.hc_mult) * s.hc_mult * (s.hc_mult * dim + 1);
  if (layer.own_rows) {
    bf16 += dim * s.head_dim + s.head_dim + (s.head_dim + 1) * s.index_head_dim;
    if (layer.ratio > 1) bf16 += dim * s.head_dim;  // the gate of a compression
  }
  if (layer.selects()) {
    fp8 += s.q_lora_rank * s.index_n_heads * s.index_head_dim;
    bf16 += dim * s.index_n_heads;
  }
  if (has(s.engram_layer_ids, id)) {
    fp8 += (s.hc_mult + 1) * dim * engram_width(s);
    bf16 += 2 * s.hc_mult * dim;
    layer.regions += 2;  // its product, and the gate
  }
  layer.dense_bytes[static_cast<size_t>(sched::WeightFormat::fp8)] = fp8_bytes(fp8);
  layer.dense_bytes[static_cast<size_t>(sched::WeightFormat::bf16)] = static_cast<double>(2 * bf16 + 4 * f32);
}

sched::LayerCosts layer_of(const Sizes& s, int64_t id) {
  sched::LayerCosts layer;
  layer.window = s.sliding_window;
  layer.heads = s.num_attention_heads;
  layer.head_dim = s.head_dim;
  layer.ratio = s.compress_ratios[static_cast<size_t>(id)];
  layer.own_rows = has(s.kv_source_layer_ids, id);
  layer.regions = kLayerRegions;
  layer.stream_elements = 2.0 * static_cast<double>(s.hc_mult * s.hidden_size);
  layer.row_elements = static_cast<double>(s.q_lora_rank + s.head_dim + 2 * s.num_attention_heads * s.head_dim +
                                           s.o_groups * s.o_lora_rank);
  if (layer.ratio > 0) {
    layer.topk = s.index_topk;
    layer.index_heads = s.index_n_heads;
    layer.index_dim = s.index_head_dim;
    layer.row_bytes = static_cast<double>(s.head_dim) * (0.5 + 1.0 / 16);  // FP4 with a scale byte for 16
    layer.key_bytes = mxfp4_bytes(s.index_head_dim);
    if (!has(s.index_source_layer_ids, id))
      layer.most_keys = 0;
    else if (id > s.candidate_source_layer_id)
      layer.most_keys = s.candidate_topk_blocks * s.candidate_block_size;
    layer.regions += (layer.own_rows ? kCompressedRegions : 0) + (layer.selects() ? kIndexRegions : 0);
  }
  // The decoder: its global rows come from the encoder's last states, so only a window of a prompt needs its layers.
  if (!s.kv_source_layer_ids.empty() && id >= s.kv_source_layer_ids.back()) layer.prompt_tail = s.sliding_window;
  add_weights(s, id, layer);
  return layer;
}

ModelGeometry widths_of(const Sizes& s) {
  ModelGeometry g;
  g.vocab_size = s.vocab_size;
  g.dim = s.hidden_size;
  g.n_layers = static_cast<int>(s.num_hidden_layers);
  g.n_heads = static_cast<int>(s.num_attention_heads);
  g.head_dim = s.head_dim;
  g.rope_head_dim = s.qk_rope_head_dim;
  g.q_lora_rank = s.q_lora_rank;
  g.o_lora_rank = s.o_lora_rank;
  g.o_groups = static_cast<int>(s.o_groups);
  g.window_size = s.sliding_window;
  for (int64_t id = 0; id < s.num_hidden_layers; ++id)
    g.compress_ratios.push_back(has(s.kv_source_layer_ids, id) ? 4 : 0);  // with an index, in V4's terms
  g.index_n_heads = static_cast<int>(s.index_n_heads);
  g.index_head_dim = s.index_head_dim;
  g.index_topk = s.index_topk;
  g.n_routed_experts = static_cast<int>(s.n_routed_experts);
  g.n_activated_experts = static_cast<int>(s.num_experts_per_tok);
  g.moe_inter_dim = s.moe_intermediate_size;
  g.hc_mult = static_cast<int>(s.hc_mult);
  return g;
}

PlannedModel model_of(const Sizes& s) {
  PlannedModel model;
  sched::ModelCosts& costs = model.costs;
  costs.max_context = s.max_position_embeddings;
  costs.experts = static_cast<int>(s.n_routed_experts);
  costs.experts_per_token = static_cast<int>(s.num_experts_per_tok);
  costs.page_tokens = kPageTokens;
  costs.expert_bytes = mxfp4_bytes(3 * s.hidden_size * s.moe_intermediate_size);
  costs.head_bytes = costs.embedding_bytes = 2.0 * static_cast<double>(s.vocab_size * s.hidden_size);
  for (int64_t id = 0; id < s.num_hidden_layers; ++id) costs.layers.push_back(layer_of(s, id));
  // Windows and the table are FP8 with a scale byte for 32 values of a row.
  costs.sequence_bytes = static_cast<double>(s.num_hidden_layers * s.sliding_window * s.head_dim) * (1 + 1.0 / 32);
  for (const int64_t rows : s.engram_num_embeddings)
    costs.table_bytes += static_cast<double>(rows * s.engram_head_dim) * (1 + 1.0 / 32);
  costs.table_reads_per_token = static_cast<double>(static_cast<int64_t>(s.engram_layer_ids.size()) *
                                                    (s.engram_max_ngram_size - 1) * s.engram_n_heads);
  model.widths = widths_of(s);
  model.not_computed = "DeepSeek-V4.1 (rows shared by layers, encoder and decoder halves, an n-gram table)";
  return model;
}

Status read_layers(const Json& text, Sizes& s) {
  const int64_t last = s.num_hidden_layers - 1;
  TC_RETURN_IF_ERROR(read_ints(text, "compress_ratios", 0, 65536, s.compress_ratios));
  TC_RETURN_IF_ERROR(read_ints(text, "kv_source_layer_ids", 0, last, s.kv_source_layer_ids));
  TC_RETURN_IF_ERROR(read_ints(text, "index_source_layer_ids", 0, last, s.index_source_layer_ids));
  TC_RETURN_IF_ERROR(read_ints(text, "engram_layer_ids", 0, last, s.engram_layer_ids));
  TC_RETURN_IF_ERROR(read_ints(text, "engram_num_embeddings", 1, int64_t{1} << 40, s.engram_num_embeddings));
  if (static_cast<int64_t>(s.compress_ratios.size()) < s.num_hidden_layers)
    return corrupt("field 'compress_ratios' has fewer entries than layers");
  if (s.engram_layer_ids.size() != s.engram_num_embeddings.size())
    return corrupt("fields 'engram_layer_ids' and 'engram_num_embeddings' differ in length");
  for (const std::vector<int64_t>* ids : {&s.kv_source_layer_ids, &s.index_source_layer_ids, &s.engram_layer_ids})
    if (std::adjacent_find(ids->begin(), ids->end(), std::greater_equal<>()) != ids->end())
      return corrupt("ids of source and engram layers should rise");
  for (const std::vector<int64_t>* ids : {&s.kv_source_layer_ids, &s.index_source_layer_ids}) {
    for (const int64_t id : *ids)
      if (s.compress_ratios[static_cast<size_t>(id)] == 0)
        return corrupt("layer " + std::to_string(id) + " is a source and has no compressed rows");
  }
  for (int64_t id = 0, rows = 0, choices = 0; id <= last; ++id) {
    rows += has(s.kv_source_layer_ids, id);
    choices += has(s.index_source_layer_ids, id);
    if (s.compress_ratios[static_cast<size_t>(id)] > 0 && (rows == 0 || choices == 0))
      return corrupt("layer " + std::to_string(id) + " shares rows, and no layer before it has them");
  }
  return {};
}

Status read_sizes(const Json& text, Sizes& s) {
  TC_RETURN_IF_ERROR(read_int(text, "hidden_size", 1, kMaxExtent, s.hidden_size));
  TC_RETURN_IF_ERROR(read_int(text, "num_hidden_layers", 1, 4096, s.num_hidden_layers));
  TC_RETURN_IF_ERROR(read_int(text, "n_routed_experts", 1, 65536, s.n_routed_experts));
  TC_RETURN_IF_ERROR(
      read_int(text, "num_experts_per_tok", 1, std::min<int64_t>(256, s.n_routed_experts), s.num_experts_per_tok));
  TC_RETURN_IF_ERROR(read_int(text, "n_shared_experts", 0, 256, s.n_shared_experts));
  TC_RETURN_IF_ERROR(read_int(text, "moe_intermediate_size", 1, kMaxExtent, s.moe_intermediate_size));
  TC_RETURN_IF_ERROR(read_int(text, "num_attention_heads", 1, 65536, s.num_attention_heads));
  TC_RETURN_IF_ERROR(read_int(text, "head_dim", 2, 65536, s.head_dim));
  TC_RETURN_IF_ERROR(read_int(text, "qk_rope_head_dim", 2, s.head_dim, s.qk_rope_head_dim));
  TC_RETURN_IF_ERROR(read_int(text, "q_lora_rank", 1, kMaxExtent, s.q_lora_rank));
  TC_RETURN_IF_ERROR(read_int(text, "o_groups", 1, s.num_attention_heads, s.o_groups));
  TC_RETURN_IF_ERROR(read_int(text, "o_lora_rank", 1, kMaxExtent, s.o_lora_rank));
  TC_RETURN_IF_ERROR(read_int(text, "sliding_window", 1, kMaxExtent, s.sliding_window));
  TC_RETURN_IF_ERROR(read_int(text, "index_n_heads", 1, 65536, s.index_n_heads));
  TC_RETURN_IF_ERROR(read_int(text, "index_head_dim", 2, 65536, s.index_head_dim));
  TC_RETURN_IF_ERROR(read_int(text, "index_topk", 1, kMaxExtent, s.index_topk));
  TC_RETURN_IF_ERROR(read_int(text, "candidate_source_layer_id", 0, 4096, s.candidate_source_layer_id));
  TC_RETURN_IF_ERROR(read_int(text, "candidate_topk_blocks", 1, kMaxExtent, s.candidate_topk_blocks));
  TC_RETURN_IF_ERROR(read_int(text, "candidate_block_size", 1, kMaxExtent, s.candidate_block_size));
  TC_RETURN_IF_ERROR(read_int(text, "hc_mult", 1, 64, s.hc_mult));
  TC_RETURN_IF_ERROR(read_int(text, "vocab_size", 1, kMaxExtent, s.vocab_size));
  TC_RETURN_IF_ERROR(read_int(text, "max_position_embeddings", 1, int64_t{1} << 40, s.max_position_embeddings));
  TC_RETURN_IF_ERROR(read_int(text, "engram_max_ngram_size", 2, 64, s.engram_max_ngram_size));
  TC_RETURN_IF_ERROR(read_int(text, "engram_n_heads", 1, 65536, s.engram_n_heads));
  TC_RETURN_IF_ERROR(read_int(text, "engram_head_dim", 1, 65536, s.engram_head_dim));
  for (const int64_t width : {s.num_attention_heads * s.head_dim, s.o_groups * s.o_lora_rank, engram_width(s)})
    if (width > kMaxExtent) return corrupt("heads or groups are too wide together");
  return {};
}

}  // namespace

PlannedModel published() { return model_of({}); }

Result<PlannedModel> planned(const Json& config) {
  Sizes s;
  TC_RETURN_IF_ERROR(require(config, "model_type", "deepseek_v41"));
  if (!config.contains("text_config")) return corrupt("field 'text_config' is missing");
  const Json quantization = config.value("quantization_config", Json::object());
  TC_RETURN_IF_ERROR(require(quantization, "quant_method", "fp8"));
  TC_RETURN_IF_ERROR(require(quantization, "expert_dtype", "fp4"));
  TC_RETURN_IF_ERROR(require(quantization, "weight_block_size", Json::array({32, 32})));
  const Json& text = config["text_config"];
  TC_RETURN_IF_ERROR(read_sizes(text, s));
  TC_RETURN_IF_ERROR(read_layers(text, s));
  return model_of(s);
}

}  // namespace thermocline::deepseek_v41
