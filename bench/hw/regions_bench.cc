// regions: what a parallel region costs beyond its work: publish, run nothing, gather. Synthetic topologies stand for
// machines; more workers than this machine's cores measure how well waiting workers make room, no more.
#include <benchmark/benchmark.h>

#include "runtime/hw/worker_pool.h"

namespace thermocline {
namespace {

void regions(benchmark::State& state, const char* machine) {
  const Topology topology = read_topology(machine).value();
  WorkerPool pool(topology, static_cast<int>(topology.cores.size()));
  const WorkerPool::StepScope scope(pool);
  for (auto _ : state) pool.run([](int) {});
}
BENCHMARK_CAPTURE(regions, 2_threads, "node:1 core:2 pu:1")->UseRealTime();
BENCHMARK_CAPTURE(regions, 16_threads, "node:2 core:8 pu:1")->UseRealTime();
BENCHMARK_CAPTURE(regions, 64_threads, "node:4 core:16 pu:1")->UseRealTime();

/// A region by itself: workers sleep before it.
void waking(benchmark::State& state, const char* machine) {
  const Topology topology = read_topology(machine).value();
  WorkerPool pool(topology, static_cast<int>(topology.cores.size()));
  for (auto _ : state) pool.run([](int) {});
}
BENCHMARK_CAPTURE(waking, 2_threads, "node:1 core:2 pu:1")->UseRealTime();
BENCHMARK_CAPTURE(waking, 16_threads, "node:2 core:8 pu:1")->UseRealTime();

}  // namespace
}  // namespace thermocline
