// QueueTicket: a request's share of the queue's caps, taken before anything is paid for and given back when the request
// is admitted to a step, refused or gone.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#include "runtime/base/result.h"

namespace thermocline {

struct QueueCaps {
  int64_t requests = 256;
  int64_t tokens = 4 << 20;   // of prompts
  int64_t bytes = 256 << 20;  // of bodies and prompts in memory
};

/// Counts what waits. Any thread.
class QueueCounters {
 public:
  explicit QueueCounters(const QueueCaps& caps) : caps_(caps) {}
  struct Amount {
    int64_t requests = 0, tokens = 0, bytes = 0;
  };
  /// Errors: overloaded, saying which cap.
  Status take(const Amount& amount);
  void give_back(const Amount& amount);
  Amount waiting() const { return {requests_.load(), tokens_.load(), bytes_.load()}; }
  const QueueCaps& caps() const { return caps_; }

 private:
  const QueueCaps caps_;
  std::atomic<int64_t> requests_{0}, tokens_{0}, bytes_{0};
};

/// Move-only; gives back what it holds when it goes.
class QueueTicket {
 public:
  QueueTicket() = default;
  /// Errors: overloaded.
  static Result<QueueTicket> take(std::shared_ptr<QueueCounters> counters, const QueueCounters::Amount& amount);
  QueueTicket(QueueTicket&& other) noexcept
      : counters_(std::move(other.counters_)), amount_(std::exchange(other.amount_, {})) {}
  QueueTicket& operator=(QueueTicket&& other) noexcept {
    std::swap(counters_, other.counters_);
    std::swap(amount_, other.amount_);
    return *this;
  }
  ~QueueTicket() { release(); }

  bool held() const { return counters_ != nullptr; }
  /// Holds this much from now on: what a body's bytes turned out to be. Errors: overloaded, and nothing changed.
  Status change(const QueueCounters::Amount& amount);
  void release();

 private:
  std::shared_ptr<QueueCounters> counters_;
  QueueCounters::Amount amount_;
};

}  // namespace thermocline
