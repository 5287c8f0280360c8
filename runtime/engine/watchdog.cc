#include "runtime/engine/watchdog.h"

#include <algorithm>

namespace thermocline {

Watchdog::Watchdog(std::chrono::milliseconds limit, std::function<void()> bark)
    : limit_(limit), bark_(std::move(bark)), thread_([this] { run(); }) {}

Watchdog::~Watchdog() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void Watchdog::run() {
  const auto tick =
      std::clamp<std::chrono::milliseconds>(limit_ / 10, std::chrono::milliseconds(5), std::chrono::milliseconds(1000));
  int64_t barked_at = 0;  // the work that was barked at
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, tick, [&] { return stop_; })) {
    const int64_t since = since_.load(std::memory_order_acquire);
    if (since == 0 || since == barked_at || std::chrono::steady_clock::duration(now() - since) < limit_) continue;
    barked_at = since;
    bark_();
  }
}

}  // namespace thermocline
