#include "runtime/engine/step_loop.h"

#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <numeric>

#include "runtime/base/log.h"

namespace thermocline {
namespace {

Error field_error(const char* field, const std::string& text) {
  Error error = invalid(text);
  error.field = field;
  return error;
}

Error unavailable(const std::string& text) { return {ErrorCode::unavailable, text}; }

sched::PlannerLimits limits_of(const StepExecutor& step, const KvStore& kv, const LoopOptions& options) {
  sched::PlannerLimits limits;
  limits.max_num_seqs = kv.options().max_sequences;
  limits.max_num_batched_tokens = step.options().max_tokens;
  limits.max_logit_rows = step.options().max_logit_rows;
  limits.budget_ns = std::chrono::duration<double, std::nano>(options.step_budget).count();
  return limits;
}

// "requests a, b and 3 more"
std::string names_of(const std::vector<RunningRequest*>& requests) {
  constexpr size_t kNamed = 8;
  std::string names = requests.size() == 1 ? "request" : "requests";
  for (size_t i = 0; i < std::min(kNamed, requests.size()); ++i)
    names += (i == 0 ? " " : ", ") + requests[i]->request().id;
  return requests.size() > kNamed ? fmt::format("{} and {} more", names, requests.size() - kNamed) : names;
}

}  // namespace

/// A row of logits and whose it is: its next token, or the log-probability of its next prompt token.
struct StepLoop::Row {
  RunningRequest* request = nullptr;
  int64_t row = 0;       // of the step's logits
  int64_t position = 0;  // of the token whose logits these are
  bool prompt = false;
  Result<SampledToken> token = SampledToken();
};

/// The step goes on while somebody in it wants its token.
class StepLoop::BatchStop : public StopToken {
 public:
  explicit BatchStop(const StepLoop& loop) : loop_(loop) {}
  void add(const RunningRequest& r) { requests_.push_back(&r); }
  bool stop_requested() const override {
    if (loop_.stop_ || nanoseconds(Clock::now()) >= loop_.drain_deadline_) return true;
    return std::all_of(requests_.begin(), requests_.end(), [](const RunningRequest* r) {
      return r->handle().cancelled() || r->request().deadline <= Clock::now();
    });
  }

