#include "scheduler/sim/simulator.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace thermocline::sched {
namespace {

constexpr double kStagedShare = 0.15;  // of its time that an expert takes out of the caches
constexpr float kLeastChance = 0.05f;  // of a guess that is worth reading
constexpr int64_t kMostStagedTokens = Referee::kMostTokens;
constexpr const char* kStaging = "staging";
constexpr const char* kReadAhead = "read ahead";
constexpr double kHostJoules = 100e-12, kDeviceJoules = 40e-12, kBusJoules = 60e-12;  // a byte

int memory_slots(const CostModel& cost, const SimOptions& o) {
  return static_cast<int>(std::min(1.0, o.ram_experts) * cost.model().experts * cost.model().routed_layer_count());
}

}  // namespace

double SimReport::step_ms(double percent) const { return step_ns.empty() ? 0 : percentile(step_ns, percent) / 1e6; }

double SimReport::joules_per_token() const {
  return tokens > 0 ? (cpu_bytes * kHostJoules + gpu_bytes * kDeviceJoules + bus_bytes * (kBusJoules + kHostJoules)) /
                          static_cast<double>(tokens)
                    : 0;
}

SimBox::SimBox(const CostModel& cost, const SimOptions& o)
    : cost_(cost),
      o_(o),
      devices_(events_, cost.machine(), o.noise, o.seed, o.faults),
      slots_(cost.model().routed_layer_count(), cost.model().experts, o.slots),
      memory_(cost.model().routed_layer_count(), cost.model().experts, memory_slots(cost, o)),
      costs_(expert_costs(cost)),
      slack_(static_cast<size_t>(cost.model().routed_layer_count())),
      due_copies_(std::make_shared<int>(0)),
      coming_copies_(std::make_shared<int>(0)) {
  report_.policy = o.policy;
  for (int i = 0; i < cost.model().layer_count(); ++i)
    if (cost.model().layers[static_cast<size_t>(i)].routed) last_layers_.push_back(i);
}

Result<std::unique_ptr<SimBox>> SimBox::create(const CostModel& cost, const SimOptions& o, const Trace* future) {
  const ModelCosts& m = cost.model();
  const int all = m.experts * m.routed_layer_count();
  if (o.read_ahead < 0 || (o.read_ahead > 0 && o.staging.empty()))
    return invalid("--read-ahead should be a number of experts, with --staging to say who guesses them");
  if (o.read_ahead > 0 && o.ram_experts >= 1)
    return invalid("--read-ahead without a disk: all experts are in memory (--ram-experts 0.5 --nvme 7GB/s)");
  if (o.staged_experts < 1) return invalid("--staged-experts should be at least 1");
  if (o.slots < 0 || o.slots > all)
    return invalid(std::to_string(o.slots) + " slots: the model has " + std::to_string(all) + " experts");
  if (all == 0) return invalid("a model without routed experts");
  std::unique_ptr<SimBox> box(new SimBox(cost, o));
  const MachineProfile& machine = cost.machine();
  PolicyOptions options{
      .layers = m.routed_layer_count(), .experts = m.experts, .slots = o.slots, .profile = o.profile, .future = future};
  if (cost.on_device()) {
    const double bus = machine.gpus[0].h2d_bytes_per_second, cpu = 1e9 * m.expert_bytes / cost.expert_cpu_ns(1);
    options.demand_share = bus / (bus + cpu);
    options.costs = &box->costs_;
  }
  TC_ASSIGN(box->scheduler_,
            SlotScheduler::create(
                {.policy = o.policy, .of = options, .max_fills = o.max_fills, .fill_ns = box->costs_.h2d_ns}));
  options.slots = box->memory_.slots();
  if (options.slots < all) {
    if (machine.disk.read_bytes_per_second <= 0)
      return invalid("host memory does not hold all experts, and there is no disk to read the others from");
    // Below what one token reads, whatever came last goes before it is needed again: those that are there stay.
    const bool below_a_token = options.slots < m.experts_per_token * m.routed_layer_count();
    box->memory_policy_ = below_a_token ? make_static_policy(options) : make_freetoken_policy(options);
  }
  for (const PredictorInfo& info : predictors())
    if (info.name == o.staging) box->predictor_ = info.make(m.routed_layer_count(), m.experts);
  if (!o.staging.empty() && !box->predictor_) {
    std::string names;
    for (const PredictorInfo& info : predictors()) names += (names.empty() ? "" : ", ") + std::string(info.name);
    return invalid("unknown predictor '" + o.staging + "': use one of " + names);
  }
  // Both begin full, by the profile.
  const std::unique_ptr<ExpertPolicy> first = make_static_policy(options);
  for (const Admission& a : first->plan(box->memory_.residency(), all)) box->memory_.begin_with(a.fill);
  for (const Admission& a : box->scheduler_->first(box->slots_.residency())) box->slots_.begin_with(a.fill);
  return box;
}

