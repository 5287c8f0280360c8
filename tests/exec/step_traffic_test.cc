// What a step says of its bytes and seconds, part by part: kinds of weights, layers, the head.
#include "tests/support/models.h"

namespace thermocline {
namespace {

using cpu::TrafficByKind;
using cpu::WeightKind;

/// What one token reads of each kind, from the weights themselves. The indexer's two matrices are not read while every
/// row is selected anyway.
TrafficByKind expected_bytes(const Engine& engine) {
  const ModelGeometry& g = engine.geometry();
  const deepseek_v4::Weights& weights = engine.weights();
  TrafficByKind kinds{};
  const auto add = [&](WeightKind kind, int64_t bytes) {
    kinds[static_cast<size_t>(kind)].bytes += static_cast<uint64_t>(bytes);
  };
  const auto add_matrix = [&](const cpu::PackedMatrix& m, int64_t times = 1) {
    add(cpu::weight_kind(m.format), times * m.bytes());
  };
  const auto add_expert = [&](const cpu::ExpertWeights& e, int64_t times) {
    for (const cpu::PackedMatrix* m : {&e.w1, &e.w3, &e.w2}) add_matrix(*m, times);
  };
  for (const auto& layer : weights.layers) {
    for (const cpu::PackedMatrix* m :
         {&layer.wq_a, &layer.wq_b, &layer.wkv, &layer.wo_a, &layer.wo_b, &layer.compressor.wkv,
          &layer.compressor.wgate, &layer.index_compressor.wkv, &layer.index_compressor.wgate, &layer.gate})
      add_matrix(*m);
    add_expert(layer.experts[0], g.n_activated_experts);
    add_expert(layer.shared_expert, 1);
    add(WeightKind::other, 4 * 2 * g.hc_outputs() * g.hc_mult * g.dim);
  }
  add(WeightKind::head, weights.head.bytes() + 4 * g.hc_mult * g.hc_mult * g.dim);
  return kinds;
}

TEST(StepTraffic, BytesByKindAreThoseOfTheWeights) {
  for (const auto& [threads, topology] :
       {std::pair(1, ""), std::pair(2, ""), std::pair(3, "node:2 core:2 pu:1"), std::pair(4, "node:4 core:1 pu:1")}) {
    const auto engine = test::open_engine({.threads = threads, .topology = topology});
    auto sequence = engine->driver().new_sequence().value();
    ASSERT_TRUE(engine->driver().prefill(*sequence, std::vector<int32_t>{0, 5, 9, 17}).ok());
    ASSERT_TRUE(engine->driver().decode(*sequence, 3).ok());
    const cpu::WeightTraffic& traffic = engine->step().traffic();
    const TrafficByKind expected = expected_bytes(*engine);
    uint64_t sum = 0;
    double seconds = 0;
    for (size_t kind = 0; kind < expected.size(); ++kind) {
      const cpu::KindTraffic& got = traffic.kinds()[kind];
      EXPECT_EQ(got.bytes, expected[kind].bytes) << cpu::kWeightKindNames[kind] << ", " << threads << " threads";
      EXPECT_GT(got.bytes, 0u) << cpu::kWeightKindNames[kind];
      EXPECT_GT(got.seconds, 0) << cpu::kWeightKindNames[kind];
      sum += got.bytes;
      seconds += got.seconds;
    }
    EXPECT_EQ(sum, traffic.total_bytes()) << "the workers count what the driving thread expects";
    EXPECT_NEAR(seconds, traffic.seconds(), 1e-9);
  }
}

TEST(StepTraffic, LayersAndHeadAreTimedApart) {
  const auto engine = test::open_engine({});
  const auto sequence = engine->driver().new_sequence().value();
  SequenceKv* const kv = sequence.get();
  const std::vector<int32_t> ids = {0, 5, 9, 17};
  const auto step = [&](bool with_logits) {
    sched::Batch batch;
    batch.add(0, kv->length(), ids.data(), static_cast<int64_t>(ids.size()));
    if (with_logits) batch.logit_rows = {3};
    return engine->step().run({batch, std::span(&kv, 1)}).value();
  };
  for (const bool with_logits : {true, false}) {
    const StepReport report = step(with_logits);
    ASSERT_EQ(static_cast<int>(report.layer_ns.size()), engine->geometry().n_layers);
    double layers = 0;
    for (const double ns : report.layer_ns) {
      EXPECT_GT(ns, 0);
      layers += ns;
    }
    const double head = report.time[sched::Phase::head];
    const cpu::KindTraffic& read = engine->step().traffic().kinds()[static_cast<size_t>(WeightKind::head)];
    EXPECT_LE(layers + head, report.time.total);
    EXPECT_LE(read.seconds * 1e9, head);
    EXPECT_EQ(read.bytes > 0, with_logits);
  }
}

}  // namespace
}  // namespace thermocline
