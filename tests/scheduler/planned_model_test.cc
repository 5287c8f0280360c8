// Models that are planned and not computed: their totals against what is published of them, their config.json against
// the sizes that the program knows.
#include "runtime/engine/planned_model.h"

#include "tests/support/fixtures.h"

namespace thermocline {
namespace {

using sched::LayerCosts;
using sched::ModelCosts;
using sched::WeightFormat;

Json config_of(const std::string& model_type) {
  return parse_json(read_text_file(test::source_dir() / "tests" / "data" / "plan" / (model_type + ".json")).value())
      .value();
}

double weights_of(const LayerCosts& layer) {
  double weights = 0;
  for (size_t f = 0; f < layer.dense_bytes.size(); ++f) weights += layer.dense_bytes[f] / sched::kBytesPerWeight[f];
  return weights;
}

double weights_of_expert(const ModelCosts& m) {
  return m.expert_bytes / sched::kBytesPerWeight[static_cast<size_t>(m.expert_format)];
}

// Parameters that a token meets in the layers it passes through, of so many experts each; without embedding and head.
double parameters(const ModelCosts& m, int experts, bool prompt = false) {
  double sum = 0;
  for (const LayerCosts& layer : m.layers)
    if (!prompt || layer.prompt_tail == 0)
      sum += weights_of(layer) + (layer.routed ? experts * weights_of_expert(m) : 0);
  return sum;
}

void expect_equal(const PlannedModel& a, const PlannedModel& b) {
  EXPECT_EQ(a.costs.routed_bytes(), b.costs.routed_bytes());
  EXPECT_EQ(a.costs.dense_bytes(), b.costs.dense_bytes());
  EXPECT_EQ(a.costs.table_bytes, b.costs.table_bytes);
  EXPECT_EQ(a.costs.kv_bytes_per_token(), b.costs.kv_bytes_per_token());
  EXPECT_EQ(a.costs.max_context, b.costs.max_context);
  EXPECT_EQ(a.widths.compress_ratios, b.widths.compress_ratios);
  ASSERT_EQ(a.costs.layers.size(), b.costs.layers.size());
  for (size_t i = 0; i < a.costs.layers.size(); ++i) {
    const LayerCosts &x = a.costs.layers[i], &y = b.costs.layers[i];
    EXPECT_TRUE(x.routed == y.routed && x.own_rows == y.own_rows && x.most_keys == y.most_keys &&
                x.prompt_tail == y.prompt_tail && x.ratio == y.ratio && x.head_dim == y.head_dim &&
                x.dense_bytes == y.dense_bytes)
        << i;
  }
}

TEST(DeepSeekV3, IsAsLargeAsPublished) {
  const PlannedModel model = planned_model("v3").value();
  const ModelCosts& m = model.costs;
  EXPECT_NE(model.not_computed.find("MLA"), std::string::npos);
  const double vocabulary = m.head_bytes / 2;
  EXPECT_NEAR(parameters(m, 256) + 2 * vocabulary, 671e9, 0.005 * 671e9);
  EXPECT_NEAR(parameters(m, 8) + vocabulary, 37e9, 0.025 * 37e9);
  EXPECT_NEAR(m.expert_bytes, 44.05e6, 0.01e6) << "3 x 7168 x 2048, and 4 bytes for 16,384 of them";
  EXPECT_EQ(m.expert_format, WeightFormat::fp8);
  EXPECT_EQ(m.layer_count(), 61);
  EXPECT_EQ(m.routed_layer_count(), 58);
  EXPECT_EQ(m.kv_bytes_per_token(), 70272) << "61 rows of 576 values in bf16, as its paper on hardware says";
  EXPECT_EQ(m.max_context, 163840);
  EXPECT_EQ(m.layers[0].rows(1000), 1000);
  EXPECT_EQ(m.layers[0].keys(1e6), 0);
  EXPECT_EQ(m.layers[0].head_dim, (576 + 512) / 2);
  EXPECT_EQ(m.layers[0].prefill_head_dim, (192 + 128) / 2 + 32);
}

// Bytes are those of the published safetensors headers, component by component.
TEST(DeepSeekV41Flash, IsAsLargeAsPublished) {
  const PlannedModel model = planned_model("v4.1-flash").value();
  const ModelCosts& m = model.costs;
  EXPECT_NE(model.not_computed.find("n-gram"), std::string::npos);
  const double vocabulary = m.head_bytes / 2;
  EXPECT_NEAR(parameters(m, 384) + 2 * vocabulary, 552e9, 0.005 * 552e9);
  EXPECT_NEAR(parameters(m, 6) + vocabulary, 16e9, 0.03 * 16e9);
  EXPECT_NEAR(parameters(m, 6, true), 8e9, 0.03 * 8e9) << "the encoder's half";
  EXPECT_NEAR(m.expert_bytes, 18.8e6, 0.01e6);
  EXPECT_EQ(m.routed_bytes(), 288'777'830'400);
  constexpr double kAttention = 5'070'131'200, kShared = 1'416'960'000, kEngram = 315'043'840, kRouters = 157'409'280,
                   kStreams = 157'295'040, kIndex = 45'130'752, kCompressor = 36'704'256, kHead = 1'323'827'200;
  const double dense = kAttention + kShared + kEngram + kRouters + kStreams + kIndex + kCompressor + kHead;
  EXPECT_NEAR(m.dense_bytes(), dense, 0.001 * dense);
  EXPECT_EQ(m.embedding_bytes, kHead);
  EXPECT_EQ(m.table_bytes, 202'758'032'400);
  EXPECT_EQ(m.table_reads_per_token * 264, 12672) << "some 13 kB";
  EXPECT_EQ(m.kv_bytes_per_token(), 890);
  EXPECT_EQ(m.hash_layer_count(), 0);
}

TEST(DeepSeekV41Flash, LayersShareRowsAndChoices) {
  const ModelCosts m = planned_model("v4.1-flash").value().costs;
  int owners = 0, selecting = 0;
  for (const LayerCosts& layer : m.layers) {
    owners += layer.kv_bytes_per_token() > 0;
    selecting += layer.selects();
  }
  EXPECT_EQ(owners, 4);
  EXPECT_EQ(selecting, 8);
  constexpr double kContext = 100'000;
  EXPECT_EQ(m.layers[0].rows(kContext), 128);
  EXPECT_EQ(m.layers[2].keys(kContext), 50'000) << "full: every second position";
  EXPECT_EQ(m.layers[3].keys(kContext), 0) << "reuse";
  EXPECT_EQ(m.layers[3].rows(kContext), 128 + 512);
  EXPECT_EQ(m.layers[20].keys(kContext), 100'000);
  EXPECT_EQ(m.layers[24].keys(kContext), 16'384) << "reindex: 2,048 blocks of 8";
  EXPECT_EQ(m.layers[19].prompt_tail, 0);
  EXPECT_EQ(m.layers[20].prompt_tail, 128);
}

TEST(PlannedModel, AFolderNeedsItsConfigAlone) {
  for (const auto& [type, name] : {std::pair("deepseek_v3", "v3"), std::pair("deepseek_v41", "v4.1-flash")}) {
    const test::TempDir folder;
    ASSERT_TRUE(write_text_file(folder.path() / "config.json", dump_json(config_of(type))).ok());
    const Result<PlannedModel> model = planned_model(folder.path().string());
    ASSERT_TRUE(model) << model.error().message;
    expect_equal(*model, planned_model(name).value());
  }
  EXPECT_EQ(planned_model(test::demo_model().string()).value().not_computed, "");
  EXPECT_FALSE(planned_model("v5"));
}

TEST(PlannedModel, WeightsWithoutQuantizationAreBf16) {
  Json config = config_of("deepseek_v3");
  config.erase("quantization_config");
  const ModelCosts m = deepseek_v3::planned(config).value().costs;
  EXPECT_EQ(m.expert_format, WeightFormat::bf16);
  EXPECT_EQ(m.expert_bytes, 2.0 * 3 * 7168 * 2048);
}

// Every field counts, and is named where it is missing, of another type or beyond what can be.
TEST(PlannedModel, EveryFieldIsReadAndNamed) {
  const auto check = [](const auto& planned, const Json& config, const Json::json_pointer& at) {
    for (const auto& [key, value] : config[at].items()) {
      if (value.is_object()) continue;
      for (const Json& wrong : {Json("text"), Json(nullptr), Json(-1), Json(1e300), Json(int64_t{1} << 60)}) {
        Json broken = config;
        broken[at][key] = wrong;
        const Result<PlannedModel> model = planned(broken);
        ASSERT_FALSE(model) << key << " = " << dump_json(wrong);
        EXPECT_NE(model.error().message.find(key), std::string::npos) << model.error().message;
      }
      Json without = config;
      without[at].erase(key);
      EXPECT_NE(planned(without).error().message.find(key), std::string::npos) << key;
    }
  };
  const Json v3 = config_of("deepseek_v3"), v41 = config_of("deepseek_v41");
  check(deepseek_v3::planned, v3, Json::json_pointer(""));
  check(deepseek_v3::planned, v3, Json::json_pointer("/quantization_config"));
  check(deepseek_v41::planned, v41, Json::json_pointer("/text_config"));
  check(deepseek_v41::planned, v41, Json::json_pointer("/quantization_config"));
}

TEST(PlannedModel, LayersThatCannotBeAreRefused) {
  const Json good = config_of("deepseek_v41");
  const auto refused = [&](const char* key, const Json& value) {
    Json config = good;
    config["text_config"][key] = value;
    return !deepseek_v41::planned(config);
  };
  EXPECT_FALSE(refused("kv_source_layer_ids", {2, 8, 14, 20}));
  EXPECT_TRUE(refused("kv_source_layer_ids", {8, 14, 20})) << "layer 2 has nobody's rows";
  EXPECT_TRUE(refused("index_source_layer_ids", Json::array()));
  EXPECT_TRUE(refused("kv_source_layer_ids", {0, 8, 14, 20})) << "layer 0 has none";
  EXPECT_TRUE(refused("kv_source_layer_ids", {2, 2, 8, 14, 20}));
  EXPECT_TRUE(refused("kv_source_layer_ids", {2, 8, 14, 40}));
  EXPECT_TRUE(refused("engram_layer_ids", {1}));
  EXPECT_TRUE(refused("compress_ratios", {0, 0, 2}));
  EXPECT_TRUE(refused("head_dim", 65536) || refused("num_attention_heads", 65536)) << "together too wide";
  Json v3 = config_of("deepseek_v3");
  v3["first_k_dense_replace"] = 61;
  EXPECT_FALSE(deepseek_v3::planned(v3)) << "no layer has experts";
}

}  // namespace
}  // namespace thermocline
