#include "runtime/server/api/ticker.h"

namespace thermocline::server {

Ticker::~Ticker() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Ticker::add(std::weak_ptr<Sleeper> sleeper) {
  const std::lock_guard lock(mutex_);
  sleepers_.push_back(std::move(sleeper));
  if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
  changed_.notify_all();
}

void Ticker::run() {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    if (sleepers_.empty()) {
      changed_.wait(lock);
      continue;
    }
    changed_.wait_for(lock, period_, [this] { return stop_; });
    std::vector<std::shared_ptr<Sleeper>> awake;
    for (const std::weak_ptr<Sleeper>& sleeper : sleepers_)
      if (auto one = sleeper.lock()) awake.push_back(std::move(one));
    sleepers_.assign(awake.begin(), awake.end());
    lock.unlock();
    for (const std::shared_ptr<Sleeper>& sleeper : awake) sleeper->tick();
    awake.clear();  // what ends here does so without the lock
    lock.lock();
  }
}

}  // namespace thermocline::server
