// GhostCache: what a cache by one half-life would hit and fill, over a sample of the experts: ids only. Several of them
// side by side say which half-life suits what is being served. Source: spec/scheduler.md 2.3.
#pragma once

#include <cstdint>
#include <queue>
#include <vector>

#include "scheduler/stats/decayed_counts.h"

namespace thermocline::sched {

class GhostCache {
 public:
  /// Experts that every ghost keeps an eye on: one in kSampled, chosen by a hash of their number.
  static constexpr size_t kSampled = 8;
  static bool watches(size_t expert) { return (expert * 0x9e3779b97f4a7c15 >> 32) % kSampled == 0; }

  GhostCache(size_t half_life, size_t experts, size_t slots)
      : half_life_(half_life), slots_(slots / kSampled), here_(experts) {}

  /// A watched expert was used. counts: with this use in it.
  ///   margin  how much better a newcomer is to be
  void use(size_t expert, const DecayedCounts& counts, double margin) {
    ++uses_;
    if (here_[expert]) {
      ++hits_;
      return;
    }
    const double sum = counts.sum(expert, half_life_);
    if (residents_ >= slots_) {
      while (!heap_.empty()) {
        const Entry top = heap_.top();
        const double now = counts.sum(top.expert, half_life_);
        if (now == top.sum) break;
        heap_.pop();
        heap_.push({now, top.expert});
      }
      if (heap_.empty() || sum <= margin * heap_.top().sum) return;
      here_[heap_.top().expert] = false;
      heap_.pop();
      --residents_;
    }
    here_[expert] = true;
    ++residents_;
    ++fills_;
    heap_.push({sum, expert});
  }
  /// Every sum was scaled: the heap is made anew from them.
  void rebuild(const DecayedCounts& counts) {
    heap_ = {};
    for (size_t i = 0; i < here_.size(); ++i)
      if (here_[i]) heap_.push({counts.sum(i, half_life_), i});
  }
  /// Hits less what fills cost, in hits, as a share of the uses since the last call.
  double take_score(double fill_cost) {
    const double score =
        uses_ > 0 ? (static_cast<double>(hits_) - fill_cost * static_cast<double>(fills_)) / static_cast<double>(uses_)
                  : 0;
    hits_ = fills_ = uses_ = 0;
    return score;
  }

 private:
  struct Entry {
    double sum;
    size_t expert;
    bool operator<(const Entry& other) const { return sum > other.sum || (sum == other.sum && expert > other.expert); }
  };
  const size_t half_life_, slots_;
  std::vector<bool> here_;
  std::priority_queue<Entry> heap_;  // the top is the least
  size_t residents_ = 0;
  int64_t hits_ = 0, fills_ = 0, uses_ = 0;
};

}  // namespace thermocline::sched
