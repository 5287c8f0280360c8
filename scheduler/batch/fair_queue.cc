#include "scheduler/batch/fair_queue.h"

#include <algorithm>

namespace thermocline::sched {

void FairQueue::push(WaitingRequest request) {
  auto key = std::find_if(keys_.begin(), keys_.end(), [&](const Key& k) { return k.name == request.key; });
  if (key == keys_.end()) key = keys_.insert(keys_.end(), Key{request.key, 0, {}});
  const auto place = std::find_if(key->requests.rbegin(), key->requests.rend(), [&](const WaitingRequest& other) {
                       return other.priority >= request.priority;
                     }).base();
  key->requests.insert(place, std::move(request));
  chosen_.reset();
  ++size_;
}

void FairQueue::push_preempted(WaitingRequest request) {
  const auto place = std::find_if(preempted_.begin(), preempted_.end(),
                                  [&](const WaitingRequest& other) { return other.id > request.id; });
  preempted_.insert(place, std::move(request));
  chosen_.reset();
  ++size_;
}

bool FairQueue::remove(uint64_t id) {
  const auto is_it = [&](const WaitingRequest& request) { return request.id == id; };
  if (const auto it = std::find_if(preempted_.begin(), preempted_.end(), is_it); it != preempted_.end()) {
    preempted_.erase(it);
    chosen_.reset();
    return --size_, true;
  }
  for (auto key = keys_.begin(); key != keys_.end(); ++key) {
    const auto it = std::find_if(key->requests.begin(), key->requests.end(), is_it);
    if (it == key->requests.end()) continue;
    key->requests.erase(it);
    if (key->requests.empty()) keys_.erase(key);
    chosen_.reset();
    return --size_, true;
  }
  return false;
}

// Turns go round until a key of the highest level can pay for its request: each turn adds the quantum to its purse, so
// how many turns it takes follows from the missing tokens, and they are added at once.
const WaitingRequest* FairQueue::peek(int64_t now_ns) {
  if (!preempted_.empty()) {
    chosen_ = {keys_.size(), 0};
    return &preempted_.front();
  }
  if (keys_.empty()) return nullptr;
  // Of each key the request of the highest level; the first of equals came first.
  std::vector<size_t> best(keys_.size());
  int64_t top = INT64_MIN;
  for (size_t k = 0; k < keys_.size(); ++k) {
    const auto& requests = keys_[k].requests;
    const auto it = std::max_element(requests.begin(), requests.end(),
                                     [&](const auto& a, const auto& b) { return level(a, now_ns) < level(b, now_ns); });
    best[k] = static_cast<size_t>(it - requests.begin());
    top = std::max(top, level(*it, now_ns));
  }
  int64_t fewest_turns = INT64_MAX;
  size_t winner = 0;
  const auto turns_of = [&](size_t k) {
    const int64_t missing = keys_[k].requests[best[k]].tokens - keys_[k].deficit;
    return missing <= 0 ? 0 : (missing + kQuantum - 1) / kQuantum;
  };
  for (size_t k = 0; k < keys_.size(); ++k) {
    if (level(keys_[k].requests[best[k]], now_ns) != top) continue;
    if (turns_of(k) < fewest_turns) {
      fewest_turns = turns_of(k);
      winner = k;
    }
  }
  if (fewest_turns > 0)
    for (size_t k = 0; k < keys_.size(); ++k)
      if (level(keys_[k].requests[best[k]], now_ns) == top) keys_[k].deficit += fewest_turns * kQuantum;
  chosen_ = {winner, best[winner]};
  return &keys_[winner].requests[best[winner]];
}

void FairQueue::pop() {
  if (!chosen_) return;
  const auto [k, r] = *chosen_;
  chosen_.reset();
  --size_;
  if (k == keys_.size()) {
    preempted_.pop_front();
    return;
  }
  Key key = std::move(keys_[k]);
  key.deficit -= key.requests[r].tokens;
  key.requests.erase(key.requests.begin() + static_cast<std::ptrdiff_t>(r));
  keys_.erase(keys_.begin() + static_cast<std::ptrdiff_t>(k));
  // The turn passes on; who has nothing more to ask for keeps no savings.
  if (!key.requests.empty()) keys_.push_back(std::move(key));
}

}  // namespace thermocline::sched
