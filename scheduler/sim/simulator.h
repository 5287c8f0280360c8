// The simulator: a trace of routed tokens through the production policies and step shape over simulated devices, in
// virtual time. What comes out is what one would measure. Source: spec/scheduler.md 3.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "runtime/base/statistics.h"
#include "scheduler/cost/cost_model.h"
#include "scheduler/cost/expert_cost.h"
#include "scheduler/placement/slot_scheduler.h"
#include "scheduler/predict/predictor.h"
#include "scheduler/predict/referee.h"
#include "scheduler/predict/reliability.h"
#include "scheduler/sim/devices.h"
#include "scheduler/sim/expert_slots.h"
#include "scheduler/stats/slack.h"
#include "scheduler/trace/trace.h"

namespace thermocline::sched {

struct SimOptions {
  std::string policy = "value";
  int slots = 0;           // experts that the device holds
  int max_fills = 64;      // of a step, beside what idle copies allow
  double context = 1024;   // tokens each attends to
  double ram_experts = 1;  // share of the experts that host memory holds; the others are read from disk when needed
  /// Who guesses the missing experts of the next layer, which the CPU reads into its caches while the device is at
  /// attention; empty: nobody. So many of them fit the caches (spec 2.7).
  std::string staging = {};
  int staged_experts = 3;
  /// The same predictor's guesses of the next layer that are read from the disk while this one runs, behind what is
  /// needed now; what has not come when the router has spoken is given up (spec 2.12).
  int read_ahead = 0;
  bool stream_prefill = true;  // a prompt's steps stream their heaviest missing experts
  std::vector<float> profile = {};
  int64_t measure_from = 0;  // tokens of the trace that only warm up
  double noise = 0;
  uint64_t seed = 1;
  std::vector<SimFault> faults = {};
  int recorded_steps = 0;  // spans of the first measured steps
};

/// Of the measured steps.
struct SimReport {
  std::string policy;
  int64_t tokens = 0, steps = 0;
  std::vector<double> step_ns;
  double total_ns = 0;
  double pairs = 0, hits = 0;     // (token, expert)
  double fills = 0, fetched = 0;  // between steps; by steps
  double ended_fills = 0, useful_fills = 0;
  double layers = 0, zero_miss_layers = 0;
  /// Of the layers at the end, of steps without prompts: how much longer the CPU's branch takes, in which share of the
  /// steps it does, what one more resident expert would save, and in which share so many are missing.
  double slack_ns = 0, cpu_critical = 0, saved_by_one_more_ns = 0;
  std::array<double, LayerSlack::kBins> missing{};
  double staged = 0, staged_right = 0;          // experts read ahead into caches; those among them that were needed
  double read_ahead = 0, read_ahead_right = 0;  // the same, from the disk
  Referee::State staging_verdict = Referee::State::testing;
  std::array<double, kEngineNames.size()> busy_ns{};
  double overlap_ns = 0;
  double cpu_bytes = 0, gpu_bytes = 0, bus_bytes = 0, disk_bytes = 0;
  std::vector<SimSpan> spans;

  double hit_rate() const { return pairs > 0 ? hits / pairs : 0; }
  double ms_per_token() const { return tokens > 0 ? total_ns / 1e6 / static_cast<double>(tokens) : 0; }
  double tokens_per_second() const { return total_ns > 0 ? 1e9 * static_cast<double>(tokens) / total_ns : 0; }
  double step_ms(double percent) const;
  double fills_per_token() const { return tokens > 0 ? (fills + fetched) / static_cast<double>(tokens) : 0; }
  /// Of moving bytes alone, by usual figures a byte: memory of the host 100 pJ, of the device 40 pJ, bus 60 pJ.
  double joules_per_token() const;
};

/// One box and what it holds, step after step.
class SimBox {
 public:
  /// The model outlives it. Errors: invalid_argument for an unknown policy or more slots than experts.
  static Result<std::unique_ptr<SimBox>> create(const CostModel& cost, const SimOptions& options,
                                                const Trace* future = nullptr);

  struct StepTokens {
    std::vector<std::vector<int>> counts;  // by layer with routed experts: tokens of each expert
    /// By distance and layer: what routers asked ahead said of the step's tokens, by rank; or empty.
    std::vector<std::vector<TracePick>> asked[2] = {};
    int64_t tokens = 0;
    bool prefill = false;
    double context = 0;
  };
  /// Runs a step and what policies decide after it. Returns its nanoseconds.
  double step(const StepTokens& tokens, bool measured);
  double now() const { return events_.now(); }
  /// Lets time go by.
  void wait_until(double ns);
  /// What the measured steps were.
  SimReport report() const;

 private:
  /// An expert of the layer that runs, and its tokens.
  struct Active {
    int expert = 0;
    int64_t tokens = 0;
  };
  SimBox(const CostModel& cost, const SimOptions& options);
  // Layers are those with routed experts; layers without are computed before the next one of them.
  void begin_layer(int layer);
  double dense_ns(int first, int last);
  void routed(int layer);
  void part_began() { ++waiting_; }
  void part_ended(int layer);
  void fetch(int layer, const std::vector<Active>& missing, std::vector<bool>& taken);
  bool in_memory(const ExpertId& id) const { return !memory_policy_ || memory_.resident(memory_.at(id)); }
  void stage(int layer);
  void read_ahead(int layer);
  void read_from_disk(const char* what, std::function<void()> done, bool urgent, int tag = 0);
  Known known_of(int layer) const;
  void learn(int layer);
  void run_on_cpu(int layer, const std::vector<Active>& missing);
  LayerSplit split_of(const std::vector<int>& counts, const std::vector<bool>& on_device) const;
  std::vector<size_t> to_fetch(const std::vector<Active>& missing, const LayerSplit& split);
  void decide(double step_ns, double cpu_ns);

  const CostModel& cost_;
  const SimOptions o_;
  EventQueue events_;
  Devices devices_;
  std::vector<int> last_layers_;  // of the model: each that has routed experts
  ExpertSlots slots_, memory_;    // of the device; of the host, where it does not hold all
  std::unique_ptr<SlotScheduler> scheduler_;
  std::unique_ptr<ExpertPolicy> memory_policy_;
  ExpertCosts costs_;
  std::vector<LayerSlack> slack_;
  std::unique_ptr<ExpertPredictor> predictor_;
  Reliability reliability_;
  Referee referee_;
  std::vector<Guess> guesses_, ahead_guesses_;
  std::vector<TracePick> before_, here_;  // experts of the layer before and of this one
  std::vector<bool> staged_;              // of this layer
  /// An expert of the next layer that the disk was asked for ahead.
  struct Ahead {
    bool asked = false, there = false;
    std::function<void()> awaited = {};  // by whoever needs it
  };
  std::shared_ptr<std::vector<Ahead>> ahead_;  // of the next layer, then of this one; null: nobody was asked
  const StepTokens* now_running_ = nullptr;
  std::vector<ExpertUse> uses_;
  std::vector<ExpertId> fetched_, read_;
  double carried_fetches_ = 0;  // fractions of a fetch
  int waiting_ = 0;             // parts of the layer that runs
  std::shared_ptr<int> due_copies_, coming_copies_;
  bool ended_ = false, measured_ = false;
  SimReport report_;
};

/// A trace, step by step.
Result<SimReport> simulate(const CostModel& cost, const Trace& trace, const SimOptions& options);

}  // namespace thermocline::sched
