#include "scheduler/sim/serving.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>

#include "runtime/base/check.h"

namespace thermocline::sched {
namespace {

constexpr int64_t kRoutedTokens = 64;  // of a chunk; the others are routed like them

/// A request from its arrival to its last token.
struct SimRequest {
  int64_t prompt = 0, answer = 0, stored = 0, answered = 0;
  double arrives_ns = 0, first_ns = 0, last_ns = 0;
  bool running = false;
  int64_t remaining() const { return std::max<int64_t>(1, prompt + answered - stored); }
  bool decoding() const { return stored >= prompt && remaining() == 1; }
};

class SimServer {
 public:
  SimServer(const CostModel& cost, const ServingOptions& o, SimBox& box)
      : o_(o), box_(box), planner_(o.limits), router_(o.routing), random_(o.box.seed) {
    const ModelCosts& m = cost.model();
    step_.counts.assign(static_cast<size_t>(m.routed_layer_count()), std::vector<int>(static_cast<size_t>(m.experts)));
  }

  Result<ServingReport> run() {
    for (int i = 0; i < o_.requests; ++i)
      requests_.push_back({.prompt = vary(o_.prompt_tokens), .answer = vary(o_.answer_tokens)});
    for (const SimRequest& r : requests_)
      if (r.prompt + r.answer > o_.kv_tokens)
        return invalid("a request of " + std::to_string(r.prompt + r.answer) + " tokens does not fit a KV cache of " +
                       std::to_string(o_.kv_tokens));
    first_arrivals();
    while (finished_ < requests_.size()) {
      arrive();
      if (step()) continue;
      TC_CHECK(next_ < requests_.size(), "requests that nobody computes");
      box_.wait_until(requests_[next_].arrives_ns);
    }
    return report();
  }

 private:
  int64_t vary(int64_t around) {
    std::uniform_real_distribution<double> share(2.0 / 3, 4.0 / 3);
    return std::max<int64_t>(1, static_cast<int64_t>(share(random_) * static_cast<double>(around)));
  }

  void first_arrivals() {
    double time = 0;
    std::exponential_distribution<double> gap(o_.requests_per_second > 0 ? o_.requests_per_second : 1);
    for (size_t i = 0; i < requests_.size(); ++i) {
      if (o_.clients > 0) {
        requests_[i].arrives_ns = i < static_cast<size_t>(o_.clients) ? 0 : INFINITY;
        continue;
      }
      requests_[i].arrives_ns = time;
      if (o_.requests_per_second > 0) time += 1e9 * gap(random_);
    }
  }

  void arrive() {
    for (; next_ < requests_.size() && requests_[next_].arrives_ns <= box_.now(); ++next_)
      queue_.push({.id = next_,
                   .key = "",
                   .tokens = requests_[next_].prompt,
                   .arrived_ns = static_cast<int64_t>(requests_[next_].arrives_ns)});
  }

  KvPages pages() const {
    KvPages kv{.total = o_.kv_tokens / 256};
    kv.free = kv.total;
    for (const size_t i : running_) kv.free -= kv.of(requests_[i].stored);
    return kv;
  }

  // False: nobody has anything to compute.
  bool step() {
    const KvPages kv = pages();
    std::vector<RunningSequence> running;
    for (const size_t i : running_) {
      const SimRequest& r = requests_[i];
      running.push_back({.id = i,
                         .length = r.stored,
                         .remaining = r.remaining(),
                         .decoding = r.decoding(),
                         .pages = kv.of(r.stored)});
    }
    const StepPlan plan = planner_.plan(running, queue_, kv, static_cast<int64_t>(box_.now()), step_cost_);
    for (const uint64_t id : plan.preempt) preempt(id);
    for (const uint64_t id : plan.admit) running_.push_back(id);
    if (plan.parts.empty()) return false;
    fill_step(plan);
    step_cost_.observe(plan.tokens(), box_.step(step_, true));
    for (const StepPlan::Part& part : plan.parts) advance(part);
    return true;
  }

  void preempt(uint64_t id) {
    SimRequest& r = requests_[id];
    std::erase(running_, id);
    queue_.push_preempted(
        {.id = id, .key = "", .tokens = r.prompt + r.answered, .arrived_ns = static_cast<int64_t>(r.arrives_ns)});
    r.stored = 0;
    ++preemptions_;
  }

