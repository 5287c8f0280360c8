// runtime/hw: topologies real and synthetic, CPU features, buffers, the worker pool.
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>

#include "runtime/hw/cpu_features.h"
#include "runtime/hw/host_memory.h"
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

// Every CPU of this machine in turn is all that a thread may use: exactly that one is a core.
TEST(Topology, CoresStayInsideTheAffinityMask) {
  cpu_set_t before;
  ASSERT_EQ(sched_getaffinity(0, sizeof before, &before), 0);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &before)) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
    const Topology topology = read_topology().value();
    sched_setaffinity(0, sizeof before, &before);
    ASSERT_EQ(topology.cores.size(), 1u);
    EXPECT_EQ(topology.cores[0].os_cpu, cpu);
    EXPECT_EQ(topology.default_threads(), 1);
  }
  const Topology all = read_topology().value();
  EXPECT_LE(all.cores.size(), static_cast<size_t>(CPU_COUNT(&before)));
  for (const Core& core : all.cores) EXPECT_TRUE(CPU_ISSET(core.os_cpu, &before)) << core.os_cpu;
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

// Asked for the buffer of a node: shares of all nodes add up to all pages, and a binding that was granted holds.
TEST(NumaBuffer, PlacementIsAskedOfTheKernel) {
  const Topology topology = read_topology().value();
  const int node = topology.nodes[0].os_node;
  const NumaBuffer buffer = NumaBuffer::allocate(8 << 20, node).value();
  EXPECT_FALSE(buffer.share_on_node(node).has_value()) << "no page has been touched";
  std::memset(buffer.data(), 1, buffer.size());
  int status = -1;
  void* const first = buffer.data();
  if (syscall(SYS_move_pages, 0, 1, &first, nullptr, &status, 0) != 0 || status < 0)
    GTEST_SKIP() << "this system does not say where pages are";
  double sum = 0;
  for (const NumaNode& n : topology.nodes) sum += buffer.share_on_node(n.os_node).value();
  EXPECT_DOUBLE_EQ(sum, 1);
  EXPECT_EQ(buffer.share_on_node(63).value(), 0);
  EXPECT_GT(buffer.share_on_node(status).value(), 0) << "where move_pages finds its first page";
  EXPECT_TRUE(!buffer.bound() || buffer.share_on_node(node).value() == 1);
}

TEST(HostMemory, AMeasureIsWhatAllocatingTakes) {
  const auto build = [] {
    std::vector<HostArray<float>> arrays;
    for (const int64_t count : {0, 1, 5000, 3 << 20}) arrays.push_back(HostArray<float>::allocate(count).value());
    return arrays;
  };
  uint64_t measured = 0;
  {
    const HostMemoryMeasure measure;
    EXPECT_EQ(build()[1].data(), nullptr) << "nothing is mapped";
    measured = measure.bytes();
  }
  EXPECT_EQ(measured, uint64_t{4096 + 20480 + (12 << 20)});
  const HostMemoryLedger ledger;
  {
    const auto arrays = build();
    EXPECT_EQ(ledger.bytes(), measured);
  }
  EXPECT_EQ(ledger.bytes(), 0u) << "what is gone is not touched";
}

bool resident(const HostArray<int32_t>& array) {
  std::vector<unsigned char> pages((static_cast<size_t>(array.size()) * 4 + 4095) / 4096);
  EXPECT_EQ(mincore(array.data(), static_cast<size_t>(array.size()) * 4, pages.data()), 0);
  return std::all_of(pages.begin(), pages.end(), [](unsigned char page) { return page & 1; });
}

TEST(HostMemory, EveryPageIsResidentAndUnchanged) {
  WorkerPool pool(read_topology("node:2 core:2 pu:1").value(), 3);
  const HostMemoryLedger ledger;
  const HostArray<int32_t> large = HostArray<int32_t>::allocate(5 << 20).value(),
                           small = HostArray<int32_t>::allocate(3000).value();
  large[4 << 20] = 7;
  ASSERT_FALSE(resident(large));
  ledger.make_resident(pool);
  EXPECT_TRUE(resident(large));
  EXPECT_TRUE(resident(small));
  EXPECT_EQ(large[4 << 20], 7);
  EXPECT_EQ(large[0], 0);
}

// By the workers of its node, where it has any.
TEST(HostMemory, WhatIsOneNodesIsResidentToo) {
  const Topology topology = read_topology().value();
  WorkerPool pool(topology, 3);
  for (const int node : {topology.nodes[0].os_node, topology.nodes.back().os_node, 63}) {
    const HostMemoryLedger ledger;
    const auto array = HostArray<int32_t>::allocate(3 << 20, node).value();
    ledger.make_resident(pool);
    EXPECT_TRUE(resident(array)) << "node " << node;
  }
}