void SimBox::wait_until(double ns) {
  bool reached = false;
  events_.at(std::max(ns, events_.now()), [&reached] { reached = true; });
  while (!reached) events_.step();
}

double SimBox::step(const StepTokens& tokens, bool measured) {
  now_running_ = &tokens;
  measured_ = measured;
  fetched_.clear();
  read_.clear();
  const double begin = events_.now();
  devices_.reset_counters();
  while (*due_copies_ > 0) events_.step();  // the table waits for what was to be in it
  due_copies_ = std::exchange(coming_copies_, std::make_shared<int>(0));
  slots_.begin_step();
  memory_.begin_step();
  const bool record = measured && report_.steps < o_.recorded_steps;
  devices_.record(record ? &report_.spans : nullptr);
  ended_ = false;
  begin_layer(0);
  while (!ended_) events_.step();
  devices_.settle();
  const double ns = events_.now() - begin, cpu_ns = devices_.busy_ns(Engine::cpu);
  if (measured) {
    for (size_t i = 0; i < report_.busy_ns.size(); ++i) report_.busy_ns[i] += devices_.busy_ns(static_cast<Engine>(i));
    report_.overlap_ns += devices_.overlap_ns();
    report_.total_ns += ns;
    report_.step_ns.push_back(ns);
    ++report_.steps;
    report_.tokens += tokens.tokens;
  }
  if (predictor_ && tokens.tokens <= kMostStagedTokens)
    referee_.step(tokens.tokens, ns, static_cast<int64_t>(events_.now()));
  decide(ns, cpu_ns);
  return ns;
}

// All of the layers [first, last] but their experts.
double SimBox::dense_ns(int first, int last) {
  const StepTokens& t = *now_running_;
  const auto n = static_cast<double>(t.tokens);
  double ns = 0;
  for (int layer = first; layer <= last; ++layer) {
    const LayerCosts& l = cost_.model().layers[static_cast<size_t>(layer)];
    ns += cost_.dense_ns(layer, n) + cost_.attention_ns(layer, n, t.context, t.prefill) +
          cost_.index_ns(layer, n, t.context, t.prefill);
    (cost_.on_device() ? report_.gpu_bytes : report_.cpu_bytes) +=
        measured_ ? std::accumulate(l.dense_bytes.begin(), l.dense_bytes.end(), 0.0) : 0;
  }
  return ns;
}

void SimBox::begin_layer(int layer) {
  const double ns = dense_ns(layer == 0 ? 0 : last_layers_[static_cast<size_t>(layer) - 1] + 1,
                             last_layers_[static_cast<size_t>(layer)]);
  if (predictor_) stage(layer);
  devices_.submit(cost_.on_device() ? Engine::gpu : Engine::cpu, ns, "attention", [this, layer] { routed(layer); });
}

