// PrepPool: where requests are read, rendered and tokenised: off the network thread and beside the step.
#pragma once

#include <functional>
#include <memory>

namespace thermocline::server {

class PrepPool {
 public:
  /// `threads` tasks run at a time (0: a quarter of the cores, at least one).
  explicit PrepPool(int threads = 0);
  /// Waits for every task.
  ~PrepPool();

  /// Any thread. What a task throws is logged and goes no further.
  void run(std::function<void()> task);
  /// Returns when no task is left.
  void wait();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace thermocline::server
