#include "runtime/server/generation_queue.h"

namespace thermocline::server {

void GenerationQueue::stop() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    for (const auto& exchange : queue_) exchange->cancel = true;
    if (running_) running_->cancel = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void GenerationQueue::submit(std::shared_ptr<Exchange> exchange) {
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(exchange));
  }
  wake_.notify_one();
}

size_t GenerationQueue::waiting() {
  const std::lock_guard lock(mutex_);
  return queue_.size();
}

void GenerationQueue::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stop_ || !queue_.empty(); });
    if (queue_.empty()) return;
    running_ = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    if (running_->cancel)
      running_->finish();
    else
      running_->work(*running_);
    lock.lock();
    running_.reset();
  }
}

}  // namespace thermocline::server
