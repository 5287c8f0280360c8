// The arithmetic of `bench step`: parts of a step, bounds with and without the head, projections to a whole model.
#include "runtime/cli/bench_step_rows.h"

#include <gtest/gtest.h>

#include "runtime/model/deepseek_v4/synthesize.h"

namespace thermocline::cli {
namespace {

using cpu::WeightKind;
using deepseek_v4::published_geometry;

ModelGeometry flash(int layers, int experts = 0) { return published_geometry("v4-flash", layers, experts).value(); }

// Layers of 2, 4 and 9 ms, 5 ms around them, a head of 20 ms; GB/s and GFLOP/s are 1 each.
StepSample sample_of_40_ms() {
  StepSample sample;
  sample.seconds = 40e-3;
  sample.head_seconds = 20e-3;
  sample.layer_seconds = {2e-3, 4e-3, 9e-3};
  sample.kinds[static_cast<size_t>(WeightKind::fp4)] = {6'000'000, 8e-3};
  sample.kinds[static_cast<size_t>(WeightKind::bf16)] = {2'000'000, 4e-3};
  sample.kinds[static_cast<size_t>(WeightKind::head)] = {12'000'000, 16e-3};
  sample.peaks = {.read_bandwidth = 1e9, .flops = 1e9, .int8_ops = 1e9};
  return sample;
}

StepRow decode_row() {
  StepRow row{"decode", 2};  // tokens
  row.samples = {sample_of_40_ms()};
  return row;
}

TEST(BenchStep, StepsAddUpByPart) {
  cpu::WeightTraffic traffic(1, 1);
  const std::vector<double> layer_ns = {2e6, 3e6};
  StepReport report;
  report.time[sched::Phase::head] = 4e6;
  report.layer_ns = layer_ns;
  StepSample sample;
  for (int step = 0; step < 2; ++step) {
    {
      cpu::WeightTraffic::Timer timer(&traffic);
      timer.reads(WeightKind::fp8, 70);
      timer.reads(WeightKind::head, 30);
    }
    sample.add(report, traffic);
    traffic.reset();
  }
  EXPECT_DOUBLE_EQ(sample.head_seconds, 8e-3);
  EXPECT_EQ(sample.layer_seconds, (std::vector<double>{4e-3, 6e-3}));
  EXPECT_EQ(sample.bytes_of(StepPart::whole), 200);
  EXPECT_EQ(sample.bytes_of(StepPart::layers), 140);
  EXPECT_GT(sample.kinds[static_cast<size_t>(WeightKind::fp8)].seconds, 0);
}

TEST(BenchStep, LayersTakeAllButTheHead) {
  const StepSample sample = sample_of_40_ms();
  EXPECT_DOUBLE_EQ(sample.seconds_of(StepPart::layers), 20e-3);
  const std::vector<double> layers = sample.whole_layer_seconds();
  EXPECT_NEAR(layers[0] + layers[1] + layers[2], 20e-3, 1e-12) << "what is around them is theirs";
  EXPECT_NEAR(layers[2] / layers[0], 4.5, 1e-9);
}

TEST(BenchStep, TheBoundLeavesOutTheHeadOnBothSides) {
  StepRow row = decode_row();
  // 20 MB take 20 ms of 40, 8 MB take 8 of 20.
  EXPECT_DOUBLE_EQ(row.share_of_bound(StepPart::whole), 0.5);
  EXPECT_DOUBLE_EQ(row.share_of_bound(StepPart::layers), 0.4);
  EXPECT_DOUBLE_EQ(row.bound_tokens_per_second(StepPart::whole), 100);
  EXPECT_DOUBLE_EQ(row.bound_tokens_per_second(StepPart::layers), 250);
  EXPECT_DOUBLE_EQ(row.tokens_per_second(StepPart::whole), 50);
  EXPECT_DOUBLE_EQ(row.tokens_per_second(StepPart::layers), 100);
  EXPECT_DOUBLE_EQ(row.bytes_per_token(StepPart::layers), 4e6);
  EXPECT_DOUBLE_EQ(row.head_share_of_bytes(), 0.6);
  // 32 M multiply-adds take 64 ms, 22 of them are the head's.
  row.macs = 16e6;
  row.head_macs = 11e6;
  EXPECT_DOUBLE_EQ(row.share_of_bound(StepPart::whole), 0.8);
  EXPECT_DOUBLE_EQ(row.share_of_bound(StepPart::layers), 0.5);
  row.kv = {.bytes = 1e6, .flops = 2e6, .int8_ops = 1e6};  // 3 ms a token on top
  EXPECT_DOUBLE_EQ(row.share_of_bound(StepPart::layers), 16.0 / 20);
}

TEST(BenchStep, TheMiddleRepetitionIsShown) {
  StepRow row = decode_row();
  for (const double seconds : {80e-3, 50e-3, 60e-3}) {
    row.samples.push_back(sample_of_40_ms());
    row.samples.back().seconds = seconds;
  }
  EXPECT_DOUBLE_EQ(row.middle().seconds, 60e-3) << "of two the slower";
  row.samples.pop_back();
  EXPECT_DOUBLE_EQ(row.middle().seconds, 50e-3);
  EXPECT_DOUBLE_EQ(row.share_of_bound(StepPart::whole), 0.4);
}

TEST(BenchStep, KindsHaveTheirOwnRates) {
  const std::vector<KindRow> rows = kind_rows(decode_row(), StepPart::whole);
  ASSERT_EQ(rows.size(), 3u) << "kinds that nobody read are left out";
  EXPECT_STREQ(rows[0].name(), "FP4 experts");
  EXPECT_DOUBLE_EQ(rows[0].bytes, 3e6);
  EXPECT_DOUBLE_EQ(rows[0].seconds, 4e-3);
  EXPECT_DOUBLE_EQ(rows[0].share_of_stream, 0.75);
  EXPECT_STREQ(rows[2].name(), "head");
  EXPECT_EQ(kind_rows(decode_row(), StepPart::layers).size(), 2u);
}

TEST(DepthProjection, SlicesOfPublishedModelsKnowTheirDepth) {
  const WholeModel whole = whole_model(flash(3), 0).value().value();
  EXPECT_EQ(whole.layers, 43);
  EXPECT_EQ(std::count(whole.kinds.begin(), whole.kinds.end(), LayerKind::swa), 2);
  EXPECT_EQ(std::count(whole.kinds.begin(), whole.kinds.end(), LayerKind::csa), 21);
  EXPECT_EQ(std::count(whole.kinds.begin(), whole.kinds.end(), LayerKind::hca), 20);
  EXPECT_EQ(whole_model(flash(3, 48), 0).value().value().routed_experts, 256);
  EXPECT_EQ(whole_model(published_geometry("v4-pro", 2).value(), 0).value().value().layers, 61);
  EXPECT_FALSE(whole_model(flash(43), 0).value()) << "whole";
  ModelGeometry other = flash(3);
  other.moe_inter_dim /= 2;
  EXPECT_FALSE(whole_model(other, 0).value()) << "of no known model";
  other = flash(3);
  other.compress_ratios[1] = 128;
  EXPECT_FALSE(whole_model(other, 0).value());
}

TEST(DepthProjection, TheDepthMayBeGiven) {
  EXPECT_EQ(whole_model(flash(3), 5).value().value().kinds.size(), 5u);
  EXPECT_TRUE(whole_model(flash(3), 44).value().value().kinds.empty()) << "deeper than the published one";
  EXPECT_EQ(whole_model(flash(43), 50).value().value().layers, 50);
  EXPECT_FALSE(whole_model(flash(3), 3).value()) << "it is whole, then";
  for (const int layers : {-1, 1, 2, 4097}) {
    const auto refused = whole_model(flash(3), layers);
    ASSERT_FALSE(refused) << layers;
    EXPECT_EQ(refused.error().code, ErrorCode::invalid_argument);
  }
}

TEST(DepthProjection, EveryKindOfLayerTakesItsOwnMean) {
  const ModelGeometry slice = flash(4);  // SWA, SWA, CSA, HCA
  const std::vector<double> layers = {1e-3, 3e-3, 5e-3, 4e-3};
  const DepthProjection p = project_depth(slice, layers, 36e-3, whole_model(slice, 0).value().value());
  EXPECT_DOUBLE_EQ(p.seconds(), 2 * 2e-3 + 21 * 5e-3 + 20 * 4e-3 + 36e-3);
  EXPECT_EQ(p.formula(), "2 SWA x 2.000 ms + 21 CSA x 5.000 ms + 20 HCA x 4.000 ms + head 36.000 ms = 225.000 ms");
  EXPECT_EQ(p.caveat(), "");
  EXPECT_DOUBLE_EQ(project_depth(slice, layers, {}, whole_model(slice, 0).value().value()).seconds(), 189e-3);
  EXPECT_DOUBLE_EQ(
      project_depth(slice, layers, 36e-3,
                    {.layers = 4, .kinds = {LayerKind::swa, LayerKind::swa, LayerKind::csa, LayerKind::hca}})
          .seconds(),
      1e-3 + 3e-3 + 5e-3 + 4e-3 + 36e-3)
      << "its own depth gives what was measured";
}

TEST(DepthProjection, TheMeanStandsForWhatTheSliceHasNot) {
  const ModelGeometry slice = flash(3);
  const std::vector<double> layers = {1e-3, 3e-3, 5e-3};
  const DepthProjection p = project_depth(slice, layers, 1e-3, whole_model(slice, 0).value().value());
  EXPECT_DOUBLE_EQ(p.terms[2].seconds, 3e-3);
  EXPECT_FALSE(p.terms[2].measured);
  EXPECT_EQ(p.caveat(), "HCA: none here, the mean of all layers");
  const DepthProjection plain = project_depth(slice, layers, {}, {.layers = 50});
  EXPECT_EQ(plain.formula(), "50 layers x 3.000 ms = 150.000 ms");
}

TEST(DepthProjection, OfARowItIsOfAToken) {
  StepRow row = decode_row();
  const ModelGeometry slice = flash(3);
  const WholeModel whole = whole_model(slice, 0).value().value();
  const DepthProjection p = project_row(row, StepPart::whole, slice, whole);
  const double unit = 20e-3 / 15 / 2;  // 15 ms of layers stand for 20, for two tokens
  EXPECT_NEAR(p.terms[0].seconds, 3 * unit, 1e-12);
  EXPECT_NEAR(p.terms[1].seconds, 9 * unit, 1e-12);
  EXPECT_DOUBLE_EQ(p.head_seconds.value(), 10e-3);
  EXPECT_FALSE(project_row(row, StepPart::layers, slice, whole).head_seconds);
}

TEST(DepthProjection, FewerExpertsAreEnoughForOneTokenAStep) {
  StepRow row = decode_row();
  const ModelGeometry slice = flash(3, 48);
  const WholeModel whole = whole_model(slice, 0).value().value();
  EXPECT_EQ(not_projected(row, slice, whole), "");
  row.step_tokens = 8;
  EXPECT_EQ(not_projected(row, slice, whole), "8 tokens a step choose among 48 experts a layer, not 256");
  EXPECT_EQ(not_projected(row, flash(3), whole), "");
  EXPECT_EQ(not_projected(row, slice, {.layers = 50}), "") << "nothing is known of its experts";
}

}  // namespace
}  // namespace thermocline::cli
