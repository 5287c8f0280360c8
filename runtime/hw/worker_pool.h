// WorkerPool: the threads that compute a step. One pinned worker per core, those of a NUMA node side by side, work
// split statically, so a worker meets the same weight rows every step.
//
// Workers spin while a StepScope is held and park at once when it ends: a step may wait for a device in its middle and
// nobody has to be woken. A region is published to each group of neighbouring workers and gathered from them the same
// way, a cache line a group: the last of a group to finish reports to the driver. No line is contended by more than
// kGroupSize workers, and of the lines that cross nodes there is one a group each way.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "runtime/hw/host_memory.h"
#include "runtime/hw/topology.h"

namespace thermocline {

class WorkerPool {
 public:
  /// `threads` workers (0: topology.default_threads()), spread evenly over the nodes, the caller of run() being worker
  /// 0. Workers 1.. are pinned to their cores unless the topology is synthetic or the system refuses.
  explicit WorkerPool(const Topology& topology, int threads = 0);
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  int size() const { return static_cast<int>(teams_.size()); }

  /// The workers of one NUMA node, numbered from 0; only nodes that have workers count.
  struct Team {
    int node = 0;            // 0 .. nodes() - 1
    int rank = 0, size = 1;  // of this worker in its team
  };
  const Team& team(int worker) const { return teams_[static_cast<size_t>(worker)]; }
  int nodes() const { return static_cast<int>(os_nodes_.size()); }
  /// The OS node memory of a team should be bound to; -1 where nothing may be bound.
  int os_node(int node) const { return os_nodes_[static_cast<size_t>(node)]; }

  /// The OS core of worker 0, where a StepScope keeps its thread; -1: workers are not pinned.
  int driver_cpu() const { return driver_cpu_; }

  /// Bytes of all last-level caches of the topology; 0 where the system hides them.
  uint64_t last_level_cache_bytes() const { return last_level_cache_bytes_; }

  /// Held by the thread that drives a step, for as long as it does: workers are awake and spin, the thread stays on
  /// worker 0's core (where workers are pinned), and allocating host memory is a bug. Scopes nest.
  class StepScope {
   public:
    explicit StepScope(WorkerPool& pool);
    ~StepScope();
    StepScope(const StepScope&) = delete;
    StepScope& operator=(const StepScope&) = delete;

   private:
    WorkerPool& pool_;
    const HostMemorySeal seal_;
    cpu_set_t before_;
    bool pinned_ = false;
  };

  /// Calls fn(worker) once on every worker and returns when all are done. One caller at a time; fn takes no lock,
  /// throws nothing and never calls run() itself. Outside of a StepScope it wakes the workers first, which costs as
  /// much as a system call a worker: many regions belong in a scope.
  template <class Fn>
  void run(const Fn& fn) {
    static_assert(std::is_invocable_v<const Fn&, int>);
    dispatch([](const void* context, int worker) { (*static_cast<const Fn*>(context))(worker); }, &fn);
  }

  /// Splits [0, count) into one contiguous range per worker and calls fn(begin, end, worker) for those not empty.
  template <class Fn>
  void split(int64_t count, const Fn& fn) {
    if (count <= 0) return;
    if (count == 1 || size() == 1) return fn(int64_t{0}, count, 0);
    run([&](int worker) {
      const int64_t begin = count * worker / size(), end = count * (worker + 1) / size();
      if (begin < end) fn(begin, end, worker);
    });
  }

 private:
  using Task = void (*)(const void* context, int worker);
  static constexpr int kGroupSize = 16;

  /// Up to kGroupSize workers of one node, the driver not among them; a line of their own for each thing that is
  /// shared.
  struct Group {
    alignas(64) std::atomic<uint32_t> epoch{0};  // one more per region; published with it:
    Task task = nullptr;
    const void* context = nullptr;
    alignas(64) std::atomic<int> unfinished{0};
    int members = 0;
    alignas(64) std::atomic<uint32_t> bell{0};  // parked workers sleep on it
    std::atomic<int> parked{0};
  };

  void make_groups();
  void dispatch(Task task, const void* context);
  void work(int worker, int os_cpu);
  bool wait_for_region(Group& group, uint32_t seen);
  void park(Group& group, uint32_t seen);
  void wake();
  void relax(int& spins) const;

  std::vector<Team> teams_;    // by worker
  std::vector<int> os_nodes_;  // by team node
  std::vector<int> group_of_;  // by worker; of the driver: none
  int num_groups_ = 0;
  std::unique_ptr<Group[]> groups_;
  uint64_t last_level_cache_bytes_ = 0;
  int driver_cpu_ = -1;   // of worker 0, -1: not pinned
  bool crowded_ = false;  // more workers than CPUs: who waits lets others run
  int scopes_ = 0;        // held; the driving thread's
  uint32_t epoch_ = 0;    // the same
  std::vector<std::thread> threads_;
  alignas(64) std::atomic<int> unfinished_groups_{0};
  alignas(64) std::atomic<bool> awake_{false};  // read by every worker that waits, written at the ends of scopes
  std::atomic<bool> stop_{false};
};

}  // namespace thermocline
