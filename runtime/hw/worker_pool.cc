#include "runtime/hw/worker_pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>

namespace thermocline {
namespace {

// About 100 us of pauses: longer than the serial gaps inside a step, shorter than a user notices a busy core.
constexpr int kSpins = 4000;

void pin(int os_cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(os_cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // refused in some containers: then the kernel places it
}

// One core after the other, each from the node with the fewest workers so far among those with cores left; more workers
// than cores go round again. By node in the end, so that a team's workers are neighbours.
std::vector<Core> choose_cores(const Topology& topology, int count) {
  std::vector<std::vector<Core>> by_node(topology.nodes.size());
  for (const Core& core : topology.cores) by_node[static_cast<size_t>(core.node)].push_back(core);
  std::vector<Core> chosen;
  for (size_t round = 0; static_cast<int>(chosen.size()) < count; ++round) {
    bool any = false;
    for (const auto& cores : by_node)
      if (round < cores.size() && static_cast<int>(chosen.size()) < count) {
        chosen.push_back(cores[round]);
        any = true;
      }
    if (!any) chosen.push_back(chosen[chosen.size() - topology.cores.size()]);
  }
  std::stable_sort(chosen.begin(), chosen.end(), [](const Core& a, const Core& b) { return a.node < b.node; });
  return chosen;
}

}  // namespace

WorkerPool::WorkerPool(const Topology& topology, int threads) {
  const int count = threads > 0 ? threads : topology.default_threads();
  const std::vector<Core> cores = choose_cores(topology, count);
  int last_node = -1;
  for (const Core& core : cores) {
    if (core.node != last_node)
      os_nodes_.push_back(topology.synthetic ? -1 : topology.nodes[static_cast<size_t>(core.node)].os_node);
    last_node = core.node;
    const int node = nodes() - 1;
    const bool first = teams_.empty() || teams_.back().node != node;
    teams_.push_back({node, first ? 0 : teams_.back().rank + 1, 0});
  }
  for (Team& team : teams_)
    team.size = static_cast<int>(
        std::count_if(teams_.begin(), teams_.end(), [&](const Team& t) { return t.node == team.node; }));
  const bool pinnable = !topology.synthetic && count <= static_cast<int>(topology.cores.size());
  if (pinnable) driver_cpu_ = cores[0].os_cpu;
  for (int worker = 1; worker < count; ++worker)
    threads_.emplace_back(
        [this, worker, os_cpu = pinnable ? cores[static_cast<size_t>(worker)].os_cpu : -1] { work(worker, os_cpu); });
}

WorkerPool::~WorkerPool() {
  stop_ = true;
  {
    const std::lock_guard lock(mutex_);
    epoch_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

WorkerPool::PinnedDriver::PinnedDriver(const WorkerPool& pool) {
  if (pool.driver_cpu_ < 0 || pool.size() == 1) return;
  if (pthread_getaffinity_np(pthread_self(), sizeof before_, &before_) != 0) return;
  pin(pool.driver_cpu_);
  pinned_ = true;
}

WorkerPool::PinnedDriver::~PinnedDriver() {
  if (pinned_) pthread_setaffinity_np(pthread_self(), sizeof before_, &before_);
}

void WorkerPool::dispatch(Task task, const void* context) {
  if (size() == 1) return task(context, 0);
  task_ = task;
  context_ = context;
  unfinished_.store(size() - 1, std::memory_order_relaxed);
  epoch_.fetch_add(1);  // sequentially consistent with parked_: a worker that parks sees it, or we see the worker
  if (parked_.load() > 0) {
    { const std::lock_guard lock(mutex_); }
    wake_.notify_all();
  }
  task(context, 0);
  for (int spins = 0; unfinished_.load(std::memory_order_acquire) > 0; ++spins) {
    _mm_pause();
    if (spins > kSpins) std::this_thread::yield();  // more workers than free cores: let them run
  }
}

void WorkerPool::work(int worker, int os_cpu) {
  if (os_cpu >= 0) pin(os_cpu);
  uint64_t seen = 0;
  while (true) {
    int spins = 0;
    while (epoch_.load(std::memory_order_acquire) == seen && ++spins < kSpins) _mm_pause();
    if (epoch_.load() == seen) {
      std::unique_lock lock(mutex_);
      parked_.fetch_add(1);
      wake_.wait(lock, [&] { return epoch_.load() != seen; });
      parked_.fetch_sub(1);
    }
    ++seen;
    if (stop_) return;
    task_(context_, worker);
    unfinished_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace thermocline
