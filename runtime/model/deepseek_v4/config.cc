#include "runtime/model/deepseek_v4/config.h"

#include "runtime/io/file.h"
#include "runtime/io/json_document.h"
#include "runtime/model/config_fields.h"

namespace thermocline::deepseek_v4 {
namespace {

template <class Float>
Status read_positive(const Json& json, const char* name, Float& out) {
  TC_ASSIGN(const double value, get_number(json, name));
  if (!(value > 0) || value > 1e12)
    return corrupt("field '" + std::string(name) + "' should be positive, not " + std::to_string(value));
  out = static_cast<Float>(value);
  return {};
}

// A field as the release spells it, from another spelling; where both are there, they agree.
Status spell(Json& json, const std::string& name, const Json& value) {
  if (json.contains(name) && json[name] != value)
    return corrupt("field '" + name + "' is " + dump_json(json[name]) + ", but its other spelling says " +
                   dump_json(value));
  json[name] = value;
  return {};
}

Status spell_rope_type(Json& scaling) {
  return scaling.is_object() && scaling.contains("rope_type") ? spell(scaling, "type", scaling["rope_type"]) : Status();
}

// rope_parameters: `main` for layers without compression, `compress` for the others.
Status spell_rope(Json& json) {
  if (json.contains("rope_scaling")) TC_RETURN_IF_ERROR(spell_rope_type(json["rope_scaling"]));
  if (!json.contains("rope_parameters") || !json["rope_parameters"].is_object()) return {};
  Json parameters = json["rope_parameters"];
  for (const auto& [part, theta] : {std::pair("main", "rope_theta"), std::pair("compress", "compress_rope_theta")}) {
    if (!parameters.contains(part) || !parameters[part].is_object())
      return corrupt(std::string("field 'rope_parameters.") + part + "' is missing or no object");
    Json& said = parameters[part];
    TC_RETURN_IF_ERROR(spell_rope_type(said));
    if (said.contains("rope_theta")) TC_RETURN_IF_ERROR(spell(json, theta, said["rope_theta"]));
  }
  if (const Json& main = parameters["main"]; main.contains("type") && main["type"] != "default")
    return unsupported("field 'rope_parameters.main.rope_type' is " + dump_json(main["type"]) +
                       "; default is supported");
  Json scaling =
      json.contains("rope_scaling") && json["rope_scaling"].is_object() ? json["rope_scaling"] : Json::object();
  const Json& compress = parameters["compress"];
  for (const char* field : {"type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
                            "attention_factor", "mscale", "mscale_all_dim", "truncate"})
    if (compress.contains(field))
      if (Status status = spell(scaling, field, compress[field]); !status.ok())
        return std::move(status).error().with("rope_scaling");
  json["rope_scaling"] = scaling;
  return {};
}

// layer_types and compress_rates; MTP layers have only the window.
Status spell_ratios(Json& json) {
  if (!json.contains("compress_rates") || !json.contains("layer_types")) return {};
  const Json &rates = json["compress_rates"], &types = json["layer_types"];
  if (!rates.is_object() || !types.is_array())
    return corrupt("'compress_rates' is no object, or 'layer_types' no array");
  Json ratios = Json::array();
  for (const Json& type : types) {
    if (!type.is_string()) return corrupt("field 'layer_types' holds " + dump_json(type) + ", which is no name");
    const auto name = type.get<std::string>();
    if (name != "sliding_attention" && !rates.contains(name))
      return corrupt("field 'compress_rates' has no rate for the layers of type " + name);
    ratios.push_back(name == "sliding_attention" ? Json(0) : rates[name]);
  }
  if (json.contains("compress_ratios") && json["compress_ratios"].is_array())  // which has those of MTP layers too
    for (size_t i = ratios.size(); i < json["compress_ratios"].size(); ++i)
      ratios.push_back(json["compress_ratios"][i]);
  else if (json.contains("num_nextn_predict_layers") && json["num_nextn_predict_layers"].is_number_unsigned())
    for (uint64_t i = 0; i < std::min<uint64_t>(json["num_nextn_predict_layers"].get<uint64_t>(), 64); ++i)
      ratios.push_back(0);
  return spell(json, "compress_ratios", ratios);
}

Status check_architecture(const Json& json) {
  if (!json.is_object()) return corrupt("not a JSON object");
  if (json.contains("model_type") && (json["model_type"] == "deepseek_v3" || json["model_type"] == "deepseek_v41"))
    return unsupported("field 'model_type' is " + dump_json(json["model_type"]) +
                       "; only \"deepseek_v4\" is computed: `thermocline plan` says what the other would take");
  TC_RETURN_IF_ERROR(require(json, "model_type", "deepseek_v4"));
  TC_RETURN_IF_ERROR(require(json, "architectures", Json::array({"DeepseekV4ForCausalLM"})));
  TC_RETURN_IF_ERROR(require(json, "hidden_act", "silu"));
  TC_RETURN_IF_ERROR(require(json, "scoring_func", "sqrtsoftplus"));
  TC_RETURN_IF_ERROR(require(json, "topk_method", "noaux_tc"));
  TC_RETURN_IF_ERROR(require(json, "norm_topk_prob", true));
  TC_RETURN_IF_ERROR(require(json, "num_key_value_heads", 1));
  TC_RETURN_IF_ERROR(require(json, "n_shared_experts", 1));
  TC_RETURN_IF_ERROR(require(json, "tie_word_embeddings", false));
  return require(json, "attention_bias", false);
}

Status read_sizes(const Json& json, ModelGeometry& g) {
  TC_RETURN_IF_ERROR(read_int(json, "vocab_size", 1, kMaxExtent, g.vocab_size));
  TC_RETURN_IF_ERROR(read_int(json, "hidden_size", 1, kMaxExtent, g.dim));
  TC_RETURN_IF_ERROR(read_int(json, "num_hidden_layers", 1, 4096, g.n_layers));
  TC_RETURN_IF_ERROR(read_int(json, "num_nextn_predict_layers", 0, 64, g.n_mtp_layers));
  TC_RETURN_IF_ERROR(read_int(json, "num_attention_heads", 1, 65536, g.n_heads));
  TC_RETURN_IF_ERROR(read_int(json, "head_dim", 2, 65536, g.head_dim));
  TC_RETURN_IF_ERROR(read_int(json, "qk_rope_head_dim", 2, 65536, g.rope_head_dim));
  TC_RETURN_IF_ERROR(read_int(json, "q_lora_rank", 1, kMaxExtent, g.q_lora_rank));
  TC_RETURN_IF_ERROR(read_int(json, "o_lora_rank", 1, kMaxExtent, g.o_lora_rank));
  TC_RETURN_IF_ERROR(read_int(json, "o_groups", 1, 65536, g.o_groups));
  TC_RETURN_IF_ERROR(read_int(json, "sliding_window", 1, kMaxExtent, g.window_size));
  TC_RETURN_IF_ERROR(read_int(json, "index_n_heads", 1, 65536, g.index_n_heads));
  TC_RETURN_IF_ERROR(read_int(json, "index_head_dim", 2, 65536, g.index_head_dim));
  TC_RETURN_IF_ERROR(read_int(json, "index_topk", 1, kMaxExtent, g.index_topk));
  TC_RETURN_IF_ERROR(read_int(json, "n_routed_experts", 1, 65536, g.n_routed_experts));
  TC_RETURN_IF_ERROR(read_int(json, "num_experts_per_tok", 1, 256, g.n_activated_experts));
  TC_RETURN_IF_ERROR(read_int(json, "moe_intermediate_size", 1, kMaxExtent, g.moe_inter_dim));
  TC_RETURN_IF_ERROR(read_int(json, "num_hash_layers", 0, 4096, g.n_hash_layers));
  TC_RETURN_IF_ERROR(read_int(json, "hc_mult", 1, 64, g.hc_mult));
  TC_RETURN_IF_ERROR(read_int(json, "hc_sinkhorn_iters", 1, 10000, g.hc_sinkhorn_iters));
  TC_RETURN_IF_ERROR(read_int(json, "max_position_embeddings", 1, int64_t{1} << 40, g.max_position_embeddings));
  TC_RETURN_IF_ERROR(read_int(json, "bos_token_id", 0, g.vocab_size - 1, g.bos_token_id));
  TC_RETURN_IF_ERROR(read_int(json, "eos_token_id", 0, g.vocab_size - 1, g.eos_token_id));
  TC_RETURN_IF_ERROR(read_positive(json, "routed_scaling_factor", g.route_scale));
  TC_RETURN_IF_ERROR(read_positive(json, "swiglu_limit", g.swiglu_limit));
  TC_RETURN_IF_ERROR(read_positive(json, "hc_eps", g.hc_eps));
  return read_positive(json, "rms_norm_eps", g.norm_eps);
}

Status read_rope(const Json& json, ModelGeometry& g) {
  TC_RETURN_IF_ERROR(read_positive(json, "rope_theta", g.rope_theta));
  TC_RETURN_IF_ERROR(read_positive(json, "compress_rope_theta", g.compress_rope_theta));
  if (!json.contains("rope_scaling") || !json["rope_scaling"].is_object())
    return corrupt("field 'rope_scaling' is missing or no object");
  const Json& scaling = json["rope_scaling"];
  const auto read = [&]() -> Status {
    TC_RETURN_IF_ERROR(require(scaling, "type", "yarn"));
    // Of other models' YaRN: they would change numbers here too.
    for (const auto& [name, neutral] : {std::pair<const char*, Json>("attention_factor", 1.0),
                                        {"mscale", 1.0},
                                        {"mscale_all_dim", 1.0},
                                        {"truncate", true}})
      if (scaling.contains(name) && !scaling[name].is_null()) TC_RETURN_IF_ERROR(require(scaling, name, neutral));
    TC_RETURN_IF_ERROR(read_positive(scaling, "factor", g.rope_factor));
    TC_RETURN_IF_ERROR(read_int(scaling, "original_max_position_embeddings", 1, int64_t{1} << 40, g.original_seq_len));
    TC_RETURN_IF_ERROR(read_positive(scaling, "beta_fast", g.beta_fast));
    return read_positive(scaling, "beta_slow", g.beta_slow);
  };
  Status status = read();
  if (!status.ok()) return std::move(status).error().with("rope_scaling");
  return {};
}

Status read_quantization(const Json& json, ModelGeometry& g) {
  if (!json.contains("quantization_config") || !json["quantization_config"].is_object())
    return corrupt("field 'quantization_config' is missing or no object");
  const Json& q = json["quantization_config"];
  const auto read = [&]() -> Status {
    TC_RETURN_IF_ERROR(require(q, "quant_method", "fp8"));
    TC_RETURN_IF_ERROR(require(q, "fmt", "e4m3"));
    TC_RETURN_IF_ERROR(require(q, "scale_fmt", "ue8m0"));
    if (!q.contains("weight_block_size") || !q["weight_block_size"].is_array() || q["weight_block_size"].size() != 2)
      return corrupt("field 'weight_block_size' is missing or no pair");
    const Json block = {{"rows", q["weight_block_size"][0]}, {"cols", q["weight_block_size"][1]}};
    TC_RETURN_IF_ERROR(read_int(block, "rows", 1, 65536, g.weight_block_rows));
    TC_RETURN_IF_ERROR(read_int(block, "cols", 1, 65536, g.weight_block_cols));
    if (g.weight_block_rows % 16 != 0 || g.weight_block_cols % 32 != 0)
      return unsupported("weight_block_size " + dump_json(q["weight_block_size"]) +
                         " is not a multiple of the packed tile, 16 x 32");
    return {};
  };
  Status status = read();
  if (!status.ok()) return std::move(status).error().with("quantization_config");
  if (json.contains("expert_dtype") && json["expert_dtype"] != "fp4" && json["expert_dtype"] != "fp8")
    return unsupported("field 'expert_dtype' is " + dump_json(json["expert_dtype"]) + "; fp4 and fp8 are supported");
  return {};
}

Status read_ratios(const Json& json, ModelGeometry& g) {
  if (!json.contains("compress_ratios") || !json["compress_ratios"].is_array())
    return corrupt("field 'compress_ratios' is missing or no array");
  const Json& ratios = json["compress_ratios"];
  const size_t layers = static_cast<size_t>(g.n_layers), all = layers + static_cast<size_t>(g.n_mtp_layers);
  if (ratios.size() < all)
    return corrupt("field 'compress_ratios' has " + std::to_string(ratios.size()) +
                   " entries, fewer than num_hidden_layers + num_nextn_predict_layers = " + std::to_string(all));
  for (size_t i = 0; i < ratios.size(); ++i) {
    const std::string name = "compress_ratios[" + std::to_string(i) + "]";
    if (!ratios[i].is_number_integer())
      return corrupt("field '" + name + "' should be an integer, not " + dump_json(ratios[i]));
    const int64_t ratio = ratios[i].get<int64_t>();
    if (ratio < 0 || ratio > 65536)
      return corrupt("field '" + name + "' is " + std::to_string(ratio) + ", outside 0..65536");
    if (i >= layers && ratio != 0)
      return corrupt("field '" + name + "' is " + std::to_string(ratio) +
                     ", but MTP layers have only the window (ratio 0)");
    if (i < all) g.compress_ratios.push_back(static_cast<int>(ratio));
  }
  return {};
}

Status check_consistency(const ModelGeometry& g) {
  const auto fail = [](const std::string& text) { return corrupt(text); };
  if (g.rope_head_dim > g.head_dim || g.rope_head_dim % 2 != 0)
    return fail("qk_rope_head_dim should be even and at most head_dim");
  if (g.rope_head_dim > g.index_head_dim) return fail("qk_rope_head_dim is larger than index_head_dim");
  if ((g.index_head_dim & (g.index_head_dim - 1)) != 0)
    return fail("index_head_dim should be a power of two (Hadamard rotation)");
  if (g.n_heads % g.o_groups != 0) return fail("num_attention_heads should be a multiple of o_groups");
  if (g.n_activated_experts > g.n_routed_experts) return fail("num_experts_per_tok is larger than n_routed_experts");
  if (g.o_lora_rank % 16 != 0) return unsupported("o_lora_rank should be a multiple of 16, the rows of a packed tile");
  if (static_cast<int64_t>(g.n_heads) * g.head_dim > kMaxExtent)
    return fail("num_attention_heads x head_dim is too large");
  return {};
}

}  // namespace

Result<ModelGeometry> parse_config(std::string_view json_text) {
  TC_ASSIGN(Json json, parse_json(json_text, true));
  ModelGeometry geometry;
  TC_RETURN_IF_ERROR(check_architecture(json));
  TC_RETURN_IF_ERROR(spell_rope(json));
  TC_RETURN_IF_ERROR(spell_ratios(json));
  TC_RETURN_IF_ERROR(read_sizes(json, geometry));
  TC_RETURN_IF_ERROR(read_rope(json, geometry));
  TC_RETURN_IF_ERROR(read_quantization(json, geometry));
  TC_RETURN_IF_ERROR(read_ratios(json, geometry));
  TC_RETURN_IF_ERROR(check_consistency(geometry));
  return geometry;
}

Result<ModelGeometry> read_config(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "config.json";
  TC_ASSIGN(const std::string text, read_text_file(path, 16 << 20));
  Result<ModelGeometry> geometry = parse_config(text);
  if (!geometry) return std::move(geometry).error().with(path.string());
  return geometry;
}

std::string config_json(const ModelGeometry& g) {
  const Json json = {{"architectures", {"DeepseekV4ForCausalLM"}},
                     {"model_type", "deepseek_v4"},
                     {"attention_bias", false},
                     {"attention_dropout", 0.0},
                     {"bos_token_id", g.bos_token_id},
                     {"eos_token_id", g.eos_token_id},
                     {"expert_dtype", "fp4"},
                     {"hc_eps", 1e-6},
                     {"hc_mult", g.hc_mult},
                     {"hc_sinkhorn_iters", g.hc_sinkhorn_iters},
                     {"head_dim", g.head_dim},
                     {"hidden_act", "silu"},
                     {"hidden_size", g.dim},
                     {"index_head_dim", g.index_head_dim},
                     {"index_n_heads", g.index_n_heads},
                     {"index_topk", g.index_topk},
                     {"initializer_range", 0.02},
                     {"max_position_embeddings", g.max_position_embeddings},
                     {"moe_intermediate_size", g.moe_inter_dim},
                     {"n_routed_experts", g.n_routed_experts},
                     {"n_shared_experts", 1},
                     {"norm_topk_prob", true},
                     {"num_attention_heads", g.n_heads},
                     {"num_experts_per_tok", g.n_activated_experts},
                     {"num_hidden_layers", g.n_layers},
                     {"num_hash_layers", g.n_hash_layers},
                     {"num_key_value_heads", 1},
                     {"num_nextn_predict_layers", g.n_mtp_layers},
                     {"o_groups", g.o_groups},
                     {"o_lora_rank", g.o_lora_rank},
                     {"q_lora_rank", g.q_lora_rank},
                     {"qk_rope_head_dim", g.rope_head_dim},
                     {"quantization_config",
                      {{"activation_scheme", "dynamic"},
                       {"fmt", "e4m3"},
                       {"quant_method", "fp8"},
                       {"scale_fmt", "ue8m0"},
                       {"weight_block_size", {g.weight_block_rows, g.weight_block_cols}}}},
                     {"rms_norm_eps", 1e-6},
                     {"rope_scaling",
                      {{"beta_fast", g.beta_fast},
                       {"beta_slow", g.beta_slow},
                       {"factor", g.rope_factor},
                       {"original_max_position_embeddings", g.original_seq_len},
                       {"type", "yarn"}}},
                     {"rope_theta", g.rope_theta},
                     {"routed_scaling_factor", g.route_scale},
                     {"scoring_func", "sqrtsoftplus"},
                     {"sliding_window", g.window_size},
                     {"swiglu_limit", g.swiglu_limit},
                     {"tie_word_embeddings", false},
                     {"topk_method", "noaux_tc"},
                     {"torch_dtype", "bfloat16"},
                     {"use_cache", true},
                     {"vocab_size", g.vocab_size},
                     {"compress_rope_theta", g.compress_rope_theta},
                     {"compress_ratios", g.compress_ratios}};
  return dump_json(json, 2) + "\n";
}

}  // namespace thermocline::deepseek_v4
