// RequestBook: every request that is answered now, and the last that were: what /v1/stats and /slots show, and the one
// way into the access log and the metrics.
#pragma once

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "runtime/server/access_log.h"

namespace thermocline::server {

/// A request in progress, as it tells about itself. Any thread.
class RequestInProgress {
 public:
  struct Look {
    const char* phase = "waiting";  // preparing, waiting, prefill, decode
    int64_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
  };
  virtual ~RequestInProgress() = default;
  virtual Look look() const = 0;
};

class RequestBook {
 public:
  using Clock = std::chrono::steady_clock;
  /// `observer` is told of every request that has ended, on the thread where it ended.
  explicit RequestBook(AccessLog& log, std::function<void(const AccessEntry&)> observer = nullptr)
      : log_(log), observer_(std::move(observer)) {}

  struct Active {
    std::string id, key, path;
    double seconds = 0;  // since its arrival
    RequestInProgress::Look look = {};
  };
  struct Recent {
    AccessEntry entry;
    Clock::time_point at;  // of its end
  };

  /// It is answered from now on, until ended() or it is gone.
  void began(const AccessEntry& entry, std::weak_ptr<const RequestInProgress> request);
  /// Its end: it leaves, and is remembered and logged.
  void ended(const AccessEntry& entry);

  std::vector<Active> active() const;
  std::vector<Recent> recent() const;  // newest first

 private:
  struct Entry {
    std::string key, path;
    Clock::time_point at;
    std::weak_ptr<const RequestInProgress> request;
  };
  AccessLog& log_;
  const std::function<void(const AccessEntry&)> observer_;
  mutable std::mutex mutex_;
  std::multimap<std::string, Entry> active_;  // by request id
  std::deque<Recent> recent_;                 // newest first
};

}  // namespace thermocline::server
