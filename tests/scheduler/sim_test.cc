// The simulator: virtual time, devices that share a memory, and boxes whose steps can be computed by hand.
#include "scheduler/sim/simulator.h"

#include <gtest/gtest.h>

#include <numeric>

#include "scheduler/sim/serving.h"
#include "scheduler/trace/synthetic.h"

namespace thermocline::sched {
namespace {

constexpr double kMs = 1e6;

// Two layers of 16 experts of 1 MB; a GPU of 1000 MB/ms, a CPU of 100, a bus of 500.
ModelCosts model() {
  ModelCosts m;
  m.experts = 16;
  m.experts_per_token = 2;
  m.expert_bytes = 1e6;
  m.head_bytes = 0;
  for (int i = 0; i < 2; ++i) {
    LayerCosts layer;
    layer.dense_bytes = {10e6, 0, 0};
    m.layers.push_back(layer);
  }
  return m;
}

MachineProfile box(bool gpu = true) {
  MachineProfile box;
  for (KernelCurve& curve : box.cpu.weights) curve = KernelCurve::roof(100e9, 1e30, 1);
  box.cpu.attention_flops_one = box.cpu.attention_flops_many = box.cpu.index_ops_one = box.cpu.index_ops_many = 1e30;
  if (!gpu) return box;
  GpuProfile g;
  for (KernelCurve& curve : g.weights) curve = KernelCurve::roof(1000e9, 1e30, 1);
  g.attention_flops = g.index_ops = g.bytes_per_second = 1e30;
  g.h2d_bytes_per_second = 500e9;
  g.cpu_read_share_beside_h2d = 0.5;
  box.gpus.push_back(g);
  return box;
}

SimBox::StepTokens one_token(std::vector<std::vector<int>> experts) {
  SimBox::StepTokens step;
  step.tokens = 1;
  for (const std::vector<int>& layer : experts) {
    step.counts.emplace_back(16);
    for (const int e : layer) ++step.counts.back()[static_cast<size_t>(e)];
  }
  return step;
}

// Of two layers of two experts each none is in memory: a read takes 1 ms. The second layer's are asked for while the
// first one's come; the wrong one is given up, the right one is waited for.
TEST(Simulator, ReadsAheadOfTheRouter) {
  const ModelCosts m = model();
  MachineProfile machine = box();
  machine.disk.read_bytes_per_second = 1e9;
  const CostModel cost(m, machine);
  const auto time = [&](int read_ahead, std::vector<uint16_t> asked) {
    SimOptions o{.slots = 0, .ram_experts = 1.0 / 32, .staging = "router", .read_ahead = read_ahead};
    const auto sim = SimBox::create(cost, o).value();
    SimBox::StepTokens step = one_token({{14, 15}, {12, 13}});
    step.asked[0].resize(2);
    for (const uint16_t e : asked) step.asked[0][1].push_back({e, 0});
    return sim->step(step, true) / kMs;
  };
  const double without = time(0, {12, 13});
  EXPECT_NEAR(without, 4.08, 0.03) << "four reads, 0.08 of everything else";
  EXPECT_LT(time(2, {12, 13}), without - 0.02) << "the disk goes on while the first layer is computed";
  EXPECT_NEAR(time(2, {1, 2}), without, 0.005) << "wrong guesses are in nobody's way";
  EXPECT_FALSE(SimBox::create(cost, {.read_ahead = 1})) << "somebody has to guess";
}

// Guesses have no weight; what a file says there makes nobody guess an expert twice, and no read count twice.
TEST(Simulator, WeightsOfGuessesMeanNothing) {
  const ModelCosts m = model();
  MachineProfile machine = box();
  machine.disk.read_bytes_per_second = 1e9;
  const auto run = [&](uint16_t weight) {
    Trace trace({.model = "m", .layers = 2, .experts = 16, .top_k = 2, .guesses = 2});
    for (uint32_t step = 0; step < 20; ++step)
      for (uint32_t request = 0; request < 2; ++request) {
        const uint16_t e = static_cast<uint16_t>(3 * step % 12), w = static_cast<uint16_t>(weight * request);
        const TracePick nobody{TracePick::kNobody, 0}, a{e, 0}, b{static_cast<uint16_t>(e + 1), 0},
            c{static_cast<uint16_t>(e + 2 + request), 0};
        const TracePick picks[] = {a, b, nobody, nobody, nobody, nobody, a, c, {e, w}, {b.expert, w}, nobody, nobody};
        trace.add({.step = step, .request = request, .position = step, .phase = TracePhase::decode}, picks);
      }
    return simulate({m, machine}, trace, {.slots = 0, .ram_experts = 1.0 / 32, .staging = "router", .read_ahead = 4})
        .value();
  };
  const SimReport none = run(0), some = run(1);
  EXPECT_GT(none.read_ahead, 0);
  EXPECT_EQ(some.read_ahead, none.read_ahead);
  EXPECT_EQ(some.disk_bytes, none.disk_bytes);
  EXPECT_EQ(some.total_ns, none.total_ns);
}

TEST(EventQueue, RunsByTimeThenInOrder) {
  EventQueue events;
  std::string order;
  events.at(2, [&] { order += 'c'; });
  events.at(1, [&] {
    order += 'a';
    events.after(0, [&] { order += 'b'; });
  });
  events.at(2, [&] { order += 'd'; });
  while (events.step()) {
  }
  EXPECT_EQ(order, "abcd");
  EXPECT_EQ(events.now(), 2);
}

TEST(Devices, CopiesSlowTheCpuWhileTheyRun) {
  EventQueue events;
  Devices devices(events, box(), 0, 1, {});
  double cpu_end = 0;
  devices.submit(Engine::cpu, 10, "", [&] { cpu_end = events.now(); });
  devices.submit(Engine::h2d, 8, "", [] {});
  while (events.step()) {
  }
  EXPECT_DOUBLE_EQ(cpu_end, 14) << "8 at half speed, 6 at full speed";
  devices.settle();
  EXPECT_DOUBLE_EQ(devices.busy_ns(Engine::h2d), 8);
  EXPECT_DOUBLE_EQ(devices.overlap_ns(), 8);
}

TEST(Devices, AFaultSlowsItsEngineForItsTime) {
  EventQueue events;
  Devices devices(events, box(), 0, 1, {{Engine::gpu, 5, 15, 0.5}});
  double end = 0;
  devices.submit(Engine::gpu, 20, "", [&] { end = events.now(); });
  while (events.step()) {
  }
  EXPECT_DOUBLE_EQ(end, 25);
}

TEST(Devices, UrgentOperationsGoBeforeThoseThatWait) {
  EventQueue events;
  Devices devices(events, box(), 0, 1, {});
  std::string order;
  devices.submit(Engine::h2d, 1, "", [&] { order += 'a'; });
  devices.submit(Engine::h2d, 1, "", [&] { order += 'c'; });
  devices.submit(
      Engine::h2d, 1, "", [&] { order += 'b'; }, true);
  while (events.step()) {
  }
  EXPECT_EQ(order, "abc");
}

TEST(SimBox, AStepIsItsArithmetic) {
  const ModelCosts m = model();
  const MachineProfile machine = box(), no_gpu = box(false);
  const CostModel cost(m, machine), cpu_only(m, no_gpu);
  const SimBox::StepTokens step = one_token({{0, 15}, {0, 1}});
  // 10 MB dense + 2 experts a layer from memory at 100 MB/ms.
  auto cpu_box = SimBox::create(cpu_only, {.policy = "static"}).value();
  EXPECT_NEAR(cpu_box->step(step, true), 2 * 0.12 * kMs, 1);
  // 0.01 ms dense; layer 0 misses expert 15: 0.01 ms on the CPU beside 0.001 on the device; layer 1 hits both.
  auto hybrid = SimBox::create(cost, {.policy = "static", .slots = 4}).value();
  EXPECT_NEAR(hybrid->step(step, true), (0.01 + 0.01) * kMs + (0.01 + 0.002) * kMs, 1);
  const SimReport report = hybrid->report();
  EXPECT_EQ(report.hits, 3);
  EXPECT_EQ(report.pairs, 4);
  EXPECT_EQ(report.zero_miss_layers, 1);
  EXPECT_NEAR(report.busy_ns[static_cast<size_t>(Engine::cpu)], 0.01 * kMs, 1);
  EXPECT_FALSE(SimBox::create(cost, {.slots = 33}));
  EXPECT_FALSE(SimBox::create(cost, {.policy = "clock"}));
  EXPECT_FALSE(SimBox::create(cost, {.policy = "belady"})) << "without a trace";
}

// Traces and slots know the layers with experts alone; the others are computed before the next of them.
TEST(SimBox, LayersWithoutExpertsAreComputedToo) {
  ModelCosts m = model();
  LayerCosts dense;
  dense.dense_bytes = {30e6, 0, 0};
  dense.routed = false;
  m.layers.insert(m.layers.begin(), dense);
  m.layers.push_back(dense);
  const MachineProfile machine = box();
  const CostModel cost(m, machine);
  auto simulated = SimBox::create(cost, {.policy = "static", .slots = 4}).value();
  const SimBox::StepTokens step = one_token({{0, 15}, {0, 1}});
  EXPECT_NEAR(simulated->step(step, true), (2 * 0.03 + (0.01 + 0.01) + (0.01 + 0.002)) * kMs, 1);
  EXPECT_EQ(simulated->report().hits, 3);
  EXPECT_NEAR(simulated->report().gpu_bytes, 80e6 + 3e6, 1);
  EXPECT_FALSE(SimBox::create(cost, {.slots = 33})) << "32 experts in two layers";
  const Trace trace = synthesize_trace({.layers = 2, .experts = 16, .top_k = 2, .hash_layers = 0}, Workload::one, 1, 9);
  EXPECT_TRUE(simulate(cost, trace, {.policy = "static", .slots = 4}));
  for (LayerCosts& layer : m.layers) layer.routed = false;
  EXPECT_FALSE(SimBox::create(cost, {})) << "nothing to decide";
}

TEST(SimBox, AFillIsThereInTheStepAfterTheNext) {
  const ModelCosts m = model();
  const MachineProfile machine = box();
  const CostModel cost(m, machine);
  auto simulated = SimBox::create(cost, {.policy = "lru", .slots = 4}).value();
  const SimBox::StepTokens step = one_token({{14, 15}, {14, 15}});
  std::vector<double> hits;
  for (int i = 0; i < 3; ++i) {
    simulated->step(step, true);
    hits.push_back(simulated->report().hits);
  }
  EXPECT_EQ(hits[0], 0);
  EXPECT_EQ(hits[1], 0);
  EXPECT_GT(hits[2], 0);
}

TEST(SimBox, AStepWaitsForItsFillsAndSaysSo) {
  const ModelCosts m = model();
  const MachineProfile machine = box();
  const CostModel cost(m, machine);
  const SimBox::StepTokens step = one_token({{14, 15}, {14, 15}});
  SimOptions slow{.policy = "lru", .slots = 4};
  slow.faults = {{Engine::h2d, 0, 1e12, 1e-3}};
  auto simulated = SimBox::create(cost, slow).value();
  for (int i = 0; i < 3; ++i) simulated->step(step, true);
  EXPECT_GT(simulated->report().total_ns, 2 * kMs) << "copies of 0.002 ms at a thousandth of the speed";
  EXPECT_NEAR(simulated->report().total_ns, simulated->now(), 1);
}

TEST(SimBox, MissingMemoryIsReadFromTheDisk) {
  const ModelCosts m = model();
  MachineProfile machine = box(false);
  EXPECT_FALSE(SimBox::create(CostModel(m, machine), {.policy = "static", .ram_experts = 0.5})) << "there is no disk";
  machine.disk.read_bytes_per_second = 1e9;
  const CostModel cost(m, machine);
  auto simulated = SimBox::create(cost, {.policy = "static", .ram_experts = 0.5}).value();
  const SimBox::StepTokens step = one_token({{0, 15}, {0, 1}});
  EXPECT_NEAR(simulated->step(step, true), (0.12 + 1 + 0.12) * kMs, 1) << "expert 15 comes from the disk, 1 MB/ms";
  EXPECT_NEAR(simulated->step(step, true), 0.24 * kMs, 1) << "and stays";
  EXPECT_EQ(simulated->report().disk_bytes, 1e6);
}

// One expert a layer misses, the same in every step: the CPU has read it before the router asks.
TEST(SimBox, StagingHidesWhatCanBeGuessed) {
  const ModelCosts m = model();
  MachineProfile machine = box();
  machine.gpus[0].weights[0] = KernelCurve::roof(500e9, 1e30, 1);  // 0.02 ms of attention: time for two experts
  const CostModel cost(m, machine);
  const SimBox::StepTokens step = one_token({{0, 15}, {0, 14}});
  const auto run = [&](const std::string& staging) {
    auto simulated = SimBox::create(cost, {.policy = "static", .slots = 4, .staging = staging}).value();
    for (int i = 0; i < 20; ++i) simulated->step(step, i >= 10);
    return simulated->report();
  };
  const SimReport without = run(""), with = run("last-token");
  EXPECT_NEAR(without.ms_per_token(), 2 * (0.02 + 0.01), 1e-6);
  EXPECT_NEAR(with.ms_per_token(), 2 * (0.02 + 0.0015), 1e-6);
  EXPECT_EQ(with.staged_right, 20);
  EXPECT_FALSE(SimBox::create(cost, {.staging = "tea-leaves"}));
}

TEST(Devices, WhatIsDroppedIsNotHeardOf) {
  EventQueue events;
  Devices devices(events, box(), 0, 1, {});
  std::string order;
  devices.submit(Engine::cpu, 10, "guess", [&] { order += 'a'; });
  devices.submit(Engine::cpu, 1, "work", [&] { order += 'b'; });
  events.at(4, [&] { devices.drop(Engine::cpu, "guess"); });
  while (events.step()) {
  }
  EXPECT_EQ(order, "b");
  devices.settle();
  EXPECT_DOUBLE_EQ(devices.busy_ns(Engine::cpu), 5);
}

TEST(Simulate, IsTheSameEveryTimeAndNoiseIsSeeded) {
  const ModelCosts m = model();
  const MachineProfile machine = box();
  const CostModel cost(m, machine);
  const Trace trace =
      synthesize_trace({.layers = 2, .experts = 16, .top_k = 2, .hash_layers = 0}, Workload::one, 1, 200);
  SimOptions options{.slots = 8, .noise = 0.1, .seed = 3, .recorded_steps = 2};
  const SimReport a = simulate(cost, trace, options).value(), b = simulate(cost, trace, options).value();
  EXPECT_EQ(a.total_ns, b.total_ns);
  EXPECT_EQ(a.hits, b.hits);
  EXPECT_GT(a.spans.size(), 8u);
  options.seed = 4;
  EXPECT_NE(simulate(cost, trace, options).value().total_ns, a.total_ns);
  options.policy = "belady";
  EXPECT_GT(simulate(cost, trace, options).value().hit_rate(), a.hit_rate());
  const Trace other = synthesize_trace({.layers = 3, .experts = 16, .top_k = 2}, Workload::one, 1, 2);
  EXPECT_FALSE(simulate(cost, other, options));
}

// A device at half the CPU's speed with most of the experts: what it would get more makes steps longer.
TEST(Simulate, NothingIsFilledWhereTheDeviceIsWhatStepsWaitFor) {
  const ModelCosts m = model();
  MachineProfile machine = box();
  const Trace trace =
      synthesize_trace({.layers = 2, .experts = 16, .top_k = 2, .hash_layers = 0}, Workload::one, 1, 600);
  const auto run = [&](double device_bytes_per_second) {
    for (KernelCurve& curve : machine.gpus[0].weights) curve = KernelCurve::roof(device_bytes_per_second, 1e30, 1);
    return simulate(CostModel(m, machine), trace, {.policy = "eager", .slots = 20, .measure_from = 300}).value();
  };
  const SimReport fast = run(1000e9), slow = run(50e9);
  EXPECT_GT(fast.fills, 10);
  EXPECT_GT(fast.saved_by_one_more_ns, 0);
  EXPECT_EQ(slow.fills, 0);
  EXPECT_LT(slow.saved_by_one_more_ns, 0);
  EXPECT_LT(slow.slack_ns, fast.slack_ns);
  EXPECT_LT(slow.cpu_critical, fast.cpu_critical);
  EXPECT_NEAR(std::accumulate(slow.missing.begin(), slow.missing.end(), 0.0), 1, 1e-9);
}

TEST(Serving, EveryRequestIsAnsweredAndManyShareSteps) {
  const ModelCosts m = model();
  const MachineProfile machine = box(false);
  const CostModel cost(m, machine);
  ServingOptions o;
  o.box.policy = "static";
  o.routing = {.layers = 2, .experts = 16, .top_k = 2, .hash_layers = 0};
  o.requests = 12;
  o.prompt_tokens = 40;
  o.answer_tokens = 20;
  o.limits = {.max_num_seqs = 1, .max_num_batched_tokens = 64, .max_logit_rows = 8};
  const ServingReport one = simulate_serving(cost, o).value();
  EXPECT_EQ(one.ttft_ms.size(), 12u);
  EXPECT_GE(one.prompt_tokens, 12 * 26);
  o.limits.max_num_seqs = 8;
  const ServingReport many = simulate_serving(cost, o).value();
  EXPECT_GT(many.answer_tokens_per_second(), 2 * one.answer_tokens_per_second());
  EXPECT_LT(percentile(many.ttft_ms, 50), percentile(one.ttft_ms, 50));
  o.clients = 2;
  const ServingReport closed = simulate_serving(cost, o).value();
  EXPECT_LT(percentile(closed.ttft_ms, 95), percentile(one.ttft_ms, 95)) << "nobody waits behind ten others";
  o.clients = 0;
  o.requests_per_second = 1;
  const ServingReport rare = simulate_serving(cost, o).value();
  EXPECT_GT(rare.seconds, 5);
  for (const int wrong : {0, -3}) {
    ServingOptions bad = o;
    bad.limits.max_num_seqs = wrong;
    EXPECT_FALSE(simulate_serving(cost, bad));
    bad = o;
    bad.limits.max_num_batched_tokens = wrong;
    EXPECT_FALSE(simulate_serving(cost, bad));
    bad = o;
    bad.requests = wrong;
    EXPECT_FALSE(simulate_serving(cost, bad));
  }
  o.requests_per_second = 1e-300;
  EXPECT_FALSE(simulate_serving(cost, o));
  o.requests_per_second = 1;
  o.kv_tokens = 30;
  EXPECT_FALSE(simulate_serving(cost, o));
}

}  // namespace
}  // namespace thermocline::sched
