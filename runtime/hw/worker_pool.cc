#include "runtime/hw/worker_pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>

namespace thermocline {
namespace {

// Pauses before a waiting thread offers its core to others: some 100 us where each worker has one, as nobody should
// need it; next to nothing where the awaited one may be waiting for this core.
constexpr int kPauses = 4000, kCrowdedPauses = 50;

void pin(int os_cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(os_cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // refused in some containers: then the kernel places it
}

// std::atomic's wait spins on its own first, and its wake may take a lock shared with strangers.
void futex_wait(std::atomic<uint32_t>& word, uint32_t while_it_is) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, while_it_is, nullptr, nullptr, 0);
}
void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
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

WorkerPool::WorkerPool(const Topology& topology, int threads)
    : last_level_cache_bytes_(topology.last_level_cache_bytes) {
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
  crowded_ = count > static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  make_groups();
  for (int worker = 1; worker < count; ++worker)
    threads_.emplace_back(
        [this, worker, os_cpu = pinnable ? cores[static_cast<size_t>(worker)].os_cpu : -1] { work(worker, os_cpu); });
}

void WorkerPool::make_groups() {
  group_of_.assign(teams_.size(), -1);
  std::vector<int> members;
  for (size_t worker = 1; worker < teams_.size(); ++worker) {
    const bool same_node = worker > 1 && teams_[worker].node == teams_[worker - 1].node;
    if (!same_node || members.back() == kGroupSize) members.push_back(0);
    ++members.back();
    group_of_[worker] = static_cast<int>(members.size()) - 1;
  }
  num_groups_ = static_cast<int>(members.size());
  groups_ = std::make_unique<Group[]>(members.size());
  for (int g = 0; g < num_groups_; ++g)
    groups_[static_cast<size_t>(g)].unfinished = groups_[static_cast<size_t>(g)].members =
        members[static_cast<size_t>(g)];
}

WorkerPool::~WorkerPool() {
  stop_ = true;
  wake();
  for (std::thread& thread : threads_) thread.join();
}

WorkerPool::StepScope::StepScope(WorkerPool& pool) : pool_(pool) {
  if (pool_.scopes_++ > 0 || pool_.size() == 1) return;
  pool_.wake();
  if (pool_.driver_cpu_ < 0 || pthread_getaffinity_np(pthread_self(), sizeof before_, &before_) != 0) return;
  pin(pool_.driver_cpu_);
  pinned_ = true;
}

WorkerPool::StepScope::~StepScope() {
  if (--pool_.scopes_ == 0) pool_.awake_ = false;
  if (pinned_) pthread_setaffinity_np(pthread_self(), sizeof before_, &before_);
}

void WorkerPool::dispatch(Task task, const void* context) {
  if (size() == 1) return task(context, 0);
  if (scopes_ == 0) wake();
  unfinished_groups_.store(num_groups_, std::memory_order_relaxed);
  ++epoch_;
  for (int g = 0; g < num_groups_; ++g) {
    Group& group = groups_[static_cast<size_t>(g)];
    group.task = task;
    group.context = context;
    group.epoch.store(epoch_, std::memory_order_release);
  }
  task(context, 0);
  for (int spins = 0; unfinished_groups_.load(std::memory_order_acquire) > 0;) relax(spins);
  if (scopes_ == 0) awake_ = false;
}

// awake_ before the look at parked, and in park() the other way round: one of the two sides sees the other.
void WorkerPool::wake() {
  awake_ = true;
  for (int g = 0; g < num_groups_; ++g) {
    Group& group = groups_[static_cast<size_t>(g)];
    if (group.parked == 0) continue;
    ++group.bell;
    futex_wake_all(group.bell);
  }
}

void WorkerPool::park(Group& group, uint32_t seen) {
  const uint32_t bell = group.bell;
  ++group.parked;
  if (!awake_ && !stop_ && group.epoch == seen) futex_wait(group.bell, bell);
  --group.parked;
}

void WorkerPool::relax(int& spins) const {
  _mm_pause();
  if (++spins < (crowded_ ? kCrowdedPauses : kPauses)) return;
  spins = 0;
  std::this_thread::yield();
}

bool WorkerPool::wait_for_region(Group& group, uint32_t seen) {
  for (int spins = 0; group.epoch.load(std::memory_order_acquire) == seen;) {
    if (stop_.load(std::memory_order_relaxed)) return false;
    if (awake_.load(std::memory_order_relaxed))
      relax(spins);
    else
      park(group, seen);
  }
  return true;
}

void WorkerPool::work(int worker, int os_cpu) {
  if (os_cpu >= 0) pin(os_cpu);
  Group& group = groups_[static_cast<size_t>(group_of_[static_cast<size_t>(worker)])];
  for (uint32_t seen = 0; wait_for_region(group, seen); ++seen) {
    group.task(group.context, worker);
    if (group.unfinished.fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
    group.unfinished.store(group.members, std::memory_order_relaxed);  // for the next region, which starts after this:
    unfinished_groups_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

}  // namespace thermocline
