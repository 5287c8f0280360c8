// ExpertStore: where the routed experts of some layers are, and how they come to host memory. All of them are there in
// ExpertsInMemory; a store on NVMe answers the same calls, and the simulator has its device (SimOptions::ram_experts,
// read_ahead). Source: spec/scheduler.md 2.12.
#pragma once

#include <vector>

#include "runtime/base/result.h"
#include "runtime/model/deepseek_v4/weights.h"
#include "scheduler/placement/expert_policy.h"

namespace thermocline {

/// Used by the thread that drives the step. Layers and experts count from 0.
class ExpertStore {
 public:
  /// Somebody waits for it; or a layer will probably ask for it, behind everybody who waits.
  enum class Urgency { demand, ahead };

  virtual ~ExpertStore() = default;
  virtual int layers() const = 0;
  virtual int experts() const = 0;
  /// Its weights in host memory; null: they are not there. Valid until the next ask() unless it is pinned.
  virtual const cpu::ExpertWeights* find(const sched::ExpertId& id) const = 0;
  /// Begins to bring it in. Asked again with demand, what was ahead comes first.
  virtual void ask(const sched::ExpertId& id, Urgency urgency) = 0;
  /// The router of a layer has spoken: what was asked for ahead of it and has not been asked for with demand since is
  /// given up.
  virtual void give_up_guesses(int layer) = 0;
  /// Waits for one that was asked for. Errors: io, corrupt: of the read.
  virtual Status await(const sched::ExpertId& id) = 0;
  /// As often as it is pinned it stays where it is.
  virtual void pin(const sched::ExpertId& id) = 0;
  virtual void unpin(const sched::ExpertId& id) = 0;
};

/// All of them, for as long as the layers live.
class ExpertsInMemory final : public ExpertStore {
 public:
  explicit ExpertsInMemory(std::vector<const deepseek_v4::LayerWeights*> layers) : layers_(std::move(layers)) {}
  int layers() const override { return static_cast<int>(layers_.size()); }
  int experts() const override { return static_cast<int>(layers_[0]->experts.size()); }
  const cpu::ExpertWeights* find(const sched::ExpertId& id) const override {
    return &layers_[static_cast<size_t>(id.layer)]->experts[static_cast<size_t>(id.expert)];
  }
  void ask(const sched::ExpertId&, Urgency) override {}
  void give_up_guesses(int) override {}
  Status await(const sched::ExpertId&) override { return {}; }
  void pin(const sched::ExpertId&) override {}
  void unpin(const sched::ExpertId&) override {}

 private:
  const std::vector<const deepseek_v4::LayerWeights*> layers_;
};

}  // namespace thermocline
