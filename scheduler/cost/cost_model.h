// CostModel: what a step of a model takes on a box, phase by phase. One code for the planner, who has neither, for the
// simulator, who knows which experts a layer missed, and for the running engine. Source: spec/scheduler.md 2.2 and 4.3.
#pragma once

#include <array>

#include "scheduler/cost/machine_profile.h"
#include "scheduler/cost/model_costs.h"

namespace thermocline::sched {

enum class Phase { dense, attention, index, experts_cpu, experts_gpu, handover, copies, head, table };
constexpr std::array<const char*, 9> kPhaseNames = {"dense",    "attention", "index", "experts (CPU)", "experts (GPU)",
                                                    "handover", "copies",    "head",  "table"};

/// Nanoseconds of a step. Phases that run beside each other are all in `phases`; `total` has the longer one.
struct StepTime {
  std::array<double, kPhaseNames.size()> phases{};
  double total = 0;
  double& operator[](Phase phase) { return phases[static_cast<size_t>(phase)]; }
  double operator[](Phase phase) const { return phases[static_cast<size_t>(phase)]; }
  /// The phase that takes longest of those that are not hidden behind another.
  Phase bottleneck() const;
};

/// A step of so many tokens.
struct StepQuestion {
  double tokens = 1;
  bool prefill = false;  // of one sequence, with logits of the last token only; else each of its own
  double context = 0;    // that each one attends to
  double resident = 0;   // share of the experts that have a device slot
  double hits = 0;       // share of the (token, expert) pairs that find theirs there
  bool table_on_disk = false;
};

class CostModel {
 public:
  CostModel(const ModelCosts& model, const MachineProfile& machine) : m_(model), box_(machine) {}

  bool on_device() const { return !box_.gpus.empty(); }
  // Of one layer:
  double dense_ns(int layer, double tokens) const;
  double attention_ns(int layer, double tokens, double context, bool together) const;
  double index_ns(int layer, double tokens, double context, bool together) const;
  /// One expert with n tokens.
  double expert_cpu_ns(double n) const { return m_.expert_bytes * weights(box_.cpu.weights, m_.expert_format, n); }
  double expert_gpu_ns(double n) const;
  double h2d_ns() const;  // one expert to the device
  double handover_ns() const { return on_device() ? box_.gpus[0].sync_ns : 0; }
  double head_ns(double rows) const;
  /// The rows of a model's table that a step's tokens read from the disk.
  double table_ns(double tokens) const;

  StepTime step(const StepQuestion& q) const;

  const ModelCosts& model() const { return m_; }
  const MachineProfile& machine() const { return box_; }

 private:
  static double weights(const std::array<KernelCurve, 3>& curves, WeightFormat format, double n) {
    return curves[static_cast<size_t>(format)].ns_per_byte(n);
  }
  const ModelCosts& m_;
  const MachineProfile& box_;
};

}  // namespace thermocline::sched