 private:
  const StepLoop& loop_;
  std::vector<const RunningRequest*> requests_;
};

StepLoop::StepLoop(const Machine& machine, const LoopOptions& options)
    : m_(machine),
      options_(options),
      planner_(limits_of(machine.step, machine.kv, options)),
      counters_(std::make_shared<QueueCounters>(options.queue)),
      inbox_(std::make_shared<Inbox>()),
      cache_(machine.kv, machine.kv.layout().shares_pages() ? machine.prefix_cache : PrefixCache::Options()),
      scratch_(static_cast<size_t>(machine.pool.size()), SamplingScratch(machine.geometry.vocab_size)),
      watchdog_(options.watchdog, [this] { bark(); }) {}

Result<std::unique_ptr<StepLoop>> StepLoop::start(const Machine& machine, const LoopOptions& options) {
  if (options.step_budget.count() < 1) return field_error("--step-budget-ms", "the step budget should be positive");
  if (options.watchdog.count() < 1) return field_error("--watchdog-seconds", "the watchdog's time should be positive");
  if (options.queue.requests < 1 || options.queue.tokens < 1 || options.queue.bytes < 1)
    return field_error("--max-queue", "the queue's caps should be positive");
  if (machine.step.options().max_logit_rows < machine.kv.options().max_sequences)
    return invalid("a step of " + std::to_string(machine.kv.options().max_sequences) + " sequences has " +
                   std::to_string(machine.step.options().max_logit_rows) + " rows of logits");
  std::unique_ptr<StepLoop> loop(new StepLoop(machine, options));
  machine.step.set_recorders({});  // the first steps measure: nobody asked for their tokens
  TC_RETURN_IF_ERROR(loop->calibrate());
  machine.step.set_recorders(machine.recorders);
  if (machine.meters) machine.meters->look_at_slots();
  loop->publish_stats();
  if (NvmeTier* const disk = machine.prefix_cache.disk) disk->set_wake([inbox = loop->inbox_] { inbox->wake(); });
  loop->thread_ = std::thread([self = loop.get()] { self->run(); });
  return loop;
}

StepLoop::~StepLoop() {
  stop_ = true;
  inbox_->wake();
  if (thread_.joinable()) thread_.join();
}

// A step of one token and one of a few: what longer ones take is judged from these until they are measured.
Status StepLoop::calibrate() {
  const int64_t few = std::min({int64_t{32}, m_.step.options().max_tokens, m_.step.options().max_context - 1});
  for (int round = 0; round < 2; ++round) {  // the first warms the caches
    TC_ASSIGN(const std::unique_ptr<SequenceKv> kv, m_.kv.new_sequence());
    for (const int64_t count : {int64_t{1}, few}) {
      if (count < 1) continue;
      std::vector<int32_t> ids(static_cast<size_t>(count));
      for (int64_t i = 0; i < count; ++i)
        ids[static_cast<size_t>(i)] = static_cast<int32_t>((kv->length() + i) * 7919 % m_.geometry.vocab_size);
      sched::Batch batch;
      batch.add(0, kv->length(), ids.data(), count);
      batch.logit_rows.push_back(static_cast<int32_t>(count) - 1);
      SequenceKv* const sequence = kv.get();
      TC_ASSIGN(const StepReport report, m_.step.run({batch, std::span(&sequence, 1)}));
      if (round > 0) cost_.observe(count, report.time.total);
    }
  }
  return {};
}

// --- any thread ---

Result<QueueTicket> StepLoop::ticket(const QueueCounters::Amount& amount) {
  const EngineHealth now = health();
  if (!now.ok()) return unavailable(now.reason);
  return QueueTicket::take(counters_, amount);
}

// The most tokens of prompt and answer.
int64_t StepLoop::most_tokens(const Request& request) const {
  int64_t answer = request.max_tokens >= 0 ? request.max_tokens : options_.default_max_tokens;
  if (options_.max_answer_tokens >= 0 && (answer < 0 || answer > options_.max_answer_tokens))
    answer = options_.max_answer_tokens;
  const int64_t prompt = static_cast<int64_t>(request.prompt.size());
  // The last token of an answer is chosen and never stored.
  const int64_t room = m_.step.options().max_context;
  return answer < 0 || answer > room - prompt ? room : prompt + answer;
}

Status StepLoop::check(const Request& request) const {
  if (Status sampling = request.sampling.check(m_.geometry.vocab_size); !sampling.ok()) return sampling;
  if (request.prompt.empty()) return field_error("prompt", "the prompt is empty");
  for (const auto& [name, ids] : {std::pair("prompt", &request.prompt), {"stop_token_ids", &request.stop_token_ids}})
    for (const int32_t id : *ids)
      if (id < 0 || id >= m_.geometry.vocab_size)
        return field_error(name, "token id " + std::to_string(id) + " is outside the vocabulary of " +
                                     std::to_string(m_.geometry.vocab_size));
  if (request.choices < 1 || request.choices > 128)
    return field_error("n", "should be from 1 to 128, not " + std::to_string(request.choices));
  if (request.max_tokens < -1 || request.min_tokens < 0)
    return field_error(request.min_tokens < 0 ? "min_tokens" : "max_tokens", "should not be negative");
  for (const std::string& stop : request.stop)
    if (stop.empty()) return field_error("stop", "a stop string should not be empty");
  const int64_t prompt = static_cast<int64_t>(request.prompt.size()), answer = request.max_tokens == 0 ? 0 : 1;
  if (prompt + answer <= m_.step.options().max_context) return {};
  return too_long(prompt, prompt + answer > m_.max_context);
}

// For the context, or for the whole cache, where that holds less.
Error StepLoop::too_long(int64_t prompt, bool for_context) const {
  const int64_t room = m_.step.options().max_context;
  const double cache_bytes = static_cast<double>(m_.kv.compressed_pages() * m_.kv.layout().compressed_page_bytes());
  Error error{
      ErrorCode::context_length,
      for_context
          ? fmt::format("the prompt has {} tokens; the context holds {}, answer included", prompt, m_.max_context)
          : fmt::format("the prompt has {} tokens; the KV cache holds {} in {:.1f} MiB, answer "
                        "included (--kv-{}-memory)",
                        prompt, room, cache_bytes / (1 << 20), m_.kv.options().host_rows ? "host" : "gpu"),
      "prompt"};
  error.counts = {{"n_prompt_tokens", prompt}, {"n_ctx", room}};
  return error;
}

Result<std::shared_ptr<RequestHandle>> StepLoop::submit(Request request) {
  TC_RETURN_IF_ERROR(check(request));
  const EngineHealth now = health();
  if (!now.ok()) return unavailable(now.reason);
  const int64_t tokens = static_cast<int64_t>(request.prompt.size()) * request.choices;
  const QueueCounters::Amount amount{1, tokens, tokens * 4};
  if (request.ticket.held()) {
    TC_RETURN_IF_ERROR(request.ticket.change(amount));
  } else {
    TC_ASSIGN(request.ticket, QueueTicket::take(counters_, amount));
  }
  const auto handle = std::make_shared<RequestHandle>(request.choices, options_.stream_capacity);
  handle->inbox_ = inbox_;
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(active_, [](const std::weak_ptr<RequestHandle>& h) { return h.expired(); });
    active_.push_back(handle);
  }
  inbox_->submit({std::move(request), handle, Clock::now()});
  return handle;
}