  void fill_step(const StepPlan& plan) {
    for (std::vector<int>& counts : step_.counts) std::fill(counts.begin(), counts.end(), 0);
    step_.tokens = plan.tokens();
    step_.prefill = false;
    double context = 0;
    for (const StepPlan::Part& part : plan.parts) {
      step_.prefill = step_.prefill || part.tokens > 1;
      context += static_cast<double>(part.tokens * requests_[part.id].stored);
      const int64_t routed = std::min(part.tokens, kRoutedTokens);
      for (int64_t t = 0; t < routed; ++t) {
        const auto times = static_cast<int>((t + 1) * part.tokens / routed - t * part.tokens / routed);
        const std::span<const TracePick> picks = router_.next(static_cast<uint32_t>(part.id));
        const size_t k = static_cast<size_t>(o_.routing.top_k),
                     stride = static_cast<size_t>(o_.routing.top_k + o_.routing.near_misses + 2 * o_.routing.guesses);
        for (size_t layer = 0; layer < step_.counts.size(); ++layer)
          for (size_t j = 0; j < k; ++j) step_.counts[layer][picks[layer * stride + j].expert] += times;
      }
    }
    step_.context = context / static_cast<double>(step_.tokens);
  }

  void advance(const StepPlan::Part& part) {
    SimRequest& r = requests_[part.id];
    const bool was_prompt = r.stored < r.prompt;
    r.stored += part.tokens;
    (was_prompt ? prompt_tokens_ : answer_tokens_) += part.tokens;
    if (part.logits == StepPlan::Part::Logits::none) return;
    if (r.answered++ == 0) r.first_ns = box_.now();
    if (r.answered < r.answer) return;
    r.last_ns = box_.now();
    std::erase(running_, part.id);
    router_.forget(static_cast<uint32_t>(part.id));
    ++finished_;
    if (o_.clients > 0)  // whoever waited for it sends its next one
      for (size_t i = next_; i < requests_.size(); ++i)
        if (std::isinf(requests_[i].arrives_ns)) {
          requests_[i].arrives_ns = box_.now();
          break;
        }
  }

  ServingReport report() const {
    ServingReport report;
    for (const SimRequest& r : requests_) {
      report.ttft_ms.push_back((r.first_ns - r.arrives_ns) / 1e6);
      if (r.answer > 1) report.tpot_ms.push_back((r.last_ns - r.first_ns) / 1e6 / static_cast<double>(r.answer - 1));
      report.answer_tokens += r.answer;
    }
    report.seconds = box_.now() / 1e9;
    report.prompt_tokens = prompt_tokens_;
    report.preemptions = preemptions_;
    report.box = box_.report();
    return report;
  }

  const ServingOptions& o_;
  SimBox& box_;
  const StepPlanner planner_;
  SyntheticRouter router_;
  std::mt19937_64 random_;
  StepCost step_cost_;
  FairQueue queue_;
  std::vector<SimRequest> requests_;
  std::vector<uint64_t> running_;  // in the order they were admitted
  SimBox::StepTokens step_;
  size_t next_ = 0, finished_ = 0;
  int64_t prompt_tokens_ = 0, answer_tokens_ = 0, preemptions_ = 0;
};

}  // namespace

Result<ServingReport> simulate_serving(const CostModel& cost, const ServingOptions& o) {
  const ModelCosts& m = cost.model();
  if (o.routing.layers != m.routed_layer_count() || o.routing.experts != m.experts ||
      o.routing.top_k != m.experts_per_token)
    return invalid("the routing is that of another model");
  if (o.box.staging.starts_with("router"))
    return invalid("nobody asks routers ahead in a simulated server: --staging popularity, last-token or coactivation");
  const auto within = [](const char* name, double value, double least, double most) -> Status {
    if (value >= least && value <= most) return {};
    char text[160];
    std::snprintf(text, sizeof text, "%s is %g, outside %g..%g", name, value, least, most);
    return invalid(text);
  };
  TC_RETURN_IF_ERROR(within("--serve-requests", o.requests, 1, 100'000));
  TC_RETURN_IF_ERROR(within("--prompt-tokens", static_cast<double>(o.prompt_tokens), 1, 1 << 24));
  TC_RETURN_IF_ERROR(within("--answer-tokens", static_cast<double>(o.answer_tokens), 1, 1 << 24));
  TC_RETURN_IF_ERROR(within("--clients", o.clients, 0, 100'000));
  if (o.requests_per_second != 0) TC_RETURN_IF_ERROR(within("--rate", o.requests_per_second, 1e-6, 1e6));
  TC_RETURN_IF_ERROR(within("--max-num-seqs", o.limits.max_num_seqs, 1, 4096));
  TC_RETURN_IF_ERROR(
      within("--max-num-batched-tokens", static_cast<double>(o.limits.max_num_batched_tokens), 1, 1 << 20));
  TC_ASSIGN(const std::unique_ptr<SimBox> box, SimBox::create(cost, o.box));
  return SimServer(cost, o, *box).run();
}

}  // namespace thermocline::sched
