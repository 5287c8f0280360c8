// Watchdog: notices a step that does not end. A thread of its own, as the step thread is the one that hangs.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

namespace thermocline {

class Watchdog {
 public:
  /// `bark` is called once for every piece of work that lasts longer than `limit`, from the watchdog's thread.
  Watchdog(std::chrono::milliseconds limit, std::function<void()> bark);
  ~Watchdog();

  /// Step thread: work begins, ends.
  void begin() { since_.store(now(), std::memory_order_release); }
  void end() { since_.store(0, std::memory_order_release); }
  /// Any thread: how long the work that goes on has taken; 0 while idle.
  std::chrono::nanoseconds running() const {
    const int64_t since = since_.load(std::memory_order_acquire);
    return std::chrono::steady_clock::duration(since == 0 ? 0 : now() - since);
  }

 private:
  static int64_t now() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
  void run();

  const std::chrono::milliseconds limit_;
  const std::function<void()> bark_;
  std::atomic<int64_t> since_{0};  // 0: idle
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace thermocline