// The CPU has nothing to do while the device is at attention: it reads what will probably be missing.
void SimBox::stage(int layer) {
  staged_.assign(static_cast<size_t>(cost_.model().experts), false);
  guesses_.clear();
  if (now_running_->tokens > kMostStagedTokens) return;
  if (layer == 0) before_.clear();
  predictor_->guess(layer, known_of(layer), cost_.model().experts_per_token * 2, guesses_);
  if (!cost_.on_device() || !referee_.on()) return;
  int left = o_.staged_experts;
  for (const Guess& guess : guesses_) {
    if (left == 0) return;
    if (slots_.resident(slots_.at({layer, guess.expert})) || !in_memory({layer, guess.expert}) ||
        reliability_.measured(guess.p) < kLeastChance)
      continue;
    --left;
    if (measured_) ++report_.staged;
    devices_.submit(Engine::cpu, costs_.cpu.ns(1), kStaging, [this, guess] { staged_[guess.expert] = true; });
  }
}

Known SimBox::known_of(int layer) const {
  Known known{.before = before_};
  for (int d = 0; d < 2; ++d)
    if (!now_running_->asked[d].empty()) known.asked[d] = now_running_->asked[d][static_cast<size_t>(layer)];
  return known;
}

// The router has spoken.
void SimBox::learn(int layer) {
  devices_.drop(Engine::cpu, kStaging);
  const std::vector<int>& counts = now_running_->counts[static_cast<size_t>(layer)];
  devices_.drop(Engine::disk, kReadAhead, [&](int expert) { return counts[static_cast<size_t>(expert)] > 0; });
  if (now_running_->tokens > kMostStagedTokens) return;
  here_.clear();
  for (size_t e = 0; e < counts.size(); ++e)
    if (counts[e] > 0) here_.push_back({static_cast<uint16_t>(e), 0});
  for (const Guess& guess : guesses_) reliability_.observe(guess.p, counts[guess.expert] > 0);
  predictor_->observe(layer, known_of(layer), here_);
  before_.swap(here_);
}

void SimBox::routed(int layer) {
  if (predictor_) learn(layer);
  const std::vector<int>& counts = now_running_->counts[static_cast<size_t>(layer)];
  std::vector<Active> here, missing;
  LayerBranches branches;
  double pairs = 0, hits = 0;
  std::vector<bool> on_device(counts.size());
  for (size_t e = 0; e < counts.size(); ++e)
    on_device[e] = cost_.on_device() && slots_.resident(slots_.at({layer, static_cast<int>(e)}));
  const LayerSplit split = split_of(counts, on_device);
  for (const int e : split.returned) on_device[static_cast<size_t>(e)] = false;
  for (int e = 0; e < static_cast<int>(counts.size()); ++e) {
    const int64_t n = counts[static_cast<size_t>(e)];
    if (n == 0) continue;
    const size_t i = slots_.at({layer, e});
    pairs += static_cast<double>(n);
    const bool resident = on_device[static_cast<size_t>(e)];
    branches.add(resident, n, costs_);
    if (!resident) {
      missing.push_back({e, n});
      continue;
    }
    slots_.use(i);
    here.push_back({e, n});
    hits += static_cast<double>(n);
  }
  if (measured_) {
    report_.pairs += pairs;
    report_.hits += hits;
    ++report_.layers;
    report_.zero_miss_layers += missing.empty();
    report_.gpu_bytes += cost_.model().expert_bytes * static_cast<double>(here.size());
    if (!now_running_->prefill) slack_[static_cast<size_t>(layer)].observe(branches, costs_);
  }
  waiting_ = 1;  // this
  std::vector<bool> fetched(missing.size());
  if (cost_.on_device()) {
    for (const size_t i : to_fetch(missing, split)) fetched[i] = true;
    fetch(layer, missing, fetched);
    if (!here.empty()) {
      part_began();
      devices_.submit(Engine::gpu, branches.gpu_ns, "experts", [this, layer] { part_ended(layer); });
    }
  }
  std::vector<Active> rest;
  for (size_t i = 0; i < missing.size(); ++i)
    if (!fetched[i]) rest.push_back(missing[i]);
  if (!rest.empty()) run_on_cpu(layer, rest);
  read_ahead(layer + 1);
  part_ended(layer);
}

