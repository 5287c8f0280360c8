// The step thread: generations run one after another, in the order they came.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include "runtime/server/exchange.h"

namespace thermocline::server {

class GenerationQueue {
 public:
  GenerationQueue() : thread_([this] { run(); }) {}
  ~GenerationQueue() { stop(); }

  /// Any thread. A waiting exchange that was cancelled is dropped when its turn comes.
  void submit(std::shared_ptr<Exchange> exchange);
  size_t waiting();
  /// Cancels what runs and waits, and ends the step thread.
  void stop();

 private:
  void run();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Exchange>> queue_;
  std::shared_ptr<Exchange> running_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace thermocline::server
