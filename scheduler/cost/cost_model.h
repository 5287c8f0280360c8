// CostModel: what a step of a model takes on a box, phase by phase. One code for the planner, who has neither, for the
// simulator, who knows which experts a layer missed, and for the running engine. Source: spec/scheduler.md 2.2 and 4.3.
#pragma once

#include <span>

#include "scheduler/cost/machine_profile.h"
#include "scheduler/cost/model_costs.h"
#include "scheduler/cost/step_time.h"

namespace thermocline::sched {

/// Tokens of a step that are alike.
struct StepPart {
  double tokens = 1;
  bool prefill = false;  // of one sequence; else each of its own
  double context = 0;    // that each one attends to
};

/// What the routers of a step chose, of a layer on average: different experts and (token, expert) pairs, of those that
/// have a device slot and of the others.
struct ExpertLoad {
  double here = 0, here_pairs = 0, missed = 0, missed_pairs = 0;
  double layers_with_miss = 1;  // share
};

/// A step of so many tokens, routed uniformly, with logits of a prompt's last token or of each that is decoded.
struct StepQuestion {
  double tokens = 1;
  bool prefill = false;
  double context = 0;
  double resident = 0;  // share of the experts that have a device slot
  double hits = 0;      // share of the (token, expert) pairs that find theirs there
  bool table_on_disk = false;
};

class CostModel {
 public:
  CostModel(const ModelCosts& model, const MachineProfile& machine) : m_(model), box_(machine) {}

  bool on_device() const { return !box_.gpus.empty(); }
  // Of one layer:
  double dense_ns(int layer, double tokens) const;
  double shared_ns(int layer, double tokens) const;  // the shared expert's part of that
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

  ExpertLoad expected_load(double tokens, double resident, double hits) const;
  StepTime step(std::span<const StepPart> parts, const ExpertLoad& load, double logit_rows) const;
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
