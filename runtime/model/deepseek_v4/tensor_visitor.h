// The published tensor table (spec 2.1) as one walk over a Weights object: the loader and the writer of checkpoints
// both follow it, so a name is spelled once.
//
// A visitor has
//   Status linear(name, stored, n, k, PackedMatrix&)   a weight [n, k] `name`.weight, with `name`.scale unless BF16
//   Status floats(name, dtype, shape, const float*&)   a small tensor kept as float32
//   Status ids(name, shape, const int32_t*&)           the hash layers' expert table
//   Status rows(name, shape, const uint16_t*&)         the embedding table
#pragma once

#include "runtime/model/deepseek_v4/weights.h"

namespace thermocline::deepseek_v4 {

/// How the instruct checkpoints store a linear's weight. Readers go by the stored dtype, writers by this.
enum class Stored { fp4, fp8, bf16 };

template <class Visitor>
class TensorWalk {
 public:
  TensorWalk(const ModelGeometry& geometry, Visitor& visitor) : g_(geometry), v_(visitor) {}

  Status main_model(Weights& w) {
    TC_RETURN_IF_ERROR(v_.rows("embed.weight", {g_.vocab_size, g_.dim}, w.embed));
    for (int i = 0; i < g_.n_layers; ++i)
      TC_RETURN_IF_ERROR(layer(i, "layers." + std::to_string(i) + ".", w.layers[i]));
    TC_RETURN_IF_ERROR(v_.floats("norm.weight", DType::bf16, {g_.dim}, w.norm));
    TC_RETURN_IF_ERROR(hc_head("hc_head", w.hc_head));
    return v_.linear("head", Stored::bf16, g_.vocab_size, g_.dim, w.head);
  }

  Status mtp_block(int index, MtpWeights& w) {
    const std::string prefix = "mtp." + std::to_string(index) + ".";
    TC_RETURN_IF_ERROR(layer(g_.n_layers + index, prefix, w.layer));
    TC_RETURN_IF_ERROR(v_.linear(prefix + "e_proj", Stored::fp8, g_.dim, g_.dim, w.e_proj));
    TC_RETURN_IF_ERROR(v_.linear(prefix + "h_proj", Stored::fp8, g_.dim, g_.dim, w.h_proj));
    TC_RETURN_IF_ERROR(v_.floats(prefix + "enorm.weight", DType::bf16, {g_.dim}, w.enorm));
    TC_RETURN_IF_ERROR(v_.floats(prefix + "hnorm.weight", DType::bf16, {g_.dim}, w.hnorm));
    TC_RETURN_IF_ERROR(v_.floats(prefix + "norm.weight", DType::bf16, {g_.dim}, w.norm));
    return hc_head(prefix + "hc_head", w.hc_head);
  }

 private:
  Status layer(int i, const std::string& prefix, LayerWeights& w) {
    TC_RETURN_IF_ERROR(v_.floats(prefix + "attn_norm.weight", DType::bf16, {g_.dim}, w.attn_norm));
    TC_RETURN_IF_ERROR(v_.floats(prefix + "ffn_norm.weight", DType::bf16, {g_.dim}, w.ffn_norm));
    TC_RETURN_IF_ERROR(hc_site(prefix + "hc_attn", g_.hc_outputs(), 3, w.hc_attn));
    TC_RETURN_IF_ERROR(hc_site(prefix + "hc_ffn", g_.hc_outputs(), 3, w.hc_ffn));
    TC_RETURN_IF_ERROR(attention(i, prefix + "attn.", w));
    return moe(i, prefix + "ffn.", w);
  }

