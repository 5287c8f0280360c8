// ScoredPolicy: what policies by score share. Each expert has a score that only its own uses change, so the order of
// all others stays: residents lie in a heap, again with each use, and what is out of date is dropped when it comes to
// the top. A step costs what it changes, whatever the model's size.
#pragma once

#include <algorithm>
#include <queue>

#include "scheduler/placement/expert_policy.h"

namespace thermocline::sched {

class ScoredPolicy : public ExpertPolicy {
 public:
  explicit ScoredPolicy(const PolicyOptions& options)
      : o_(options),
        scores_(static_cast<size_t>(options.layers) * static_cast<size_t>(options.experts)),
        added_(scores_.size(), 0),
        dropped_(scores_.size(), 0) {}

  void observe(const StepUses& step) override {
    ++step_;
    candidates_.clear();
    for (const ExpertUse& use : step.uses) {
      count(use, step);
      candidates_.push_back(use.id);
    }
    counted(step);
  }

  std::vector<Admission> plan(const Residency& residency, int max_fills) override {
    const bool all_are_in = take_in(residency);
    std::erase_if(candidates_, [&](const ExpertId& id) {
      if (residency.resident(id) && !all_are_in) push(id);
      return residency.resident(id) || !wanted(id);
    });
    std::vector<Admission>& plan = last_plan_;
    plan.clear();
    if (max_fills <= 0) candidates_.clear();
    const auto most = std::min(candidates_.size(), static_cast<size_t>(std::max(0, max_fills)));
    std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<ptrdiff_t>(most), candidates_.end(),
                      [this](const ExpertId& a, const ExpertId& b) {
                        const double x = scores_[at(a)], y = scores_[at(b)];
                        return x > y || (x == y && luck(a) < luck(b));
                      });
    int free = residency.free_slots;
    for (size_t i = 0; i < most; ++i) {
      const ExpertId id = candidates_[i];
      Admission admission{id};
      if (free > 0) {
        --free;
      } else {
        const ExpertId victim = least(residency, group(id));
        if (victim.layer < 0) continue;
        if (!worth(id, victim)) {  // the others are worth less, and no other resident of the group is
          if (groups() == 1) break;
          continue;
        }
        drop(victim);
        admission.victim = victim;
      }
      add(id);
      plan.push_back(admission);
    }
    if (!plan.empty()) planned(plan);
    candidates_.clear();
    return plan;
  }

 protected:
  /// Changes the score of what was used.
  virtual void count(const ExpertUse& use, const StepUses& step) = 0;
  virtual void counted(const StepUses& step) { (void)step; }
  virtual bool wanted(const ExpertId& id) const {
    (void)id;
    return true;
  }
  virtual bool worth(const ExpertId& id, const ExpertId& victim) const { return scores_[at(id)] > scores_[at(victim)]; }
  virtual void planned(std::span<const Admission> plan) { (void)plan; }
  /// Experts that make room for each other: all, or those of a layer.
  virtual int group(const ExpertId& id) const {
    (void)id;
    return 0;
  }
  virtual int groups() const { return 1; }

  size_t at(const ExpertId& id) const { return static_cast<size_t>(id.layer * o_.experts + id.expert); }
  ExpertId id_of(size_t i) const { return {static_cast<int>(i) / o_.experts, static_cast<int>(i) % o_.experts}; }
  /// All scores have changed their order: residents are put in it anew with the next plan.
  void reorder() { heaps_.clear(); }

  const PolicyOptions o_;
  std::vector<double> scores_;        // [layers, experts]
  std::vector<ExpertId> candidates_;  // what the last step used
  int64_t step_ = 0;

 private:
  struct Entry {
    double score;
    size_t expert;
    bool operator<(const Entry& other) const {  // the top is the least
      return score > other.score || (score == other.score && expert > other.expert);
    }
  };
  using Heap = std::priority_queue<Entry>;

  // Among equals none is preferred for its layer's sake, and every run has the same luck.
  size_t luck(const ExpertId& id) const {
    return (at(id) * 2 + 1) * (static_cast<size_t>(step_) * 2 + 1) * 0x9e3779b97f4a7c15 >> 20;
  }
  // Residents that others put there: at the start, or where the owner of the slots did otherwise than planned. True:
  // the heaps were made anew.
  bool take_in(const Residency& residency) {
    ++plan_;
    size_t entries = 0;
    for (const Heap& heap : heaps_) entries += heap.size();
    const bool as_planned = std::all_of(last_plan_.begin(), last_plan_.end(),
                                        [&](const Admission& a) { return residency.resident(a.fill); });
    if (!heaps_.empty() && as_planned && residency.residents == residents_ && entries < 16 * scores_.size())
      return false;
    heaps_.assign(static_cast<size_t>(groups()), {});
    residents_ = residency.residents;
    for (size_t i = 0; i < scores_.size(); ++i)
      if (residency.slot_of[i] >= 0) push(id_of(i));
    return true;
  }
  void push(const ExpertId& id) { heaps_[static_cast<size_t>(group(id))].push({scores_[at(id)], at(id)}); }
  void add(const ExpertId& id) {
    push(id);
    added_[at(id)] = plan_;
    ++residents_;
  }
  void drop(const ExpertId& victim) {
    heaps_[static_cast<size_t>(group(victim))].pop();
    dropped_[at(victim)] = plan_;
    --residents_;
  }
  // The resident of a group that is worth least, at the top of its heap; none that this plan brings in.
  ExpertId least(const Residency& residency, int group_number) {
    Heap& heap = heaps_[static_cast<size_t>(group_number)];
    while (!heap.empty()) {
      const Entry top = heap.top();
      if (added_[top.expert] == plan_) return {-1, -1};
      if (residency.slot_of[top.expert] >= 0 && top.score == scores_[top.expert] && dropped_[top.expert] != plan_)
        return id_of(top.expert);
      heap.pop();
    }
    return {-1, -1};
  }

  std::vector<Heap> heaps_;
  std::vector<int64_t> added_, dropped_;  // the last plan that brought it in, that gave it up
  std::vector<Admission> last_plan_;
  int64_t plan_ = 0, residents_ = 0;
};

}  // namespace thermocline::sched