void StepLoop::drain(Clock::time_point deadline) {
  Clock::rep now = drain_deadline_;
  while (now > nanoseconds(deadline) && !drain_deadline_.compare_exchange_weak(now, nanoseconds(deadline))) {
  }
  {
    const std::lock_guard lock(mutex_);
    if (health_.state == EngineHealth::State::ready)
      health_ = {EngineHealth::State::draining, "the server is stopping"};
  }
  draining_ = true;
  inbox_->wake();
}

EngineHealth StepLoop::health() const {
  const std::lock_guard lock(mutex_);
  return health_;
}

// The step thread hangs: its requests end from here, so that clients hear of it.
void StepLoop::bark() {
  const Error error{ErrorCode::internal, "no progress in " + std::to_string(options_.watchdog.count()) +
                                             " ms: the step that runs was given up (--watchdog-seconds)"};
  log_error("{}", error.message);
  {
    const std::lock_guard lock(mutex_);
    if (health_.state == EngineHealth::State::ready || health_.state == EngineHealth::State::draining) {
      health_ = {EngineHealth::State::failed, error.message};
      stuck_ = true;
    }
  }
  end_active(error);
}

// Whoever has a handle hears of it, wherever its request is; the loop drops what was cancelled.
void StepLoop::end_active(const Error& error) {
  std::vector<std::shared_ptr<RequestHandle>> handles;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& weak : active_)
      if (auto handle = weak.lock()) handles.push_back(std::move(handle));
  }
  for (const auto& handle : handles) {
    handle->stream().finish_all(error);
    handle->cancel();
  }
}

// --- step thread ---

void StepLoop::run() {
  while (!stop_) {
    try {
      turn();
    } catch (const std::exception& exception) {
      const Error error{ErrorCode::internal, std::string("the step loop failed: ") + exception.what()};
      log_error("{}", error.message);
      watchdog_.end();
      end_active(error);
    }
  }
  take_mail();
  fail_all(unavailable("the server is stopping"));
  tell_ended();
}