  Status attention(int i, const std::string& prefix, LayerWeights& w) {
    const int64_t heads = static_cast<int64_t>(g_.n_heads) * g_.head_dim,
                  groups = static_cast<int64_t>(g_.o_groups) * g_.o_lora_rank;
    TC_RETURN_IF_ERROR(v_.floats(prefix + "attn_sink", DType::f32, {g_.n_heads}, w.attn_sink));
    TC_RETURN_IF_ERROR(v_.linear(prefix + "wq_a", Stored::fp8, g_.q_lora_rank, g_.dim, w.wq_a));
    TC_RETURN_IF_ERROR(v_.floats(prefix + "q_norm.weight", DType::bf16, {g_.q_lora_rank}, w.q_norm));
    TC_RETURN_IF_ERROR(v_.linear(prefix + "wq_b", Stored::fp8, heads, g_.q_lora_rank, w.wq_b));
    TC_RETURN_IF_ERROR(v_.linear(prefix + "wkv", Stored::fp8, g_.head_dim, g_.dim, w.wkv));
    TC_RETURN_IF_ERROR(v_.floats(prefix + "kv_norm.weight", DType::bf16, {g_.head_dim}, w.kv_norm));
    TC_RETURN_IF_ERROR(v_.linear(prefix + "wo_a", Stored::fp8, groups, heads / g_.o_groups, w.wo_a));
    TC_RETURN_IF_ERROR(v_.linear(prefix + "wo_b", Stored::fp8, g_.dim, groups, w.wo_b));
    if (g_.kind(i) == LayerKind::swa) return {};
    TC_RETURN_IF_ERROR(compressor(i, prefix + "compressor.", g_.head_dim, w.compressor));
    if (g_.kind(i) != LayerKind::csa) return {};
    const std::string indexer = prefix + "indexer.";
    TC_RETURN_IF_ERROR(
        v_.linear(indexer + "wq_b", Stored::fp8, g_.index_n_heads * g_.index_head_dim, g_.q_lora_rank, w.index_wq_b));
    TC_RETURN_IF_ERROR(
        v_.linear(indexer + "weights_proj", Stored::bf16, g_.index_n_heads, g_.dim, w.index_weights_proj));
    return compressor(i, indexer + "compressor.", g_.index_head_dim, w.index_compressor);
  }

  Status compressor(int i, const std::string& prefix, int64_t row_width, CompressorWeights& w) {
    const int64_t width = g_.compressor_width(i, row_width);
    TC_RETURN_IF_ERROR(v_.floats(prefix + "ape", DType::f32, {g_.compress_ratios[i], width}, w.ape));
    TC_RETURN_IF_ERROR(v_.linear(prefix + "wkv", Stored::bf16, width, g_.dim, w.wkv));
    TC_RETURN_IF_ERROR(v_.linear(prefix + "wgate", Stored::bf16, width, g_.dim, w.wgate));
    return v_.floats(prefix + "norm.weight", DType::bf16, {row_width}, w.norm);
  }

  Status moe(int i, const std::string& prefix, LayerWeights& w) {
    TC_RETURN_IF_ERROR(v_.linear(prefix + "gate", Stored::bf16, g_.n_routed_experts, g_.dim, w.gate));
    if (g_.is_hash_layer(i) && i < g_.n_layers) {
      TC_RETURN_IF_ERROR(v_.ids(prefix + "gate.tid2eid", {g_.vocab_size, g_.n_activated_experts}, w.tid2eid));
    } else {
      TC_RETURN_IF_ERROR(v_.floats(prefix + "gate.bias", DType::f32, {g_.n_routed_experts}, w.gate_bias));
    }
    w.experts.resize(static_cast<size_t>(g_.n_routed_experts));
    for (int e = 0; e < g_.n_routed_experts; ++e)
      TC_RETURN_IF_ERROR(expert(prefix + "experts." + std::to_string(e) + ".", Stored::fp4, w.experts[e]));
    return expert(prefix + "shared_experts.", Stored::fp8, w.shared_expert);
  }

  Status expert(const std::string& prefix, Stored stored, ExpertWeights& w) {
    TC_RETURN_IF_ERROR(v_.linear(prefix + "w1", stored, g_.moe_inter_dim, g_.dim, w.w1));
    TC_RETURN_IF_ERROR(v_.linear(prefix + "w3", stored, g_.moe_inter_dim, g_.dim, w.w3));
    return v_.linear(prefix + "w2", stored, g_.dim, g_.moe_inter_dim, w.w2);
  }

  Status hc_site(const std::string& prefix, int64_t outputs, int64_t scales, HcWeights& w) {
    TC_RETURN_IF_ERROR(v_.floats(prefix + "_fn", DType::f32, {outputs, g_.hc_mult * g_.dim}, w.fn));
    TC_RETURN_IF_ERROR(v_.floats(prefix + "_base", DType::f32, {outputs}, w.base));
    return v_.floats(prefix + "_scale", DType::f32, {scales}, w.scale);
  }

  Status hc_head(const std::string& prefix, HcWeights& w) { return hc_site(prefix, g_.hc_mult, 1, w); }

  const ModelGeometry& g_;
  Visitor& v_;
};

}  // namespace thermocline::deepseek_v4
