// FairQueue: in which order waiting requests are served. The highest priority goes first, and waiting raises it; among
// keys of the same priority, deficit round robin over prompt tokens, so that a key with long prompts or many requests
// takes no more than its turn. Virtual time: the caller says what time it is.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

namespace thermocline::sched {

struct WaitingRequest {
  uint64_t id = 0;
  std::string key;
  int priority = 0;
  int64_t tokens = 0;       // to be computed before its first token
  int64_t length = 0;       // tokens before those, whose rows it holds already
  int64_t pages = 0;        // of those rows
  bool all_logits = false;  // of every one of them
  int64_t arrived_ns = 0;
};

class FairQueue {
 public:
  static constexpr int64_t kAgeingNs = 10'000'000'000;  // waiting this long is worth one priority
  static constexpr int64_t kQuantum = 2048;             // tokens a key may spend a turn

  void push(WaitingRequest request);
  /// Back at the very front: it was running and was preempted. The one with the lowest id goes first.
  void push_preempted(WaitingRequest request);
  bool remove(uint64_t id);

  /// Who is next at this time; the same one until it is popped or removed, or somebody of a higher priority comes.
  const WaitingRequest* peek(int64_t now_ns);
  /// Removes what peek() gave.
  void pop();

  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }

 private:
  struct Key {
    std::string name;
    int64_t deficit = 0;
    std::deque<WaitingRequest> requests;  // by falling priority, then in the order they came
  };
  static int64_t level(const WaitingRequest& request, int64_t now_ns) {
    return request.priority + (now_ns - request.arrived_ns) / kAgeingNs;
  }

  std::vector<Key> keys_;  // those with requests, in the order of their turns; keys_[0] has the turn
  std::deque<WaitingRequest> preempted_;
  std::optional<std::pair<size_t, size_t>> chosen_;  // key and request within it; {keys_.size(), 0}: preempted
  size_t size_ = 0;
};

}  // namespace thermocline::sched