void StepLoop::turn() {
  take_mail();
  Clock::time_point now = Clock::now();
  if (nanoseconds(now) >= drain_deadline_)
    fail_all(unavailable("the server is stopping and had no more time for this request"));
  drop_unwanted(now);
  take_arrivals(now);
  tell_ended();
  const sched::StepPlan plan = this->plan(now);
  for (const uint64_t id : plan.preempt) preempt(id);
  for (const uint64_t id : plan.admit)
    if (Status status = admit(id); !status.ok()) {
      Running r = std::move(waiting_.extract(id).mapped());
      r->fail(std::move(status).error());
      release(std::move(r));
    }
  if (!plan.parts.empty()) step(plan);
  retire_ended();
  tell_ended();
  if (plan.parts.empty() && plan.preempt.empty()) wait(now);
}

void StepLoop::take_mail() {
  Inbox::Mail mail = inbox_->take();
  for (Inbox::Mail::Submitted& submitted : mail.requests) accept(std::move(submitted));
  for (const auto& done : mail.flushes) flush(done);
}

// Its length is what the prefix cache holds of it now; what it holds when it is admitted counts.
sched::WaitingRequest StepLoop::waiting_of(RunningRequest& r) const {
  sched::WaitingRequest waiting;
  waiting.id = r.id();
  waiting.key = r.request().key;
  waiting.priority = r.request().priority;
  waiting.length = cache_.find(r.prefix_keys, resumable(r));
  waiting.tokens = r.remaining() - waiting.length;
  waiting.all_logits = r.wants_all_logits();
  waiting.arrived_ns = nanoseconds(r.submitted().at);
  return waiting;
}

void StepLoop::enqueue(Running r) {
  queue_.push(waiting_of(*r));
  waiting_.emplace(r->id(), std::move(r));
}

// Every choice waits by itself; where its prompt can be kept, the first computes it for all.
void StepLoop::accept(Inbox::Mail::Submitted submitted) {
  const auto shared = std::make_shared<SubmittedRequest>(
      SubmittedRequest{std::move(submitted.request), std::move(submitted.handle), submitted.at, 0});
  const Request& request = shared->request;
  shared->choices_waiting = request.choices;
  for (int choice = 0; choice < request.choices; ++choice) {
    auto r = std::make_unique<RunningRequest>(next_id_++, shared, choice, m_.tokenizer, m_.geometry.eos_token_id,
                                              most_tokens(request));
    r->prefix_keys =
        cache_.keys((request.cache_scope.empty() ? request.key : request.cache_scope) + '\0' + request.cache_salt);
    if (choice == 0 || !cache_.enabled()) {
      enqueue(std::move(r));
      continue;
    }
    shared->behind.push_back(r->id());
    waiting_.emplace(r->id(), std::move(r));
  }
}

sched::KvPages StepLoop::pages() const {
  sched::KvPages pages;
  if (m_.kv.layout().compressed_page_bytes() == 0)
    pages.page_tokens = 0;
  else
    pages.page_tokens = kPageTokens;
  pages.free = m_.kv.available_pages();
  pages.total = m_.kv.compressed_pages();
  return pages;
}

sched::StepPlan StepLoop::plan(Clock::time_point now) {
  std::vector<sched::RunningSequence> sequences;
  // A step takes a page for each sequence and a copy of its tail at most, and those of its tokens.
  const int64_t step_pages =
      2 * static_cast<int64_t>(running_.size()) + pages_of(planner_.limits().max_num_batched_tokens, kPageTokens);
  const bool may_preempt = m_.kv.available_pages() < step_pages;
  for (const Running& r : running_) {
    sched::RunningSequence s;
    s.id = r->id();
    s.length = r->stored();
    s.remaining = r->remaining();
    s.decoding = r->decoding();
    s.all_logits = r->wants_all_logits();
    s.pages = r->kv->own_pages();
    if (may_preempt) s.exclusive_pages = r->kv->exclusive_pages();
    s.blocked = !r->handle().stream().room(2 * static_cast<size_t>(r->request().choices));
    if (!s.blocked)
      r->blocked_since = {};
    else if (r->blocked_since == Clock::time_point())
      r->blocked_since = now;
    sequences.push_back(s);
  }
  return planner_.plan(sequences, queue_, pages(), nanoseconds(now), cost_);
}

