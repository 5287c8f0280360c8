// The cost model against arithmetic that was done by hand: the sizes of both models, and the roofs of three boxes with
// every efficiency at 1 (spec/scheduler.md 4.3).
#include "scheduler/cost/cost_model.h"
#include "scheduler/cost/correction.h"

#include <gtest/gtest.h>

#include <cmath>

#include "runtime/engine/model_costs.h"
#include "runtime/engine/planned_model.h"
#include "runtime/model/deepseek_v4/synthesize.h"

namespace thermocline::sched {
namespace {

ModelCosts costs_of(const std::string& model) { return model_costs(deepseek_v4::published_geometry(model, 0).value()); }

// A box of two memories, as wide as it says and no computation that takes longer.
MachineProfile box(double gpu_bytes_per_second, double cpu_bytes_per_second) {
  constexpr double kNoBound = 1e30;
  MachineProfile box;
  GpuProfile gpu;
  for (KernelCurve& curve : gpu.weights) curve = KernelCurve::roof(gpu_bytes_per_second, kNoBound, 1);
  for (KernelCurve& curve : box.cpu.weights) curve = KernelCurve::roof(cpu_bytes_per_second, kNoBound, 1);
  gpu.attention_flops = gpu.index_ops = gpu.bytes_per_second = kNoBound;
  gpu.h2d_bytes_per_second = 52e9;
  gpu.sync_ns = 25e3;
  box.gpus.push_back(gpu);
  return box;
}

TEST(ModelCosts, AreThoseOfTheSpec) {
  const ModelCosts flash = costs_of("v4-flash"), pro = costs_of("v4-pro");
  EXPECT_NEAR(flash.expert_bytes, 13.37e6, 0.01e6);
  EXPECT_NEAR(pro.expert_bytes, 35.09e6, 0.01e6);
  EXPECT_NEAR(flash.routed_bytes(), 147.2e9, 0.1e9);
  EXPECT_NEAR(pro.routed_bytes(), 822.1e9, 0.5e9);
  EXPECT_NEAR(flash.dense_bytes(), 7.77e9, 0.05e9);
  EXPECT_NEAR(pro.dense_bytes(), 26.8e9, 0.2e9);
  EXPECT_NEAR(flash.kv_bytes_per_token(), 3510, 60) << "592 bytes a row instead of 584";
  EXPECT_NEAR(pro.kv_bytes_per_token(), 5030, 80);
  EXPECT_NEAR(flash.unique_experts(8), 44.2, 0.1);
  EXPECT_NEAR(pro.unique_experts(32), 152.0, 0.1);
  EXPECT_EQ(flash.layers[2].topk, 512);
  EXPECT_TRUE(flash.layers[2].hash_routed);
  EXPECT_EQ(flash.layers[2].keys(2048), 0) << "all 512 rows are selected anyway";
  EXPECT_EQ(flash.layers[2].keys(8192), 2048);
}

TEST(CostModel, RoofsOfTheSpec) {
  struct Row {
    const char* model;
    double gpu, cpu, g, h, n, tokens_per_second;
  };
  constexpr double kH100 = 2850e9, k5090 = 1520e9, k4090 = 860e9;
  const Row rows[] = {
      {"v4-flash", kH100, 610e9, 0, 0, 1, 106},
      {"v4-flash", kH100, 610e9, 0, 0, 8, 176},
      {"v4-flash", kH100, 610e9, 0.43, 0.43, 1, 142},
      {"v4-flash", kH100, 610e9, 0.43, 0.75, 1, 192},
      {"v4-flash", kH100, 610e9, 0.43, 0.75, 8, 544},
      {"v4-flash", kH100, 610e9, 0.43, 0.75, 32, 753},
      {"v4-flash", kH100, 610e9, 0.43, 0.75, 128, 1214},
      {"v4-flash", kH100, 610e9, 0.43, 0.90, 1, 204},
      {"v4-flash", kH100, 610e9, 0.43, 0.90, 8, 717},
      {"v4-flash", k5090, 490e9, 0, 0, 1, 76},
      {"v4-flash", k5090, 490e9, 0.12, 0.50, 1, 103},
      {"v4-flash", k5090, 490e9, 0.12, 0.50, 8, 242},
      {"v4-flash", k5090, 490e9, 0.12, 0.65, 32, 429},
      {"v4-flash", k4090, 75e9, 0.076, 0.40, 1, 27},
      {"v4-flash", k4090, 75e9, 0.076, 0.40, 8, 36},
      {"v4-flash", k4090, 75e9, 0.076, 0.40, 128, 81},
      {"v4-pro", kH100, 610e9, 0, 0, 1, 31},
      {"v4-pro", kH100, 610e9, 0.05, 0.30, 8, 64},
      {"v4-pro", kH100, 610e9, 0.05, 0.40, 128, 137},
      {"v4-pro", k5090, 490e9, 0, 0, 32, 47},
  };
  const ModelCosts flash = costs_of("v4-flash"), pro = costs_of("v4-pro");
  for (const Row& row : rows) {
    const MachineProfile machine = box(row.gpu, row.cpu);
    const CostModel model(row.model == std::string("v4-pro") ? pro : flash, machine);
    const StepTime t = model.step({.tokens = row.n, .resident = row.g, .hits = row.h});
    // The spec's roof hands over at every layer; ours only where something is missing.
    const double ns = t.total - t[Phase::handover] + model.model().layer_count() * model.handover_ns();
    EXPECT_NEAR(1e9 * row.n / ns / row.tokens_per_second, 1, 0.05)
        << row.model << " at " << row.gpu / 1e9 << " GB/s, h = " << row.h << ", n = " << row.n;
  }
}

TEST(CostModel, ElementsAndRegionsComeOnTopOfTheWeights) {
  const ModelCosts flash = costs_of("v4-flash");
  MachineProfile machine = box(1e12, 1e11);
  machine.gpus.clear();
  machine.cpu.attention_flops_one = machine.cpu.attention_flops_many = 1e12;
  const double before = CostModel(flash, machine).dense_ns(0, 9);
  machine.cpu.region_ns = 1000;
  machine.cpu.streams = {0.5, 0.125};
  machine.cpu.rows = {0.25, 0.0625};
  const LayerCosts& layer = flash.layers[0];
  EXPECT_EQ(layer.stream_elements, 2 * 4 * 4096);
  EXPECT_NEAR(CostModel(flash, machine).dense_ns(0, 9) - before,
              1000 * layer.regions + 1.5 * layer.stream_elements + 0.75 * layer.row_elements, 1e-3);
}

// A step of parts that are alike is the step of all their tokens; what differs is attended to apart.
TEST(CostModel, PartsOfAStepAddUp) {
  const ModelCosts flash = costs_of("v4-flash");
  MachineProfile machine = box(1e12, 1e11);
  machine.gpus.clear();
  machine.cpu.attention_flops_one = machine.cpu.attention_flops_many = machine.cpu.index_ops_one =
      machine.cpu.index_ops_many = 1e12;
  const CostModel model(flash, machine);
  const StepTime together = model.step({.tokens = 4, .context = 5000});
  const StepPart one{.tokens = 1, .context = 5000}, three{.tokens = 3, .context = 5000};
  const StepTime apart = model.step(std::array{one, three}, model.expected_load(4, 0, 0), 4);
  EXPECT_NEAR(apart.total / together.total, 1, 1e-12);
  const StepPart longer{.tokens = 3, .context = 500'000};
  const StepTime mixed = model.step(std::array{one, longer}, model.expected_load(4, 0, 0), 0);
  EXPECT_EQ(mixed[Phase::head], 0) << "nobody asked for logits";
  EXPECT_GT(apart[Phase::head], 0);
  EXPECT_GT(mixed[Phase::attention], apart[Phase::attention]);
  EXPECT_EQ(mixed[Phase::experts_cpu], apart[Phase::experts_cpu]);
  double sum = 0;
  for (const double ns : mixed.phases) sum += ns;
  EXPECT_NEAR(sum / mixed.total, 1, 1e-12) << "on a CPU nothing hides behind anything";
}

TEST(CostModel, FewerExpertsThanExpectedTakeLess) {
  const ModelCosts flash = costs_of("v4-flash");
  MachineProfile machine = box(1e12, 1e11);
  machine.gpus.clear();
  machine.cpu.attention_flops_one = machine.cpu.attention_flops_many = 1e12;
  const CostModel model(flash, machine);
  const StepPart part{.tokens = 8};
  const ExpertLoad expected = model.expected_load(8, 0, 0);
  EXPECT_NEAR(expected.missed, flash.unique_experts(8), 1e-9);
  EXPECT_EQ(expected.missed_pairs, 48);
  const StepTime uniform = model.step({&part, 1}, expected, 8),
                 same = model.step({&part, 1}, {.missed = 6, .missed_pairs = 48}, 8);
  const double shared = flash.layer_count() * model.shared_ns(0, 8);
  EXPECT_GT(shared, 0);
  EXPECT_LT(same[Phase::experts_cpu] - shared, 0.5 * (uniform[Phase::experts_cpu] - shared));
  EXPECT_EQ(same[Phase::dense], uniform[Phase::dense]);
}

StepTime of(double dense, double experts) {
  StepTime t;
  t[Phase::dense] = dense;
  t[Phase::experts_cpu] = experts;
  t.total = dense + experts;
  return t;
}

TEST(Correction, LearnsEachPhaseAndStaysWithinItsBounds) {
  Correction c;
  EXPECT_EQ(c.factor(Phase::dense), 1);
  c.observe(of(100, 100), of(110, 300));
  EXPECT_NEAR(c.factor(Phase::dense), 1.1, 1e-12) << "the first step is all there is";
  EXPECT_NEAR(c.ratio(Phase::experts_cpu), 3, 1e-12);
  EXPECT_EQ(c.factor(Phase::experts_cpu), Correction::kMost);
  const StepTime corrected = c.corrected(of(100, 100));
  EXPECT_NEAR(corrected[Phase::dense], 110, 1e-9);
  EXPECT_NEAR(corrected.total, 260, 1e-9);
  for (int i = 0; i < 1000; ++i) c.observe(of(100, 100), of(10, 100));
  EXPECT_EQ(c.factor(Phase::dense), Correction::kLeast);
  EXPECT_NEAR(c.factor(Phase::experts_cpu), 1, 1e-6);
  EXPECT_EQ(c.factor(Phase::attention), 1) << "never measured";
}

TEST(Correction, OneOddStepIsNoTrend) {
  Correction c;
  for (int i = 0; i < 100; ++i) c.observe(of(100, 100), of(100, 100));
  c.observe(of(100, 100), of(1000, 100));
  EXPECT_LT(c.factor(Phase::dense), 1.1);
}

TEST(Correction, AlarmsWhenAPhaseStaysOff) {
  Correction c;
  for (int i = 0; i < Correction::kAlarmSteps - 1; ++i) c.observe(of(100, 100), of(150, 110));
  EXPECT_FALSE(c.alarmed(Phase::dense));
  c.observe(of(100, 100), of(150, 110));
  EXPECT_TRUE(c.alarmed(Phase::dense));
  EXPECT_FALSE(c.alarmed(Phase::experts_cpu)) << "10 % are nothing to wake anybody for";
  for (int i = 0; i < 200; ++i) c.observe(of(100, 100), of(100, 110));
  EXPECT_FALSE(c.alarmed(Phase::dense));
}

TEST(CostModel, LayersWithoutExpertsTakeNoTimeForThem) {
  ModelCosts m;
  m.experts = 16;
  m.experts_per_token = 2;
  m.expert_bytes = 1e6;
  m.layers.resize(3);
  for (LayerCosts& layer : m.layers) layer.dense_bytes = {10e6, 0, 0};
  m.layers[0].routed = false;
  MachineProfile machine = box(1000e9, 100e9);
  EXPECT_EQ(m.routed_layer_count(), 2);
  EXPECT_EQ(m.routed_bytes(), 2 * 16e6);
  // 0.01 ms a layer; of two experts a layer one is missing, 0.01 ms, and the layer is handed over, 0.025.
  const StepTime half = CostModel(m, machine).step({.tokens = 1, .resident = 0.5, .hits = 0.5});
  EXPECT_NEAR(half.total / 1e6, 3 * 0.01 + 2 * (0.01 + 0.75 * 0.025), 1e-9);
  machine.gpus.clear();
  machine.cpu.attention_flops_one = machine.cpu.index_ops_one = 1e30;
  EXPECT_NEAR(CostModel(m, machine).step({.tokens = 1}).total / 1e6, 3 * 0.1 + 2 * 0.02, 1e-9);
}

// 58 layers miss 8 experts of 44.05 MB each at 610 GB/s; 17.2 GB of dense weights at 2850.
TEST(CostModel, RoofOfV3) {
  const ModelCosts v3 = planned_model("v3").value().costs;
  const MachineProfile machine = box(2850e9, 610e9);
  const StepTime t = CostModel(v3, machine).step({.tokens = 1});
  EXPECT_NEAR((t.total - t[Phase::handover]) / 1e6, 58 * 8 * 44.05e6 / 610e6 + 17.23e9 / 2850e6, 0.1);
}

TEST(CostModel, APromptsAttentionMayTakeAnotherForm) {
  ModelCosts m;
  LayerCosts layer;
  layer.ratio = 1;
  layer.heads = 8;
  layer.head_dim = 544;
  layer.prefill_head_dim = 192;
  m.layers.push_back(layer);
  MachineProfile machine = box(1e12, 1e11);
  machine.gpus[0].attention_flops = 1e12;
  const CostModel cost(m, machine);
  EXPECT_NEAR(cost.attention_ns(0, 1, 1000, false), 4 * 1000 * 8 * 544 / 1e3, 1e-6);
  EXPECT_NEAR(cost.attention_ns(0, 1, 1000, true), 4 * 1000 * 8 * 192 / 1e3, 1e-6);
}

TEST(CostModel, ATableOnADiskCostsAPageARow) {
  ModelCosts m;
  m.table_bytes = 1e9;
  m.table_reads_per_token = 48;
  MachineProfile machine = box(1e12, 1e11);
  EXPECT_EQ(CostModel(m, machine).table_ns(1), 0) << "no disk";
  machine.disk.read_bytes_per_second = 4e9;
  const CostModel cost(m, machine);
  EXPECT_NEAR(cost.table_ns(10), 100'000 + 10 * 48 * 1024, 1e-6);
  EXPECT_EQ(cost.step({.tokens = 10, .table_on_disk = true}).total, cost.table_ns(10));
  EXPECT_EQ(cost.step({.tokens = 10}).total, 0);
}

TEST(KernelCurve, IsLogLinearBetweenItsPoints) {
  const KernelCurve roof = KernelCurve::roof(100e9, 1e12, 4);
  EXPECT_DOUBLE_EQ(roof.ns_per_byte(1), 0.01);
  EXPECT_DOUBLE_EQ(roof.ns_per_byte(0.5), 0.01);
  EXPECT_DOUBLE_EQ(roof.ns_per_byte(512), 512 * 4e-3);
  EXPECT_DOUBLE_EQ(roof.ns_per_byte(1024), 1024 * 4e-3) << "in proportion beyond the last";
  EXPECT_NEAR(roof.ns_per_byte(std::sqrt(256.0 * 512)), std::sqrt(256.0 * 512) * 4e-3, 1e-12);
}

}  // namespace
}  // namespace thermocline::sched
