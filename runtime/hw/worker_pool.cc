#include "runtime/hw/worker_pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

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

}  // namespace

WorkerPool::WorkerPool(const Topology& topology, int threads) {
  const int count = threads > 0 ? threads : topology.default_threads();
  const int cores = static_cast<int>(topology.cores.size());
  for (int worker = 0; worker < count; ++worker) nodes_.push_back(topology.cores[worker % cores].node);
  for (int worker = 1; worker < count; ++worker) {
    const bool pinnable = !topology.synthetic && count <= cores;
    threads_.emplace_back(
        [this, worker, os_cpu = pinnable ? topology.cores[worker].os_cpu : -1] { work(worker, os_cpu); });
  }
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
