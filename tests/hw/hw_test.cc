// runtime/hw: topologies real and synthetic, CPU features, buffers, the worker pool.
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>

#include "runtime/hw/cpu_features.h"
#include "runtime/hw/memory_bandwidth.h"
#include "runtime/hw/numa_buffer.h"
#include "runtime/hw/topology.h"
#include "runtime/hw/uneven_work.h"
#include "runtime/hw/worker_pool.h"
#include "tests/support/fixtures.h"

namespace thermocline {
namespace {

TEST(Topology, ThisMachineHasACoreAndANode) {
  const Topology topology = read_topology().value();
  EXPECT_GE(topology.cores.size(), 1u);
  EXPECT_GE(topology.nodes.size(), 1u);
  EXPECT_GE(topology.default_threads(), 1);
  EXPECT_GT(usable_memory_bytes(), 0u);
}

TEST(Topology, CoresStayInsideTheCpuset) {
  cpu_set_t before, one;
  ASSERT_EQ(sched_getaffinity(0, sizeof before, &before), 0);
  CPU_ZERO(&one);
  for (int cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++cpu)
    if (CPU_ISSET(cpu, &before)) CPU_SET(cpu, &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  pid_t child = fork();
  if (child == 0) {  // the allowed set is read by a process that was started inside it
    const Topology topology = read_topology().value();
    _exit(topology.cores.empty() ? 1 : 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  sched_setaffinity(0, sizeof before, &before);
  EXPECT_EQ(status, 0);
}

TEST(Topology, SyntheticNodesHoldTheirCores) {
  const Topology topology = read_topology("node:2 core:3 pu:2").value();
  EXPECT_TRUE(topology.synthetic);
  ASSERT_EQ(topology.nodes.size(), 2u);
  ASSERT_EQ(topology.cores.size(), 6u);
  for (size_t i = 0; i < 6; ++i) EXPECT_EQ(topology.cores[i].node, static_cast<int>(i / 3));
}

TEST(Topology, NonsenseIsRefused) {
  const Result<Topology> topology = read_topology("two sockets please");
  ASSERT_FALSE(topology);
  EXPECT_EQ(topology.error().code, ErrorCode::invalid_argument);
}

TEST(CpuFeatures, LevelsImplyTheOnesBelow) {
  const CpuFeatures cpu = detect_cpu_features();
  EXPECT_FALSE(cpu.model.empty());
  EXPECT_TRUE(cpu.avx2 || !cpu.avx512);
  EXPECT_TRUE(cpu.avx512 || !cpu.amx);
  EXPECT_EQ(parse_isa("avx2").value(), Isa::avx2);
  EXPECT_FALSE(parse_isa("sse9"));
}

TEST(NumaBuffer, IsZeroedAlignedAndMoves) {
  for (const uint64_t bytes : {uint64_t{0}, uint64_t{1}, uint64_t{4096}, uint64_t{5} << 20}) {
    NumaBuffer buffer = NumaBuffer::allocate(bytes).value();
    EXPECT_EQ(buffer.size(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 4096, 0u);
    for (uint64_t i = 0; i < bytes; i += 4096) EXPECT_EQ(buffer.data()[i], std::byte{0});
    std::byte* const data = buffer.data();
    NumaBuffer moved = std::move(buffer);
    EXPECT_EQ(moved.data(), data);
  }
}

TEST(NumaBuffer, PlacementIsAskedOfTheKernel) {
  const Topology topology = read_topology().value();
  const int node = topology.nodes[0].os_node;
  const NumaBuffer buffer = NumaBuffer::allocate(8 << 20, node).value();
  EXPECT_FALSE(buffer.share_on_node(node).has_value()) << "no page has been touched";
  std::memset(buffer.data(), 1, buffer.size());
  const std::optional<double> share = buffer.share_on_node(node);
  if (!share) return;  // a container that forbids the question
  EXPECT_EQ(buffer.share_on_node(63).value(), 0.0);
  EXPECT_EQ(*share, buffer.bound() || topology.nodes.size() == 1 ? 1.0 : *share);
}

TEST(WorkerPool, TheDriverIsPinnedForAsLongAsItSays) {
  cpu_set_t before, inside, after;
  WorkerPool pool(read_topology().value());
  sched_getaffinity(0, sizeof before, &before);
  {
    const WorkerPool::PinnedDriver driver(pool);
    sched_getaffinity(0, sizeof inside, &inside);
    EXPECT_TRUE(pool.size() == 1 || CPU_COUNT(&inside) == 1 || CPU_EQUAL(&inside, &before));
  }
  sched_getaffinity(0, sizeof after, &after);
  EXPECT_TRUE(CPU_EQUAL(&before, &after));
}

TEST(NumaBuffer, ImpossibleSizesAreAnError) {
  const Result<NumaBuffer> buffer = NumaBuffer::allocate(uint64_t{1} << 60);
  ASSERT_FALSE(buffer);
  EXPECT_EQ(buffer.error().code, ErrorCode::out_of_memory);
}

TEST(WorkerPool, EveryItemIsDoneOnceByAnyNumberOfWorkers) {
  const Topology topology = read_topology("node:2 core:4 pu:1").value();
  for (const int threads : {1, 2, 3, 8}) {
    WorkerPool pool(topology, threads);
    EXPECT_EQ(pool.size(), threads);
    EXPECT_EQ(pool.nodes(), threads == 1 ? 1 : 2);
    EXPECT_EQ(pool.team(0).node, 0);
    EXPECT_EQ(pool.team(0).size, (threads + 1) / 2) << "workers are spread evenly over the nodes";
    EXPECT_EQ(pool.team(threads - 1).node, pool.nodes() - 1);
    EXPECT_EQ(pool.team(threads - 1).rank, pool.team(threads - 1).size - 1);
    for (const int64_t count : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> done(static_cast<size_t>(count));
      pool.split(count, [&](int64_t begin, int64_t end, int worker) {
        EXPECT_LT(worker, threads);
        for (int64_t i = begin; i < end; ++i) ++done[static_cast<size_t>(i)];
      });
      for (const auto& n : done) EXPECT_EQ(n, 1);
    }
  }
}

TEST(WorkerPool, WakesFromParking) {
  WorkerPool pool(read_topology().value(), 3);
  std::atomic<int> calls{0};
  for (int round = 0; round < 30; ++round) {
    if (round % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));  // long enough to park
    pool.run([&](int) { ++calls; });
  }
  EXPECT_EQ(calls, 90);
}

TEST(UnevenWork, EveryPieceIsDoneOnceAndSlotsNeverOverlap) {
  for (const int threads : {1, 2, 5}) {
    std::vector<std::atomic<int>> done(500), busy(static_cast<size_t>(threads));
    for_each_uneven(500, threads, [&](int64_t index, int slot) {
      ASSERT_LT(slot, threads);
      EXPECT_EQ(busy[static_cast<size_t>(slot)]++, 0);
      ++done[static_cast<size_t>(index)];
      --busy[static_cast<size_t>(slot)];
    });
    for (const auto& n : done) EXPECT_EQ(n, 1);
  }
}

TEST(MemoryBandwidth, IsAPlausibleNumber) {
  WorkerPool pool(read_topology().value(), 1);
  const double bandwidth = StreamRead::create(pool, 32 << 20)->measure(2);
  EXPECT_GT(bandwidth, 1e7);
  EXPECT_LT(bandwidth, 1e13);
  EXPECT_GT(peak_resident_bytes(), uint64_t{32} << 20);
}

}  // namespace
}  // namespace thermocline
