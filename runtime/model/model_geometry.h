// ModelGeometry: every size and constant of a model, read from its config.json and from nowhere else. Plain numbers:
// the scheduler, the KV layout and the kernels work from it without knowing a tensor name.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace thermocline {

enum class LayerKind {
  swa,  // compress ratio 0: sliding window only
  csa,  // ratio 4: overlapping compressed rows, chosen by the indexer
  hca,  // any other ratio: compressed rows, all visible
};

/// Names follow the published config; letters in brackets are those of the spec.
struct ModelGeometry {
  int64_t vocab_size = 0;            // V
  int64_t dim = 0;                   // D, hidden_size
  int n_layers = 0;                  // L, num_hidden_layers
  int n_mtp_layers = 0;              // num_nextn_predict_layers
  int n_heads = 0;                   // H, num_attention_heads
  int64_t head_dim = 0;              // c: width of a query head and of the one latent that is key and value
  int64_t rope_head_dim = 0;         // rd: the last dims of a head that rotate
  int64_t q_lora_rank = 0;           // Q
  int64_t o_lora_rank = 0;           // O
  int o_groups = 0;                  // G
  int64_t window_size = 0;           // W, sliding_window, counts the query itself
  std::vector<int> compress_ratios;  // one per main layer, then one per MTP layer
  int index_n_heads = 0;             // Hi
  int64_t index_head_dim = 0;        // ci
  int64_t index_topk = 0;            // K
  int n_routed_experts = 0;          // E
  int n_activated_experts = 0;       // k, num_experts_per_tok
  int64_t moe_inter_dim = 0;         // I, moe_intermediate_size; the shared expert has it too
  int n_hash_layers = 0;             // the first layers route by token id
  float route_scale = 0;             // routed_scaling_factor
  float swiglu_limit = 0;
  int hc_mult = 0;  // S, residual streams
  int hc_sinkhorn_iters = 0;
  float hc_eps = 0;
  float norm_eps = 0;  // rms_norm_eps
  double rope_theta = 0;
  double compress_rope_theta = 0;
  double rope_factor = 1;  // YaRN, on layers with a compress ratio
  int64_t original_seq_len = 0;
  double beta_fast = 0, beta_slow = 0;
  int64_t max_position_embeddings = 0;
  int weight_block_rows = 128, weight_block_cols = 128;  // one scale per such block of an FP8 weight
  int bos_token_id = 0, eos_token_id = 0;

  int64_t nope_head_dim() const { return head_dim - rope_head_dim; }
  LayerKind kind(int layer) const {
    const int ratio = compress_ratios[layer];
    return ratio == 0 ? LayerKind::swa : ratio == 4 ? LayerKind::csa : LayerKind::hca;
  }
  bool is_hash_layer(int layer) const { return layer < n_hash_layers; }
  /// Width of one token's compressor projection: overlapping windows (CSA) keep two series.
  int64_t compressor_width(int layer, int64_t row_width) const {
    return kind(layer) == LayerKind::csa ? 2 * row_width : row_width;
  }
  /// Mixing weights of one hyper-connection site: S pre, S post, S x S comb.
  int64_t hc_outputs() const { return static_cast<int64_t>(2 + hc_mult) * hc_mult; }
};

}  // namespace thermocline
