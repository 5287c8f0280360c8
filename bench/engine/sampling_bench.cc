// Sampling over a vocabulary of 129,280 tokens: ms for 1 and 64 rows on the worker pool, as the step loop samples. Rows
// lie one after the other, 33 MB for 64. `normal` logits have no clear winner (top-p 0.95 keeps tens of thousands),
// `peaked` ones are like a model's: a few tokens have nearly all the mass.
#include <benchmark/benchmark.h>

#include <cmath>
#include <random>

#include "runtime/engine/sampling/sampler.h"
#include "runtime/hw/worker_pool.h"

namespace thermocline {
namespace {

constexpr int64_t kVocab = 129280;

std::vector<float> make_logits(int64_t rows, bool peaked) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> logits(static_cast<size_t>(rows * kVocab));
  for (float& x : logits) x = 3 * normal(random);
  for (int64_t row = 0; peaked && row < rows; ++row)
    for (int i = 0; i < 50; ++i)
      logits[static_cast<size_t>(row * kVocab + static_cast<int64_t>(random() % kVocab))] = 16 - 0.2f * i;
  for (float& x : logits) x *= peaked ? 1.0f : 1.0f / 3;
  return logits;
}

void sampling_bench(benchmark::State& state, SamplingParams params, int top_logprobs, bool peaked) {
  const int64_t rows = state.range(0);
  const std::vector<float> logits = make_logits(rows, peaked);
  WorkerPool pool(read_topology().value());
  std::vector<SamplingScratch> scratch(static_cast<size_t>(pool.size()), SamplingScratch(kVocab));
  std::vector<int32_t> prompt(1000);
  for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<int32_t>(i * 97);
  params.seed = 1;
  params.has_seed = true;
  std::vector<Sampler> samplers(static_cast<size_t>(rows), Sampler(params, prompt));
  for (auto _ : state)
    pool.split(rows, [&](int64_t begin, int64_t end, int worker) {
      for (int64_t row = begin; row < end; ++row)
        benchmark::DoNotOptimize(
            samplers[static_cast<size_t>(row)]
                .sample(std::span(logits).subspan(static_cast<size_t>(row * kVocab), static_cast<size_t>(kVocab)),
                        {.top_logprobs = top_logprobs, .banned = {}}, scratch[static_cast<size_t>(worker)])
                .value());
    });
}

SamplingParams with(double temperature, double top_p = 1, int64_t top_k = 0, double repetition_penalty = 1) {
  SamplingParams params;
  params.temperature = temperature;
  params.top_p = top_p;
  params.top_k = top_k;
  params.repetition_penalty = repetition_penalty;
  return params;
}

#define TC_SAMPLING_BENCH(name, ...)                   \
  BENCHMARK_CAPTURE(sampling_bench, name, __VA_ARGS__) \
      ->Arg(1)                                         \
      ->Arg(64)                                        \
      ->ArgName("rows")                                \
      ->UseRealTime()                                  \
      ->Unit(benchmark::kMillisecond)
TC_SAMPLING_BENCH(greedy, with(0), -1, true);
TC_SAMPLING_BENCH(greedy_logprobs_20, with(0), 20, true);
TC_SAMPLING_BENCH(greedy_penalties, with(0, 1, 0, 1.1), -1, true);
TC_SAMPLING_BENCH(temperature_normal, with(1), -1, false);
TC_SAMPLING_BENCH(top_p_peaked, with(1, 0.95), -1, true);
TC_SAMPLING_BENCH(top_p_normal, with(1, 0.95), -1, false);
TC_SAMPLING_BENCH(top_k_50, with(1, 1, 50), -1, true);
TC_SAMPLING_BENCH(all, with(0.8, 0.95, 0, 1.1), 20, true);

}  // namespace
}  // namespace thermocline
