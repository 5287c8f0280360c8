// Ticker: wakes those who tell of themselves in regular intervals; a thread while there are any.
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace thermocline::server {

class Ticker {
 public:
  class Sleeper {
   public:
    virtual ~Sleeper() = default;
    /// The ticker's thread.
    virtual void tick() = 0;
  };

  explicit Ticker(std::chrono::milliseconds period) : period_(period) {}
  ~Ticker();
  Ticker(const Ticker&) = delete;
  Ticker& operator=(const Ticker&) = delete;

  /// Any thread: it is woken until it is gone.
  void add(std::weak_ptr<Sleeper> sleeper);

 private:
  void run();

  const std::chrono::milliseconds period_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::weak_ptr<Sleeper>> sleepers_;
  bool stop_ = false;
  std::thread thread_;  // from the first sleeper on; it waits where there is none
};

}  // namespace thermocline::server