// Of a prompt's step: those that end soonest so.
LayerSplit SimBox::split_of(const std::vector<int>& counts, const std::vector<bool>& on_device) const {
  if (!cost_.on_device() || !now_running_->prefill || !o_.stream_prefill) return {};
  return split_layer(PrefillExperts::hybrid, std::vector<int64_t>(counts.begin(), counts.end()), on_device, costs_);
}

// Which of `missing` the step itself brings to the device: a prompt's by the split, else what the policy asks for.
std::vector<size_t> SimBox::to_fetch(const std::vector<Active>& missing, const LayerSplit& split) {
  std::vector<size_t> chosen;
  if (now_running_->prefill && o_.stream_prefill) {
    for (const int e : split.streamed)
      for (size_t i = 0; i < missing.size(); ++i)
        if (missing[i].expert == e) chosen.push_back(i);
    return chosen;
  }
  carried_fetches_ += scheduler_->demand_share() * static_cast<double>(missing.size());
  while (carried_fetches_ >= 1 && chosen.size() < missing.size()) {
    chosen.push_back(chosen.size());
    --carried_fetches_;
  }
  return chosen;
}

void SimBox::fetch(int layer, const std::vector<Active>& missing, std::vector<bool>& taken) {
  for (size_t i = 0; i < missing.size(); ++i) {
    if (!taken[i]) continue;
    fetched_.push_back({layer, missing[i].expert});
    if (measured_) {
      ++report_.fetched;
      report_.bus_bytes += cost_.model().expert_bytes;
      report_.gpu_bytes += cost_.model().expert_bytes;
    }
    part_began();
    const double ns = costs_.gpu.ns(missing[i].tokens);
    devices_.submit(
        Engine::h2d, costs_.h2d_ns, "fetch",
        [this, layer, ns] { devices_.submit(Engine::gpu, ns, "experts", [this, layer] { part_ended(layer); }); }, true);
  }
}

void SimBox::run_on_cpu(int layer, const std::vector<Active>& missing) {
  double ns = 0;
  part_began();
  auto reads = std::make_shared<int>(1);
  const double sync = costs_.sync_ns / 2;
  for (const Active& a : missing) {
    const bool staged = predictor_ && staged_[static_cast<size_t>(a.expert)];
    if (measured_) report_.staged_right += staged;
    ns += costs_.cpu.ns(a.tokens) * (staged ? kStagedShare : 1);
  }
  if (measured_) report_.cpu_bytes += cost_.model().expert_bytes * static_cast<double>(missing.size());
  const auto begin = [this, layer, ns, sync, reads] {
    if (--*reads > 0) return;
    devices_.submit(Engine::cpu, ns, "experts",
                    [this, layer, sync] { events_.after(sync, [this, layer] { part_ended(layer); }); });
  };
  for (const Active& a : missing) {
    if (in_memory({layer, a.expert})) continue;
    read_.push_back({layer, a.expert});
    Ahead* const ahead = ahead_ ? &(*ahead_)[static_cast<size_t>(a.expert)] : nullptr;
    if (ahead && ahead->asked && measured_) ++report_.read_ahead_right;
    if (ahead && ahead->there) continue;
    ++*reads;
    if (ahead && ahead->asked)
      ahead->awaited = begin;
    else
      read_from_disk("read", begin, true);
  }
  events_.after(sync, begin);
}