RunningRequest* StepLoop::running(uint64_t id) {
  for (const Running& r : running_)
    if (r->id() == id) return r.get();
  return nullptr;
}

// Its rows stay with the prefix cache, or go when others need the room; its tokens stay, and what is missing is
// computed again, to the same bits.
void StepLoop::preempt(uint64_t id) {
  const auto it = std::find_if(running_.begin(), running_.end(), [&](const Running& r) { return r->id() == id; });
  TC_CHECK(it != running_.end());
  Running r = std::move(*it);
  running_.erase(it);
  keep_prefix(*r, r->stored());
  r->kv.reset();
  ++r->preemptions;
  ++counted_.preemptions;
  r->handle().phase_ = RequestPhase::waiting;
  queue_.push_preempted(waiting_of(*r));
  waiting_.emplace(id, std::move(r));
}

// Nobody had the pages for its part: the youngest gives its own back.
void StepLoop::make_room_for(RunningRequest* r) {
  if (!r) return;
  for (size_t i = running_.size(); i-- > 0;)
    if (running_[i].get() != r) return preempt(running_[i]->id());
  if (cache_.holds_blank_pages(nanoseconds(Clock::now()))) return;  // they are filled soon, and can be taken then
  r->fail({ErrorCode::out_of_memory, "the KV cache has no page for the next token"});
}

void StepLoop::step(const sched::StepPlan& plan) {
  sched::Batch batch;
  std::vector<SequenceKv*> sequences;
  std::vector<Row> rows;
  std::vector<RunningRequest*> owners;
  BatchStop stop(*this);
  int64_t decodes = 0;
  RunningRequest* crowded_out = nullptr;
  for (const sched::StepPlan::Part& part : plan.parts) {
    RunningRequest* const r = running(part.id);
    if (!r) continue;  // its admission failed
    const int64_t first = r->stored();
    const int32_t first_token = static_cast<int32_t>(batch.size());
    const int64_t tokens = part_tokens(*r, part);
    // One that was admitted just now may have its stream full from before it was preempted.
    if (tokens == 0 || !r->handle().stream().room(2 * static_cast<size_t>(r->request().choices))) continue;
    // A prefix that was found at admission, but not when the plan was made, takes pages that the plan gave to others:
    // they wait for the next one.
    if (Status reserved = r->kv->reserve(tokens); !reserved.ok()) {
      if (reserved.error().code == ErrorCode::out_of_memory)
        crowded_out = r;
      else
        r->fail(std::move(reserved).error());
      continue;
    }
    batch.add(static_cast<int>(sequences.size()), first, r->ids().data() + first, tokens);
    sequences.push_back(r->kv.get());
    owners.push_back(r);
    stop.add(*r);
    decodes += r->decoding();
    const bool all = part.logits == sched::StepPlan::Part::Logits::all;
    for (int64_t i = all ? 0 : tokens - 1; i < tokens && (all || tokens == r->remaining()); ++i) {
      const int64_t position = first + i;
      const bool prompt = position + 1 < static_cast<int64_t>(r->ids().size());
      rows.push_back({r, static_cast<int64_t>(batch.logit_rows.size()), position, prompt});
      batch.logit_rows.push_back(first_token + static_cast<int32_t>(i));
    }
  }
  if (batch.size() == 0) return make_room_for(crowded_out);
  const Clock::time_point start = Clock::now();
  count_gap(start);
  publish_running();
  watchdog_.begin();
  const Result<StepReport> report = [&] {
    const WorkerPool::StepScope scope(m_.pool);  // the workers stay awake from the step to its samples
    Result<StepReport> ran = m_.step.run({batch, sequences, {}, &stop});
    if (ran) sample(rows);
    return ran;
  }();
  watchdog_.end();
  gap_ = {Clock::now(), 0};
  unstick();
  if (!report) {
    // A step that was stopped has no faults; whoever still wants it is in the next one.
    if (report.error().code == ErrorCode::cancelled) return;
    ++counted_.failed_steps;
    log_error("a step failed: {}; {}", report.error().message, names_of(owners));
    for (RunningRequest* const r : owners) r->fail(report.error());
    const std::lock_guard lock(mutex_);
    if (report.error().code == ErrorCode::internal) health_ = {EngineHealth::State::failed, report.error().message};
    return;
  }
  counted_.prompt_tokens += batch.size() - decodes;
  const std::chrono::duration<double> took = Clock::now() - start;
  cost_.observe(batch.size(), took.count() * 1e9);
  ++counted_.steps;
  counted_.step_seconds += took.count();
  counted_.last_step_seconds = took.count();
  if (decodes > 0) counted_.longest_decode_step_seconds = std::max(counted_.longest_decode_step_seconds, took.count());
  for (RunningRequest* const r : owners) {
    keep_prompt(*r);
    r->tell_progress();
  }
}

