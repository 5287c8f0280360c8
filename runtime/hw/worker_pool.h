// WorkerPool: the threads that compute a step. One pinned worker per core, those of a NUMA node side by side, work
// split statically, so a worker meets the same weight rows every step. Workers spin within a step and park between
// steps.
#pragma once

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

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

  /// Keeps the calling thread on worker 0's core while it lives, where workers are pinned: off the other workers'
  /// cores, and on the node whose rows worker 0 owns.
  class PinnedDriver {
   public:
    explicit PinnedDriver(const WorkerPool& pool);
    ~PinnedDriver();
    PinnedDriver(const PinnedDriver&) = delete;
    PinnedDriver& operator=(const PinnedDriver&) = delete;

   private:
    cpu_set_t before_;
    bool pinned_ = false;
  };

  /// Calls fn(worker) once on every worker and returns when all are done. One caller at a time; fn takes no lock,
  /// throws nothing and never calls run() itself.
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

  void dispatch(Task task, const void* context);
  void work(int worker, int os_cpu);

  std::vector<Team> teams_;    // by worker
  std::vector<int> os_nodes_;  // by team node
  int driver_cpu_ = -1;        // of worker 0, -1: not pinned
  std::vector<std::thread> threads_;
  Task task_ = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<uint64_t> epoch_{0};  // one more per run(); workers wait for it to move
  alignas(64) std::atomic<int> unfinished_{0};
  alignas(64) std::atomic<int> parked_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace thermocline
