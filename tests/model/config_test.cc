// config.json: every field missing, of the wrong type or out of range is an error that names it.
#include "runtime/model/deepseek_v4/config.h"

#include "runtime/model/deepseek_v4/synthesize.h"
#include "runtime/model/deepseek_v4/weights.h"
#include "tests/support/fixtures.h"

namespace thermocline::deepseek_v4 {
namespace {

Json demo_config() { return parse_json(read_text_file(test::demo_model() / "config.json").value()).value(); }

std::string error_of(const Json& config) {
  const Result<ModelGeometry> geometry = parse_config(dump_json(config));
  return geometry ? "" : geometry.error().message;
}

TEST(Config, DemoIsRead) {
  const ModelGeometry g = read_config(test::demo_model()).value();
  EXPECT_EQ(g.dim, 256);
  EXPECT_EQ(g.n_layers, 6);
  EXPECT_EQ(g.compress_ratios, (std::vector<int>{0, 0, 4, 128, 4, 128, 0}));
  EXPECT_EQ(g.kind(2), LayerKind::csa);
  EXPECT_EQ(g.kind(3), LayerKind::hca);
  EXPECT_EQ(g.kind(6), LayerKind::swa);
  EXPECT_EQ(g.original_seq_len, 65536);
}

TEST(Config, EveryMissingFieldIsNamed) {
  const Json config = demo_config();
  const std::set<std::string> optional = {"attention_dropout", "expert_dtype", "initializer_range", "torch_dtype",
                                          "use_cache"};
  for (const auto& [name, value] : config.items()) {
    Json without = config;
    without.erase(name);
    if (optional.contains(name))
      EXPECT_EQ(error_of(without), "") << name;
    else
      EXPECT_NE(error_of(without).find("'" + name + "'"), std::string::npos) << name << ": " << error_of(without);
  }
  for (const char* nested : {"rope_scaling", "quantization_config"})
    for (const auto& [name, value] : config[nested].items()) {
      Json without = config;
      without[nested].erase(name);
      if (name == "activation_scheme") continue;
      EXPECT_NE(error_of(without).find("'" + name + "'"), std::string::npos) << nested << "." << name;
    }
}

TEST(Config, EveryWrongTypeIsNamed) {
  const Json config = demo_config();
  const std::set<std::string> unread = {"attention_dropout", "initializer_range", "torch_dtype", "use_cache"};
  for (const auto& [name, value] : config.items()) {
    if (unread.contains(name)) continue;
    for (const Json& wrong : {Json("text"), Json(nullptr), Json::object(), Json(-1), Json(true), Json(1e300)}) {
      if (wrong == value || (name == "norm_topk_prob" && wrong == true)) continue;
      Json broken = config;
      broken[name] = wrong;
      EXPECT_NE(error_of(broken).find(name), std::string::npos) << name << " = " << wrong << ": " << error_of(broken);
    }
  }
}

TEST(Config, InconsistenciesAreClear) {
  const auto with = [](const char* name, const Json& value) {
    Json config = demo_config();
    config[name] = value;
    return error_of(config);
  };
  EXPECT_NE(with("model_type", "deepseek_v41").find("deepseek_v41"), std::string::npos);
  EXPECT_NE(with("architectures", Json::array({"LlamaForCausalLM"})).find("LlamaForCausalLM"), std::string::npos);
  EXPECT_NE(with("compress_ratios", Json::array({0, 0, 4})).find("fewer"), std::string::npos);
  EXPECT_NE(with("compress_ratios", Json::array({0, 0, 4, 128, 4, 128, 4})).find("MTP"), std::string::npos);
  EXPECT_NE(with("compress_ratios", Json::array({0, 0, -4, 128, 4, 128, 0})).find("compress_ratios[2]"),
            std::string::npos);
  for (const char* count :
       {"num_hidden_layers", "n_routed_experts", "hidden_size", "num_attention_heads", "vocab_size"})
    for (const int64_t absurd : {int64_t{1} << 25, int64_t{1} << 31, int64_t{1} << 62})
      EXPECT_NE(with(count, absurd).find(count), std::string::npos) << absurd << ": " << with(count, absurd);
  EXPECT_NE(with("o_groups", 3).find("o_groups"), std::string::npos);
  EXPECT_NE(with("num_experts_per_tok", 33).find("num_experts_per_tok"), std::string::npos);
  EXPECT_NE(with("index_head_dim", 96).find("index_head_dim"), std::string::npos);
  EXPECT_NE(with("qk_rope_head_dim", 63).find("qk_rope_head_dim"), std::string::npos);
  EXPECT_NE(with("eos_token_id", 4096).find("eos_token_id"), std::string::npos);
  EXPECT_EQ(with("compress_ratios", Json::array({0, 0, 4, 128, 4, 128, 0, 0, 0})),
            "");  // DSpark checkpoints list three
  EXPECT_FALSE(parse_config("[]"));
  EXPECT_FALSE(parse_config(""));
  EXPECT_FALSE(parse_config("{\"a\":1,\"a\":2}"));
}

// As newer versions of transformers write it.
Json respelled(Json config) {
  Json& scaling = config["rope_scaling"];
  Json compress = scaling;
  compress["rope_type"] = compress["type"];
  compress.erase("type");
  compress["rope_theta"] = config["compress_rope_theta"];
  compress["factor"] = 16.0;
  config["rope_parameters"] = {{"main", {{"rope_type", "default"}, {"rope_theta", config["rope_theta"]}}},
                               {"compress", std::move(compress)}};
  config["compress_rates"] = {{"compressed_sparse_attention", 4}, {"heavily_compressed_attention", 128}};
  config["layer_types"] = Json::array();
  for (int i = 0; i < config["num_hidden_layers"].get<int>(); ++i) {
    const int ratio = config["compress_ratios"][static_cast<size_t>(i)].get<int>();
    config["layer_types"].push_back(ratio == 0   ? "sliding_attention"
                                    : ratio == 4 ? "compressed_sparse_attention"
                                                 : "heavily_compressed_attention");
  }
  for (const char* name : {"rope_scaling", "rope_theta", "compress_rope_theta", "compress_ratios"}) config.erase(name);
  return config;
}

TEST(Config, OtherSpellingsAreTheSameModel) {
  const Json plain = demo_config();
  const std::string same = config_json(parse_config(plain.dump()).value());
  const auto reads = [&](const Json& config) {
    const Result<ModelGeometry> geometry = parse_config(config.dump());
    return geometry ? config_json(*geometry) : geometry.error().message;
  };
  Json config = plain;
  config["rope_scaling"]["rope_type"] = "yarn";
  EXPECT_EQ(reads(config), same) << "both";
  config["rope_scaling"].erase("type");
  EXPECT_EQ(reads(config), same);
  EXPECT_EQ(reads(respelled(plain)), same);
  Json both = respelled(plain);
  for (const auto& [name, value] : plain.items()) both[name] = value;
  EXPECT_EQ(reads(both), same);

  const auto refused = [&](Json changed, const char* where, const Json& value, const char* word) {
    changed[Json::json_pointer(where)] = value;
    EXPECT_NE(error_of(changed).find(word), std::string::npos) << where << ": " << error_of(changed);
  };
  refused(plain, "/rope_scaling/attention_factor", 2, "attention_factor");
  refused(plain, "/rope_scaling/mscale_all_dim", 0.7, "mscale_all_dim");
  refused(plain, "/rope_scaling/truncate", false, "truncate");
  refused(plain, "/rope_scaling/rope_type", "linear", "other spelling says \"linear\"");
  refused(both, "/rope_parameters/compress/factor", 32, "rope_scaling");
  refused(both, "/rope_parameters/main/rope_theta", 20000, "rope_theta");
  refused(both, "/layer_types/0", "heavily_compressed_attention", "compress_ratios");
  const Json newer = respelled(plain);
  refused(newer, "/rope_parameters/main/rope_type", "yarn", "rope_parameters.main.rope_type");
  refused(newer, "/rope_parameters/compress", nullptr, "rope_parameters.compress");
  refused(newer, "/rope_parameters", nullptr, "rope_theta");
  refused(newer, "/layer_types/1", "full_attention", "full_attention");
  refused(newer, "/layer_types/1", 4, "layer_types");
  refused(newer, "/compress_rates", nullptr, "compress_rates");
  for (const char* field : {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "rope_theta"}) {
    Json without = newer;
    without["rope_parameters"]["compress"].erase(field);
    EXPECT_NE(error_of(without).find(field), std::string::npos) << "nothing is defaulted: " << error_of(without);
  }
}

TEST(PublishedTensors, CountsAreThoseOfTheReleases) {
  ModelGeometry flash = published_geometry("v4-flash", 0).value();
  flash.n_mtp_layers = 1;
  flash.compress_ratios.push_back(0);
  EXPECT_EQ(published_tensors(flash).size(), 69187u);
  ModelGeometry pro = published_geometry("v4-pro", 0).value();
  pro.n_mtp_layers = 1;
  pro.compress_ratios.push_back(0);
  EXPECT_EQ(published_tensors(pro).size(), 145116u);
}

TEST(PublishedTensors, ConfigsWeWriteAreRead) {
  for (const char* name : {"v4-flash", "v4-pro", "demo"}) {
    const ModelGeometry g = published_geometry(name, 0).value();
    const ModelGeometry back = parse_config(config_json(g)).value();
    EXPECT_EQ(back.compress_ratios, g.compress_ratios);
    EXPECT_EQ(back.route_scale, g.route_scale);
    EXPECT_EQ(back.norm_eps, g.norm_eps);
  }
  EXPECT_FALSE(published_geometry("v5", 0));
  EXPECT_FALSE(published_geometry("demo", 7));
  EXPECT_EQ(published_geometry("v4-pro", 4, 48).value().n_routed_experts, 48);
  EXPECT_FALSE(published_geometry("v4-pro", 4, 5)) << "a token has 6";
  EXPECT_FALSE(published_geometry("v4-pro", 4, 385));
  const ModelGeometry odd = published_geometry(test::golden("tiny-odd").string(), 3, 5).value();
  EXPECT_EQ(odd.dim, 224) << "a folder's own shapes";
  EXPECT_EQ(odd.n_layers, 3);
  EXPECT_EQ(odd.n_routed_experts, 5);
  EXPECT_EQ(odd.n_mtp_layers, 0);
  EXPECT_FALSE(published_geometry(test::golden("none").string(), 0));
}

}  // namespace
}  // namespace thermocline::deepseek_v4
