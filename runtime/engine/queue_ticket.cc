#include "runtime/engine/queue_ticket.h"

#include <string>

namespace thermocline {
namespace {

// Adds where the sum stays within the cap, or where nothing was there: else what is larger than it never gets in.
bool add_within(std::atomic<int64_t>& counter, int64_t amount, int64_t cap) {
  int64_t now = counter.load(std::memory_order_relaxed);
  do {
    if (amount > 0 && now > 0 && now + amount > cap) return false;
  } while (!counter.compare_exchange_weak(now, now + amount, std::memory_order_relaxed));
  return true;
}

Error full(const char* what, int64_t cap) {
  return {ErrorCode::overloaded,
          "the queue is full: " + std::to_string(cap) + " " + what + " wait already; try again later"};
}

}  // namespace

Status QueueCounters::take(const Amount& amount) {
  if (!add_within(requests_, amount.requests, caps_.requests)) return full("requests", caps_.requests);
  if (!add_within(tokens_, amount.tokens, caps_.tokens)) {
    requests_ -= amount.requests;
    return full("prompt tokens", caps_.tokens);
  }
  if (!add_within(bytes_, amount.bytes, caps_.bytes)) {
    requests_ -= amount.requests;
    tokens_ -= amount.tokens;
    return full("bytes", caps_.bytes);
  }
  return {};
}

void QueueCounters::give_back(const Amount& amount) {
  requests_ -= amount.requests;
  tokens_ -= amount.tokens;
  bytes_ -= amount.bytes;
}

Result<QueueTicket> QueueTicket::take(std::shared_ptr<QueueCounters> counters, const QueueCounters::Amount& amount) {
  TC_RETURN_IF_ERROR(counters->take(amount));
  QueueTicket ticket;
  ticket.counters_ = std::move(counters);
  ticket.amount_ = amount;
  return ticket;
}

Status QueueTicket::change(const QueueCounters::Amount& amount) {
  if (!counters_) return {};
  TC_RETURN_IF_ERROR(counters_->take(
      {amount.requests - amount_.requests, amount.tokens - amount_.tokens, amount.bytes - amount_.bytes}));
  amount_ = amount;
  return {};
}

void QueueTicket::release() {
  if (counters_) counters_->give_back(amount_);
  counters_.reset();
  amount_ = {};
}

}  // namespace thermocline