#if defined(TC_SANITIZED) || !defined(NDEBUG)
TEST(HostMemoryDeathTest, AStepAllocatesNothing) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  WorkerPool pool(read_topology("node:1 core:1 pu:1").value(), 1);
  EXPECT_DEATH(
      {
        const WorkerPool::StepScope scope(pool);
        (void)NumaBuffer::allocate(1);
      },
      "allocated within a step");
}
#endif

// On a core that this thread may use and was not on alone before; back on all of them afterwards.
TEST(WorkerPool, AStepPinsItsThreadForAsLongAsItLasts) {
  cpu_set_t before, inside, after;
  const Topology topology = read_topology().value();
  if (topology.cores.size() < 2) GTEST_SKIP() << "one core: nothing to pin";
  WorkerPool pool(topology, 2);
  ASSERT_GE(pool.driver_cpu(), 0);
  sched_getaffinity(0, sizeof before, &before);
  ASSERT_GT(CPU_COUNT(&before), 1);
  {
    const WorkerPool::StepScope outer(pool);
    { const WorkerPool::StepScope inner(pool); }
    sched_getaffinity(0, sizeof inside, &inside);
    EXPECT_EQ(CPU_COUNT(&inside), 1);
    EXPECT_TRUE(CPU_ISSET(pool.driver_cpu(), &inside));
  }
  sched_getaffinity(0, sizeof after, &after);
  EXPECT_TRUE(CPU_EQUAL(&before, &after));
  WorkerPool unpinned(read_topology("node:1 core:2 pu:1").value(), 2);
  EXPECT_EQ(unpinned.driver_cpu(), -1) << "nothing is bound to a topology of text";
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

/// Threads of this process, this one aside, that run or want to.
int running_threads() {
  int running = 0;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    if (task.path().filename() == std::to_string(gettid())) continue;
    std::ifstream stat(task.path() / "stat");
    std::string text;
    std::getline(stat, text);
    running += text.find(") R ") != std::string::npos;
  }
  return running;
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

// Plain memory written by workers and read by the driver, and the other way round, from region to region: what a race
// or a lost region would break, with groups that are full, that hold one worker, and a driver alone on its node.
TEST(WorkerPool, RegionsFollowEachOtherOnAnyTopology) {
  for (const auto& [machine, threads] : {std::pair{"node:1 core:2 pu:1", 2},
                                         {"node:2 core:1 pu:1", 2},
                                         {"node:2 core:4 pu:1", 8},
                                         {"node:1 core:40 pu:1", 36},
                                         {"node:4 core:10 pu:1", 37}}) {
    WorkerPool pool(read_topology(machine).value(), threads);
    std::vector<int64_t> sums(static_cast<size_t>(threads));
    int64_t expected = 0, addend = 0;
    const auto regions = [&](int count) {
      for (int i = 0; i < count; ++i) {
        expected += ++addend;
        pool.run([&](int worker) { sums[static_cast<size_t>(worker)] += addend; });
        ASSERT_EQ(std::count(sums.begin(), sums.end(), expected), threads) << machine;
      }
    };
    regions(3);  // outside of a scope: every region wakes the workers
    for (int step = 0; step < 5; ++step) {
      const WorkerPool::StepScope scope(pool);
      regions(20);
      const WorkerPool::StepScope inner(pool);
      regions(2);
    }
    regions(1);
    { const WorkerPool::StepScope idle(pool); }  // woken for nothing
  }
}

// A pool whose workers do otherwise never gets there, and the test to its end.
TEST(WorkerPool, WorkersSpinWithinAStepAndSleepOutside) {
  WorkerPool pool(read_topology("node:1 core:4 pu:1").value(), 4);
  const auto wait_until_running = [](int threads) {
    while (running_threads() != threads) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  wait_until_running(0);
  for (int step = 0; step < 3; ++step) {
    const WorkerPool::StepScope scope(pool);
    wait_until_running(3);
    pool.run([](int) {});
    wait_until_running(3);
  }
  wait_until_running(0);
  pool.run([](int) {});
  wait_until_running(0);
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
  const Result<StreamRead> large = StreamRead::create(pool, uint64_t{1} << 60);
  ASSERT_FALSE(large);  // who names a size gets that or nothing
  EXPECT_EQ(large.error().code, ErrorCode::out_of_memory);
}

}  // namespace
}  // namespace thermocline