// A step that was given up has ended after all.
void StepLoop::unstick() {
  const std::lock_guard lock(mutex_);
  if (!std::exchange(stuck_, false)) return;
  health_ = draining_ ? EngineHealth{EngineHealth::State::draining, "the server is stopping"} : EngineHealth();
}

// Rows on the workers, each with its own sampler; what they choose to the clients one after the other.
void StepLoop::sample(const std::vector<Row>& rows) {
  if (rows.empty()) return;
  std::vector<Row> work;
  for (const Row& row : rows) {
    std::optional<int32_t> best;
    if (!row.prompt && row.request->takes_argmax()) best = m_.step.most_likely(row.row);
    if (!best) {
      work.push_back(row);
      continue;
    }
    row.request->sampler.accept(*best);
    deliver({row.request, row.row, row.position, false, SampledToken{*best, 0, {}}});
  }
  if (work.empty()) return;
  const TensorView<const float, 2> logits = m_.step.logits();
  m_.pool.split(static_cast<int64_t>(work.size()), [&](int64_t begin, int64_t end, int worker) {
    SamplingScratch& scratch = scratch_[static_cast<size_t>(worker)];
    for (int64_t i = begin; i < end; ++i) {
      Row& row = work[static_cast<size_t>(i)];
      const std::span values(logits.row(row.row), static_cast<size_t>(m_.geometry.vocab_size));
      row.token =
          row.prompt ? row.request->prompt_logprob(row.position, values, scratch) : row.request->draw(values, scratch);
    }
  });
  for (Row& row : work) deliver(std::move(row));
}

void StepLoop::deliver(Row row) {
  RunningRequest& r = *row.request;
  if (r.ended()) return;
  if (!row.token) return r.fail(std::move(row.token).error());
  if (row.prompt) return r.add_prompt_logprob(row.position, std::move(*row.token));
  if (r.answered() == 0) r.finish_prompt();
  if (r.ended()) return;
  const Clock::time_point before = r.last_token;
  r.take(std::move(*row.token));
  if (r.answered() > 1)
    counted_.token_gaps.add(kTokenGapSeconds, std::chrono::duration<double>(r.last_token - before).count());
  r.handle().phase_ = RequestPhase::decode;
  ++counted_.answer_tokens;
}

void StepLoop::wait(Clock::time_point now) {
  if (draining_ && running_.empty() && waiting_.empty()) {
    const std::lock_guard lock(mutex_);
    if (health_.state == EngineHealth::State::draining)
      health_ = {EngineHealth::State::stopped, "the server is stopping"};
  }
  // Deadlines and blocked clients are looked at ten times a second; news wakes at once.
  const bool idle = running_.empty() && waiting_.empty();
  const Clock::time_point start = Clock::now();
  inbox_->wait_until(now + (idle ? std::chrono::milliseconds(1000) : std::chrono::milliseconds(100)));
  gap_.idle += std::chrono::duration<double>(Clock::now() - start).count();
}

void StepLoop::count_gap(Clock::time_point start) {
  if (!gap_.since) return;  // the first step
  counted_.idle_seconds += gap_.idle;
  counted_.between_steps_seconds += std::chrono::duration<double>(start - *gap_.since).count() - gap_.idle;
}

}  // namespace thermocline
