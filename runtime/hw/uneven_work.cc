#include "runtime/hw/uneven_work.h"

#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>

#include <atomic>
#include <thread>
#include <vector>

namespace thermocline {

int default_uneven_threads() { return tbb::this_task_arena::max_concurrency(); }

#ifdef __SANITIZE_THREAD__

// ThreadSanitizer does not see the synchronisation inside Debian's libtbb and would report every hand-over. Plain
// threads let it check what our own pieces share.
void for_each_uneven(int64_t count, int threads, const std::function<void(int64_t index, int slot)>& fn) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> workers;
  for (int slot = 0; slot < (threads > 0 ? threads : default_uneven_threads()); ++slot)
    workers.emplace_back([&, slot] {
      for (int64_t index = next++; index < count; index = next++) fn(index, slot);
    });
  for (std::thread& worker : workers) worker.join();
}

#else

void for_each_uneven(int64_t count, int threads, const std::function<void(int64_t index, int slot)>& fn) {
  const int workers = threads > 0 ? threads : default_uneven_threads();
  const tbb::global_control limit(tbb::global_control::max_allowed_parallelism, static_cast<size_t>(workers));
  tbb::task_arena arena(workers);
  arena.execute([&] {
    tbb::parallel_for(int64_t{0}, count,
                      [&](int64_t index) { fn(index, tbb::this_task_arena::current_thread_index()); });
  });
}

#endif

}  // namespace thermocline
