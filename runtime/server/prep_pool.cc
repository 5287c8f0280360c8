#include "runtime/server/prep_pool.h"

#include <oneapi/tbb/task_arena.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "runtime/base/log.h"
#include "runtime/hw/topology.h"

namespace thermocline::server {
namespace {

void run_caught(const std::function<void()>& task) {
  try {
    task();
  } catch (const std::exception& exception) {
    log_error("a request could not be read: {}", exception.what());
  }
}

// A quarter of what the process may use, as the steps need the rest.
int threads_of(int threads) {
  if (threads > 0) return threads;
  const Result<Topology> machine = read_topology();
  return std::max(1, machine ? machine->default_threads() / 4 : 1);
}

}  // namespace

#ifdef __SANITIZE_THREAD__

// As in uneven_work.cc: ThreadSanitizer does not see the hand-over inside Debian's libtbb.
struct PrepPool::Impl {
  explicit Impl(int threads) {
    for (int i = 0; i < threads; ++i) workers.emplace_back([this] { work(); });
  }
  ~Impl() {
    {
      const std::lock_guard lock(mutex);
      stop = true;
    }
    changed.notify_all();
    for (std::thread& worker : workers) worker.join();
  }
  void work() {
    std::unique_lock lock(mutex);
    while (true) {
      changed.wait(lock, [&] { return stop || !tasks.empty(); });
      if (tasks.empty()) return;
      const std::function<void()> task = std::move(tasks.front());
      tasks.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
  }
  void enqueue(std::function<void()> task) {
    {
      const std::lock_guard lock(mutex);
      tasks.push_back(std::move(task));
    }
    changed.notify_one();
  }

  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> tasks;
  bool stop = false;
  std::vector<std::thread> workers;

  std::mutex count_mutex;
  std::condition_variable done;
  int left = 0;
};

#else

struct PrepPool::Impl {
  explicit Impl(int threads) : arena(threads, 0) {}
  void enqueue(std::function<void()> task) { arena.enqueue(std::move(task)); }

  tbb::task_arena arena;
  std::mutex count_mutex;
  std::condition_variable done;
  int left = 0;
};

#endif

PrepPool::PrepPool(int threads) : impl_(std::make_unique<Impl>(threads_of(threads))) {}
PrepPool::~PrepPool() { wait(); }

void PrepPool::run(std::function<void()> task) {
  {
    const std::lock_guard lock(impl_->count_mutex);
    ++impl_->left;
  }
  impl_->enqueue([impl = impl_.get(), task = std::move(task)]() mutable {
    run_caught(task);
    task = nullptr;  // what it holds goes before wait() returns
    const std::lock_guard lock(impl->count_mutex);
    if (--impl->left == 0) impl->done.notify_all();
  });
}

void PrepPool::wait() {
  std::unique_lock lock(impl_->count_mutex);
  impl_->done.wait(lock, [&] { return impl_->left == 0; });
}

}  // namespace thermocline::server
