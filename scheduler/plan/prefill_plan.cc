// Long steps: whether the experts without a slot are computed where they lie, copied to the device, or both.
#include <algorithm>
#include <cmath>
#include <set>

#include "scheduler/plan/box_plan.h"

namespace thermocline::sched {
namespace {

// The experts of one layer, each with the same share of the tokens.
struct ExpertsOfAStep {
  const CostModel& cost;
  double here = 0, missing = 0;  // experts that some token goes to
  double tokens = 1;             // of each

  ExpertsOfAStep(const CostModel& model, double step_tokens, double resident) : cost(model) {
    const double touched = model.model().unique_experts(step_tokens);
    here = touched * resident;
    missing = touched - here;
    tokens = std::max(1.0, step_tokens * model.model().experts_per_token / std::max(touched, 1.0));
  }
  double gpu_ns(double experts) const { return experts > 0 ? experts * cost.expert_gpu_ns(tokens) : 0; }
  double cpu_ns(double experts) const { return experts * cost.expert_cpu_ns(tokens); }
  // While copies read the same memory.
  double cpu_beside_copies_ns(double experts) const {
    const CpuProfile& cpu = cost.machine().cpu;
    const double rate = cpu.read_bytes_per_second * cost.machine().gpus[0].cpu_read_share_beside_h2d;
    return std::max(cpu_ns(experts), rate > 0 ? 1e9 * experts * cost.model().expert_bytes / rate : 0);
  }
};

struct ExpertTimes {
  double gpu = 0, cpu = 0, copies = 0;
  double longest() const { return std::max({gpu, cpu, copies}); }
  Phase bottleneck() const {
    return longest() == copies ? Phase::copies : longest() == cpu ? Phase::experts_cpu : Phase::experts_gpu;
  }
};

// A share of the missing ones streamed, the others on the CPU.
ExpertTimes streaming(const ExpertsOfAStep& e, double share) {
  const double streamed = e.missing * share, left = e.missing - streamed;
  const double cpu = left <= 0 ? 0 : share > 0 ? e.cpu_beside_copies_ns(left) : e.cpu_ns(left);
  return {e.gpu_ns(e.here + streamed), cpu, streamed > 0 ? streamed * e.cost.h2d_ns() : 0};
}

ExpertTimes experts_of(const ExpertsOfAStep& e, PrefillExperts experts) {
  if (!e.cost.on_device()) return {0, e.cpu_ns(e.here + e.missing), 0};
  if (experts != PrefillExperts::hybrid) return streaming(e, experts == PrefillExperts::stream ? 1 : 0);
  constexpr int kShares = 64;
  ExpertTimes best = streaming(e, 0);
  for (int i = 1; i <= kShares; ++i)
    if (const ExpertTimes t = streaming(e, i / static_cast<double>(kShares)); t.longest() < best.longest()) best = t;
  return best;
}

// The layers that so many of a prompt's last tokens pass through; 0: all of them.
StepTime layers_of(const CostModel& cost, PrefillExperts experts, double tokens, double context, double resident,
                   int64_t tail) {
  const ExpertTimes of_layer = experts_of(ExpertsOfAStep(cost, tokens, resident), experts);
  int routed = 0;
  StepTime t;
  for (int layer = 0; layer < cost.model().layer_count(); ++layer) {
    const LayerCosts& l = cost.model().layers[static_cast<size_t>(layer)];
    if (l.prompt_tail != tail) continue;
    routed += l.routed;
    t[Phase::dense] += cost.dense_ns(layer, tokens);
    t[Phase::attention] += cost.attention_ns(layer, tokens, context, true);
    t[Phase::index] += cost.index_ns(layer, tokens, context, true);
  }
  t[of_layer.bottleneck()] = routed * of_layer.longest();
  if (of_layer.cpu > 0) t[Phase::handover] = routed * cost.handover_ns();
  return t;
}

double sum_of(const StepTime& t) {
  double ns = 0;
  for (const double phase : t.phases) ns += phase;
  return ns;
}

}  // namespace

double prefill_step_ns(const CostModel& cost, PrefillExperts experts, double tokens, double context, double resident,
                       Phase* bottleneck) {
  StepTime t = layers_of(cost, experts, tokens, context, resident, 0);
  t[Phase::head] = cost.head_ns(1);
  if (bottleneck) *bottleneck = t.bottleneck();
  return sum_of(t);
}

double prompt_end_ns(const CostModel& cost, PrefillExperts experts, double context, double resident) {
  double ns = 0;
  std::set<int64_t> tails;
  for (const LayerCosts& l : cost.model().layers) tails.insert(l.prompt_tail);
  tails.erase(0);
  for (const int64_t tail : tails) {
    const double tokens = std::min(static_cast<double>(tail), context);
    ns += sum_of(layers_of(cost, experts, tokens, context, resident, tail));
  }
  return ns;
}

}  // namespace thermocline::sched