void SimBox::read_from_disk(const char* what, std::function<void()> done, bool urgent, int tag) {
  const double bytes = cost_.model().expert_bytes;
  const auto counted = [this, bytes, done = std::move(done)] {  // what is given up is not
    if (measured_) report_.disk_bytes += bytes;
    done();
  };
  devices_.submit(Engine::disk, 1e9 * bytes / cost_.machine().disk.read_bytes_per_second, what, counted, urgent, tag);
}

// The disk has nothing to do once this layer has what it needs: what the next one will probably need comes in.
void SimBox::read_ahead(int layer) {
  ahead_.reset();
  if (!memory_policy_ || !predictor_ || o_.read_ahead == 0) return;
  if (layer >= cost_.model().routed_layer_count() || now_running_->tokens > kMostStagedTokens) return;
  predictor_->guess(layer, known_of(layer), cost_.model().experts_per_token * 2, ahead_guesses_);
  ahead_ = std::make_shared<std::vector<Ahead>>(static_cast<size_t>(cost_.model().experts));
  int left = o_.read_ahead;
  for (const Guess& guess : ahead_guesses_) {
    if (left == 0) return;
    const ExpertId id{layer, guess.expert};
    if (slots_.resident(slots_.at(id)) || in_memory(id)) continue;
    --left;
    if (measured_) ++report_.read_ahead;
    (*ahead_)[guess.expert].asked = true;
    const auto came = [layer_ahead = ahead_, guess] {
      Ahead& ahead = (*layer_ahead)[guess.expert];
      ahead.there = true;
      if (ahead.awaited) ahead.awaited();
    };
    read_from_disk(kReadAhead, came, false, guess.expert);
  }
}

void SimBox::part_ended(int layer) {
  if (--waiting_ > 0) return;
  if (layer + 1 < cost_.model().routed_layer_count()) return begin_layer(layer + 1);
  const StepTokens& t = *now_running_;
  const double ns = dense_ns(last_layers_.back() + 1, cost_.model().layer_count() - 1) +
                    cost_.head_ns(t.prefill ? 1 : static_cast<double>(t.tokens));
  (cost_.on_device() ? report_.gpu_bytes : report_.cpu_bytes) += measured_ ? cost_.model().head_bytes : 0;
  devices_.submit(cost_.on_device() ? Engine::gpu : Engine::cpu, ns, "head", [this] { ended_ = true; });
}

// What the policy makes of the step.
void SimBox::decide(double step_ns, double cpu_ns) {
  const StepTokens& t = *now_running_;
  uses_.clear();
  for (int layer = 0; layer < cost_.model().routed_layer_count(); ++layer)
    for (int e = 0; e < cost_.model().experts; ++e)
      if (const int n = t.counts[static_cast<size_t>(layer)][static_cast<size_t>(e)]; n > 0)
        uses_.push_back({{layer, e}, n});
  if (memory_policy_) {
    memory_policy_->observe({uses_, t.tokens, t.prefill, read_});
    for (const Admission& a : memory_policy_->plan(memory_.residency(), static_cast<int>(read_.size())))
      (void)memory_.apply(a, true);
  }
  if (slots_.slots() == 0 || !cost_.on_device()) return;
  scheduler_->observe({uses_, t.tokens, t.prefill, fetched_});
  const int demanded = scheduler_->demand_share() > 0 ? static_cast<int>(fetched_.size()) : 0;
  for (const Admission& a : scheduler_->plan(slots_.residency(), std::max(0.0, step_ns - cpu_ns), demanded)) {
    const bool there = std::find(fetched_.begin(), fetched_.end(), a.fill) != fetched_.end();
    if (!slots_.apply(a, there) || there) continue;
    if (measured_) {
      ++report_.fills;
      report_.bus_bytes += cost_.model().expert_bytes;
    }
    ++*coming_copies_;
    devices_.submit(Engine::h2d, costs_.h2d_ns, "fill", [left = coming_copies_] { --*left; });
  }
}

