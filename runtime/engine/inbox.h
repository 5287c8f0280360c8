// Inbox: what other threads want of the step loop. It is emptied before every step.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "runtime/engine/request.h"
#include "runtime/kv/prefix_cache.h"

namespace thermocline {

class Inbox {
 public:
  struct Mail {
    struct Submitted {
      Request request;
      std::shared_ptr<RequestHandle> handle;
      std::chrono::steady_clock::time_point at;
    };
    std::vector<Submitted> requests;
    std::vector<std::function<void(const PrefixCacheFlush&)>> flushes;  // of the prefix cache: told what went
  };

  void submit(Mail::Submitted submitted) {
    put([&] { mail_.requests.push_back(std::move(submitted)); });
  }
  void flush(std::function<void(const PrefixCacheFlush&)> done) {
    put([&] { mail_.flushes.push_back(std::move(done)); });
  }
  /// Something else has changed: a cancel, a drain.
  void wake() {
    put([] {});
  }

  Mail take() {
    const std::lock_guard lock(mutex_);
    news_ = false;
    return std::exchange(mail_, {});
  }
  /// Blocks until there is news or the time has come.
  void wait_until(std::chrono::steady_clock::time_point time) {
    std::unique_lock lock(mutex_);
    wake_.wait_until(lock, time, [&] { return news_; });
  }

 private:
  template <class Fn>
  void put(const Fn& fn) {
    {
      const std::lock_guard lock(mutex_);
      fn();
      news_ = true;
    }
    wake_.notify_one();
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  Mail mail_;
  bool news_ = false;
};

}  // namespace thermocline