SimReport SimBox::report() const {
  SimReport report = report_;
  report.ended_fills = static_cast<double>(slots_.ended_fills());
  report.useful_fills = static_cast<double>(slots_.useful_fills());
  report.staging_verdict = referee_.state();
  for (const LayerSlack& layer : slack_) {
    const double share = 1 / static_cast<double>(slack_.size());
    report.slack_ns += share * layer.mean_ns();
    report.cpu_critical += share * layer.cpu_critical();
    report.saved_by_one_more_ns += share * layer.saved_ns(costs_);
    for (size_t i = 0; i < report.missing.size(); ++i) report.missing[i] += share * layer.missing(i);
  }
  return report;
}

namespace {

// What the routers said of tokens [first, last), by layer: all the likeliest, then all the second ones.
std::vector<std::vector<TracePick>> asked_of(const Trace& trace, int64_t first, int64_t last, int distance) {
  const TraceHeader& h = trace.header();
  std::vector<std::vector<TracePick>> asked(static_cast<size_t>(h.layers));
  for (int layer = 0; layer < h.layers; ++layer) {
    std::vector<TracePick>& said = asked[static_cast<size_t>(layer)];
    for (size_t rank = 0; rank < static_cast<size_t>(h.guesses); ++rank)
      for (int64_t i = first; i < last; ++i) {
        const uint16_t expert = trace.guesses(i, layer, distance)[rank].expert;
        if (expert != TracePick::kNobody && std::find(said.begin(), said.end(), TracePick{expert, 0}) == said.end())
          said.push_back({expert, 0});
      }
  }
  return asked;
}

}  // namespace

Result<SimReport> simulate(const CostModel& cost, const Trace& trace, const SimOptions& options) {
  const TraceHeader& h = trace.header();
  const ModelCosts& m = cost.model();
  if (h.layers != m.routed_layer_count() || h.experts != m.experts)
    return invalid("the trace is of a model with " + std::to_string(h.layers) + " layers of " +
                   std::to_string(h.experts) + " experts, not " + std::to_string(m.routed_layer_count()) + " of " +
                   std::to_string(m.experts));
  if (h.top_k != m.experts_per_token)
    return invalid("the trace has " + std::to_string(h.top_k) + " experts a token, not " +
                   std::to_string(m.experts_per_token));
  if (trace.size() == 0) return invalid("a trace without a token");
  if (options.staging.starts_with("router") && h.guesses == 0)
    return invalid("nobody asked the routers ahead when this trace was recorded (--record-trace on the CPU does)");
  TC_ASSIGN(const std::unique_ptr<SimBox> box, SimBox::create(cost, options, &trace));
  int64_t last_step = 0;  // its first token: at least one step is measured
  for (int64_t i = 1; i < trace.size(); ++i)
    if (trace.token(i).step != trace.token(i - 1).step) last_step = i;
  SimBox::StepTokens step;
  step.counts.assign(static_cast<size_t>(h.layers), std::vector<int>(static_cast<size_t>(h.experts)));
  for (int64_t i = 0; i < trace.size();) {
    for (std::vector<int>& counts : step.counts) std::fill(counts.begin(), counts.end(), 0);
    const int64_t first = i;
    for (; i < trace.size() && trace.token(i).step == trace.token(first).step; ++i)
      for (int layer = 0; layer < h.layers; ++layer)
        for (const TracePick& pick : trace.picks(i, layer)) ++step.counts[static_cast<size_t>(layer)][pick.expert];
    step.tokens = i - first;
    if (h.guesses > 0 && step.tokens <= kMostStagedTokens)
      for (int d = 0; d < 2; ++d) step.asked[d] = asked_of(trace, first, i, d + 1);
    step.prefill = trace.token(first).phase == TracePhase::prefill;
    step.context = std::max(options.context, static_cast<double>(trace.token(first).position));
    box->step(step, first >= std::min(options.measure_from, last_step));
  }
  return box->report();
}

}  // namespace thermocline::sched
