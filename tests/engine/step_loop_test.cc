// runtime/engine: the step loop on the demo model: batching, cancels, limits, faults.
#include <future>
#include <thread>

#include "tests/support/served.h"

namespace thermocline {
namespace {

using namespace std::chrono_literals;
using test::Answer;
using test::kQuestions;
using test::Served;

/// Greedy, seeded, penalised, filtered requests; some with logprobs, of different lengths.
std::vector<Request> mixed_requests(const Served& served, int count, int64_t most = 20) {
  std::vector<Request> requests;
  for (int i = 0; i < count; ++i) {
    std::string question = kQuestions[static_cast<size_t>(i) % std::size(kQuestions)];
    for (int repeat = 0; repeat < i % 4; ++repeat) question += " " + question;
    Request r = served.request(question, std::min<int64_t>(most, 8 + i % 13));
    if (i % 3 != 0) {
      r.sampling.temperature = 0.7 + 0.1 * (i % 5);
      r.sampling.has_seed = true;
      r.sampling.seed = static_cast<uint64_t>(1000 + i);
    }
    if (i % 4 == 1) r.sampling.top_p = 0.9;
    if (i % 4 == 2) r.sampling.repetition_penalty = 1.2;
    if (i % 5 == 3) r.top_logprobs = 3;
    if (i % 6 == 5) r.prompt_top_logprobs = 1;
    if (i % 7 == 6) r.ignore_eos = true;
    r.key = i % 2 ? "a" : "b";
    r.priority = i % 3;
    requests.push_back(std::move(r));
  }
  return requests;
}

void expect_same(const Answer& got, const Answer& want, size_t i) {
  EXPECT_EQ(got.ids, want.ids) << "request " << i;
  EXPECT_EQ(got.text, want.text) << "request " << i;
  EXPECT_EQ(got.reason, want.reason) << "request " << i;
  EXPECT_EQ(got.ends, 1);
  const auto same = [&](const std::vector<SampledToken>& a, const std::vector<SampledToken>& b) {
    ASSERT_EQ(a.size(), b.size()) << "request " << i;
    for (size_t t = 0; t < a.size(); ++t) {
      EXPECT_EQ(a[t].id, b[t].id);
      EXPECT_EQ(a[t].logprob, b[t].logprob) << "request " << i << ", token " << t;
      ASSERT_EQ(a[t].top.size(), b[t].top.size());
      for (size_t k = 0; k < a[t].top.size(); ++k) EXPECT_EQ(a[t].top[k].logprob, b[t].top[k].logprob);
    }
  };
  same(got.logprobs, want.logprobs);
  same(got.prompt_logprobs, want.prompt_logprobs);
}

/// Alone first, then all at once.
void expect_batch_equals_solo(Served& served, int count, int64_t most = 20) {
  std::vector<Answer> solo;
  for (Request& r : mixed_requests(served, count, most)) solo.push_back(test::ask(*served.engine, std::move(r)));
  std::vector<std::shared_ptr<RequestHandle>> handles(static_cast<size_t>(count));
  std::vector<Request> requests = mixed_requests(served, count, most);
  std::vector<size_t> order(requests.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), std::mt19937(5));
  for (const size_t i : order) handles[i] = served.submit(std::move(requests[i]));
  for (size_t i = 0; i < handles.size(); ++i) expect_same(test::collect(*handles[i])[0], solo[i], i);
  const EngineStats stats = served.settled(2 * count);
  EXPECT_EQ(stats.waiting, 0);
  EXPECT_EQ(stats.finished, 2 * count);
  EXPECT_EQ(stats.kv_tokens_used, 0);
}

#ifdef TC_SANITIZED
constexpr int kMany = 4;
constexpr std::chrono::milliseconds kHang{3000};  // no step of a sanitizer build takes this long
#else
constexpr int kMany = 24;
constexpr std::chrono::milliseconds kHang{500};
#endif

TEST(StepLoop, EveryAnswerIsTheOneItHasAlone) {
  Served served({.chunk = 48, .sequences = 7});
  expect_batch_equals_solo(served, kMany);
}

#ifndef TC_SANITIZED  // minutes; gpu_step_test has batches of the interpreted device there
TEST(StepLoop, EveryAnswerIsTheOneItHasAloneOnADevice) {
  Served served({.chunk = 32, .sequences = 3, .context = 256, .device = "simt"});
  expect_batch_equals_solo(served, 3, 4);
}
#endif

TEST(StepLoop, AnyBudgetGivesTheSameAnswers) {
  LoopOptions tight;
  tight.step_budget = 1ms;  // one token of a prompt beside those who decode
  Served served({.chunk = 64, .sequences = 5}, tight);
  expect_batch_equals_solo(served, kMany / 2);
}

TEST(StepLoop, PreemptedAnswersAreTheSame) {
  // Eight pages of 256 tokens: three prompts of two each are admitted, and each answer grows into a third.
  LoopOptions options;
  options.step_budget = 60s;  // however slow this build is, prompts are not cut to single tokens
  Served served({.chunk = 512, .sequences = 4, .context = 1024, .kv_tokens = 1024}, options);
  const auto requests = [&] {
    std::vector<Request> all;
    for (int i = 0; i < 4; ++i) {
      Request r = served.request(std::string(kQuestions[i]), 40);
      const std::vector<int32_t> question = r.prompt;
      while (r.prompt.size() < 500) r.prompt.insert(r.prompt.end(), question.begin() + 1, question.end());
      r.prompt.resize(500);
      r.ignore_eos = true;
      r.sampling.temperature = i % 2;
      r.sampling.has_seed = true;
      r.sampling.seed = static_cast<uint64_t>(i);
      all.push_back(std::move(r));
    }
    return all;
  };
  std::vector<Answer> solo;
  for (Request& r : requests()) solo.push_back(test::ask(*served.engine, std::move(r)));
  std::vector<std::shared_ptr<RequestHandle>> handles;
  for (Request& r : requests()) handles.push_back(served.submit(std::move(r)));
  int preemptions = 0;
  for (size_t i = 0; i < handles.size(); ++i) {
    const Answer answer = test::collect(*handles[i])[0];
    expect_same(answer, solo[i], i);
    preemptions += answer.stats.preemptions;
    EXPECT_TRUE(i > 0 || answer.stats.preemptions == 0) << "the oldest goes on";
  }
  EXPECT_GT(preemptions, 0);
  EXPECT_EQ(served.settled(8).kv_tokens_used, 0);
}

TEST(StepLoop, ChoicesDrawWithSeedsOfTheirOwn) {
  Served served({.chunk = 64, .sequences = 4});
  Request r = served.request(kQuestions[1], 12);
  r.sampling.temperature = 1;
  r.sampling.has_seed = true;
  r.sampling.seed = 40;
  r.choices = 3;
  Request last = served.request(kQuestions[1], 12);
  last.sampling = r.sampling;
  last.sampling.seed = 42;
  const auto handle = served.submit(std::move(r));
  const std::vector<Answer> answers = test::collect(*handle, 3);
  EXPECT_NE(answers[0].ids, answers[1].ids);
  EXPECT_EQ(answers[2].ids, test::ask(*served.engine, std::move(last)).ids);
}

TEST(StepLoop, StopsLimitsAndEnds) {
  Served served;
  const auto ask = [&](auto change) {
    Request r = served.request(kQuestions[0], -1);
    change(r);
    return test::ask(*served.engine, std::move(r));
  };
  const Answer plain = ask([](Request&) {});
  EXPECT_EQ(plain.reason, FinishReason::stop);
  EXPECT_EQ(plain.text, "The capital of Norway is Oslo.");
  EXPECT_EQ(plain.ids.back(), served.engine->geometry().eos_token_id);
  EXPECT_EQ(plain.stats.completion_tokens, static_cast<int64_t>(plain.ids.size()));
  EXPECT_EQ(ask([](Request& r) { r.stop = {"Norway is"}; }).text, "The capital of ");
  const Answer stopped = ask([](Request& r) { r.stop = {"way is"}, r.include_stop = true; });
  EXPECT_EQ(stopped.text, "The capital of Norway is");
  EXPECT_EQ(stopped.reason, FinishReason::stop);
  const Answer by_id = ask([&](Request& r) { r.stop_token_ids = {plain.ids[2]}; });
  EXPECT_EQ(by_id.ids.size(), 3u);
  EXPECT_EQ(by_id.reason, FinishReason::stop);
  const Answer limited = ask([](Request& r) { r.max_tokens = 2; });
  EXPECT_EQ(limited.reason, FinishReason::length);
  EXPECT_EQ(limited.ids.size(), 2u);
  EXPECT_EQ(ask([](Request& r) { r.max_tokens = 20, r.ignore_eos = true; }).ids.size(), 20u);
  const Answer least = ask([&](Request& r) {
    r.max_tokens = 40;
    r.min_tokens = static_cast<int64_t>(plain.ids.size()) + 3;
  });
  EXPECT_GE(least.ids.size(), plain.ids.size() + 3);
  EXPECT_EQ(std::count(least.ids.begin(), least.ids.begin() + static_cast<std::ptrdiff_t>(plain.ids.size()) + 2,
                       served.engine->geometry().eos_token_id),
            0);
  Served small({.context = 40});
  Request endless = small.request(kQuestions[0], -1);
  endless.ignore_eos = true;
  const Answer filled = test::ask(*small.engine, std::move(endless));
  EXPECT_EQ(filled.reason, FinishReason::length);
  EXPECT_EQ(filled.stats.prompt_tokens + filled.stats.completion_tokens, 40);
}

TEST(StepLoop, LimitsOfTheLoopHold) {
  LoopOptions options;
  options.default_max_tokens = 3;
  options.max_answer_tokens = 5;
  Served served({}, options);
  const auto length = [&](int64_t max_tokens) {
    Request r = served.request(kQuestions[0], max_tokens);
    r.ignore_eos = true;
    return test::ask(*served.engine, std::move(r)).ids.size();
  };
  EXPECT_EQ(length(-1), 3u);
  EXPECT_EQ(length(4), 4u);
  EXPECT_EQ(length(100), 5u);
}

TEST(StepLoop, LogprobsAreThoseOfATeacherForcedRun) {
  Served served({.chunk = 16});
  Request r = served.request(kQuestions[0], 6);
  const std::vector<int32_t> prompt = r.prompt;
  r.top_logprobs = 2;
  r.prompt_top_logprobs = 1;
  const Answer answer = test::ask(*served.engine, std::move(r));
  ASSERT_EQ(answer.prompt_logprobs.size(), prompt.size());
  ASSERT_EQ(answer.logprobs.size(), answer.ids.size());
  std::vector<int32_t> all = prompt;
  all.insert(all.end(), answer.ids.begin(), answer.ids.end());
  const auto other = test::open_engine({.folder = test::demo_model()});
  const int64_t vocab = other->geometry().vocab_size;
  const std::vector<float> logits = test::run_logits(*other, all, 512).logits;
  for (size_t t = 1; t < all.size(); ++t) {
    const float* row = &logits[(t - 1) * static_cast<size_t>(vocab)];
    double sum = 0;
    const float most = *std::max_element(row, row + vocab);
    for (int64_t v = 0; v < vocab; ++v) sum += std::exp(static_cast<double>(row[v]) - most);
    const double expected = static_cast<double>(row[all[t]]) - most - std::log(sum);
    const SampledToken& got = t < prompt.size() ? answer.prompt_logprobs[t] : answer.logprobs[t - prompt.size()];
    EXPECT_EQ(got.id, all[t]);
    EXPECT_NEAR(got.logprob, expected, 1e-4) << "token " << t;
    ASSERT_EQ(got.top.size(), t < prompt.size() ? 1u : 2u);
    EXPECT_EQ(got.top[0].id, std::max_element(row, row + vocab) - row);
    EXPECT_TRUE(t < prompt.size() || got.top[0].logprob == got.logprob) << "greedy took the best";
  }
  Request none = served.request(kQuestions[0], 0);
  none.prompt_top_logprobs = 0;
  const Answer scored = test::ask(*served.engine, std::move(none));
  EXPECT_EQ(scored.reason, FinishReason::length);
  EXPECT_TRUE(scored.ids.empty());
  ASSERT_EQ(scored.prompt_logprobs.size(), prompt.size());
  EXPECT_EQ(scored.prompt_logprobs[3].logprob, answer.prompt_logprobs[3].logprob);
}

TEST(StepLoop, ACacheBelowOneContextServesWhatFits) {
  LoopOptions options;
  options.step_budget = 60s;
  Served small({.sequences = 2, .context = 4096, .kv_tokens = 512, .kv_below_context = true}, options);
  Served whole({.sequences = 2, .context = 4096}, options);
  constexpr int64_t kPool = 1024;  // and a page for each sequence
  EXPECT_EQ(small.engine->max_context(), kPool);
  EXPECT_EQ(whole.engine->max_context(), 4096);
  expect_same(test::ask(*small.engine, small.request(kQuestions[0])),
              test::ask(*whole.engine, whole.request(kQuestions[0])), 0);
  const auto prompt_of = [&](int64_t tokens, int64_t answer) {
    Request r = small.request(kQuestions[1], answer);
    r.prompt.resize(static_cast<size_t>(tokens), 5);
    r.ignore_eos = true;
    return r;
  };
  const Answer full = test::ask(*small.engine, prompt_of(kPool - 5, -1));
  EXPECT_EQ(full.ids.size(), 5u) << "up to the last page";
  expect_same(full, test::ask(*whole.engine, prompt_of(kPool - 5, 5)), 1);
  const auto message = [&](int64_t tokens) {
    const auto handle = small.engine->submit(prompt_of(tokens, 1));
    TC_CHECK(!handle.has_value());
    EXPECT_EQ(handle.error().code, ErrorCode::context_length);
    EXPECT_EQ(handle.error().counts,
              (std::vector<std::pair<std::string, int64_t>>{{"n_prompt_tokens", tokens}, {"n_ctx", kPool}}));
    return handle.error().message;
  };
  EXPECT_EQ(message(kPool).find("the prompt has 1024 tokens; the KV cache holds 1024 in "), 0u) << message(kPool);
  EXPECT_NE(message(kPool).find(" MiB, answer included (--kv-host-memory)"), std::string::npos) << message(kPool);
  EXPECT_EQ(message(4096), "the prompt has 4096 tokens; the context holds 4096, answer included");
  EXPECT_EQ(small.settled(2).kv_tokens_used, 0);
}

TEST(StepLoop, WhatCannotFitIsRefusedAtOnceAndNamesItsField) {
  Served served({.context = 64});
  const auto refusal = [&](auto change) {
    Request r = served.request(kQuestions[0]);
    change(r);
    auto handle = served.engine->submit(std::move(r));
    TC_CHECK(!handle.has_value());
    return handle.error();
  };
  const Error longer = refusal([](Request& r) { r.prompt.assign(64, 5); });
  EXPECT_EQ(longer.code, ErrorCode::context_length);
  EXPECT_EQ(longer.counts, (std::vector<std::pair<std::string, int64_t>>{{"n_prompt_tokens", 64}, {"n_ctx", 64}}));
  EXPECT_EQ(refusal([](Request& r) { r.prompt.clear(); }).field, "prompt");
  EXPECT_EQ(refusal([](Request& r) { r.prompt[0] = -1; }).field, "prompt");
  EXPECT_EQ(refusal([](Request& r) { r.prompt[0] = 1 << 20; }).field, "prompt");
  EXPECT_EQ(refusal([](Request& r) { r.stop_token_ids = {1 << 20}; }).field, "stop_token_ids");
  EXPECT_EQ(refusal([](Request& r) { r.choices = 0; }).field, "n");
  EXPECT_EQ(refusal([](Request& r) { r.sampling.top_p = 2; }).field, "top_p");
  EXPECT_EQ(refusal([](Request& r) { r.stop = {""}; }).field, "stop");
  Request fits = served.request(kQuestions[0]);
  fits.prompt.assign(63, 5);
  EXPECT_EQ(test::ask(*served.engine, std::move(fits)).ids.size(), 1u);
}

TEST(StepLoop, TheQueueIsBoundedBeforeAPromptIsMade) {
  LoopOptions options;
  options.queue = {2, 1000, 10000};
  Served served({}, options);
  Engine& engine = *served.engine;
  {
    Result<QueueTicket> a = engine.ticket({1, 400, 4000}), b = engine.ticket({1, 400, 4000});
    ASSERT_TRUE(a && b);
    EXPECT_EQ(engine.ticket({1, 1, 1}).error().code, ErrorCode::overloaded);
    EXPECT_FALSE(b->change({1, 700, 4000}).ok()) << "400 + 700 tokens";
    EXPECT_TRUE(b->change({1, 600, 4000}).ok());
    EXPECT_EQ(engine.stats().waiting_tokens, 1000);
    a->release();
    EXPECT_TRUE(engine.ticket({1, 1, 1}).ok());
  }
  EXPECT_EQ(engine.stats().waiting, 0);
  EXPECT_EQ(engine.stats().waiting_bytes, 0);
  EXPECT_TRUE(engine.ticket({1, 2000, 10001}).ok()) << "where nothing waits anything may: submit() knows what fits";
  Request r = served.request(kQuestions[0]);
  r.ticket = engine.ticket({1, 10, 10}).value();
  EXPECT_EQ(test::ask(engine, std::move(r)).reason, FinishReason::stop);
  EXPECT_EQ(engine.stats().waiting, 0);
}

TEST(StepLoop, ACancelEndsAStepBetweenItsLayersAndTheSequenceGoesOn) {
  Served served({.chunk = 512, .sequences = 2, .prefix_cache_bytes = 64 << 20});
  Request first = served.request(kQuestions[0]);
  std::vector<int32_t> held = first.prompt;
  const Answer expected = test::ask(*served.engine, std::move(first));
  held.insert(held.end(), expected.ids.begin(), expected.ids.end() - 1);

  // The next turn is stopped after its first layer; nothing of it is stored, and a third goes on from the first.
  const auto next_turn = [&] {
    Request r = served.request(kQuestions[2]);
    std::vector<int32_t> ids = held;
    ids.push_back(served.engine->geometry().eos_token_id);
    ids.insert(ids.end(), r.prompt.begin() + 1, r.prompt.end());
    r.prompt = ids;
    return r;
  };
  std::atomic<int> layers{0};
  served.engine->step().set_observer([&](int, TensorView<const float, 3>) { ++layers; });
  std::atomic<RequestHandle*> running{nullptr};
  served.engine->step().set_observer([&](int layer, TensorView<const float, 3>) {
    ++layers;
    while (!running) std::this_thread::yield();
    if (layer == 0) running.load()->cancel();
  });
  Request second = next_turn();
  const auto handle = served.submit(std::move(second));
  running = handle.get();
  const Answer cancelled = test::collect(*handle)[0];
  EXPECT_EQ(cancelled.reason, FinishReason::cancelled);
  EXPECT_EQ(layers, 1) << "it ended before the next layer";
  served.engine->step().set_observer(nullptr);

  Request third = next_turn();
  const Answer warm = test::ask(*served.engine, std::move(third));
  Request salted = next_turn();
  salted.cache_salt = "another's";
  const Answer cold = test::ask(*served.engine, std::move(salted));
  EXPECT_EQ(warm.ids, cold.ids);
  EXPECT_EQ(warm.stats.cached_tokens, static_cast<int64_t>(held.size()));
  EXPECT_EQ(cold.stats.cached_tokens, 0);
}

TEST(StepLoop, ACancelledRequestLeavesTheQueueAndHurtsNoNeighbour) {
  Served served({.chunk = 64, .sequences = 1});
  served.hold_at_layer(0);
  const auto running = served.submit(served.request(kQuestions[0]));
  served.wait_until_held();
  const auto waiting = served.submit(served.request(kQuestions[1]));
  waiting->cancel();
  EXPECT_EQ(served.engine->stats().waiting, 1);
  const auto now = std::chrono::steady_clock::now();
  const AnswerStats held = running->times(now), queued = waiting->times(now);
  EXPECT_GT(held.prefill_seconds, 0);
  EXPECT_EQ(held.decode_seconds, 0);
  EXPECT_GT(queued.queue_seconds, 0);
  EXPECT_EQ(queued.prefill_seconds, 0);
  served.release();
  EXPECT_EQ(test::collect(*waiting)[0].reason, FinishReason::cancelled);
  const Answer answer = test::collect(*running)[0];
  EXPECT_EQ(answer.text, "The capital of Norway is Oslo.");
  const AnswerStats told = running->times(std::chrono::steady_clock::now());
  EXPECT_EQ(told.prefill_seconds, answer.stats.prefill_seconds);
  EXPECT_GE(told.decode_seconds, answer.stats.decode_seconds);
  EXPECT_GT(answer.stats.decode_seconds, 0);
  EXPECT_EQ(served.settled(2).waiting, 0);
}

TEST(StepLoop, GapsBetweenStepsAreCountedByTheirCause) {
  Served served({.chunk = 64, .sequences = 1});
  test::ask(*served.engine, served.request(kQuestions[0]));
  const EngineStats first = served.settled(1);
  EXPECT_GT(first.between_steps_seconds, 0);
  EXPECT_EQ(first.idle_seconds, 0) << "it had something to run all the time";
  std::this_thread::sleep_for(200ms);
  const auto start = std::chrono::steady_clock::now();
  test::ask(*served.engine, served.request(kQuestions[0]));
  const EngineStats second = served.settled(2);
  const std::chrono::duration<double> asked = std::chrono::steady_clock::now() - start;
  EXPECT_GE(second.idle_seconds, 0.19);
  EXPECT_LT(second.between_steps_seconds + second.step_seconds - first.between_steps_seconds - first.step_seconds,
            asked.count() + 0.1)
      << "idle time is no work of the loop";
}

TEST(StepLoop, AFlushForgetsPrefixesBetweenStepsAndAnswersStayTheSame) {
  Served served({.chunk = 64, .sequences = 2, .prefix_cache_bytes = 64 << 20});
  const auto ask = [&] { return test::ask(*served.engine, served.request(kQuestions[1])); };
  const auto flush = [&] {
    std::promise<PrefixCacheFlush> told;
    served.engine->flush_prefix_cache([&](const PrefixCacheFlush& flushed) { told.set_value(flushed); });
    return told.get_future().get();
  };
  const Answer cold = ask(), warm = ask();
  EXPECT_EQ(cold.stats.cached_tokens, 0);
  EXPECT_GT(warm.stats.cached_tokens, 0);
  const PrefixCacheFlush first = flush();
  EXPECT_GT(first.checkpoints, 0);
  EXPECT_GT(first.checkpoint_bytes, 0);
  EXPECT_EQ(served.engine->stats().kv_tokens_used, 0);
  const Answer again = ask();
  EXPECT_EQ(again.stats.cached_tokens, 0);
  EXPECT_EQ(again.ids, cold.ids);
  EXPECT_EQ(warm.ids, cold.ids);
  flush();
  EXPECT_EQ(flush().checkpoints, 0) << "of an empty cache";

  // While somebody's answer grows: between two of its steps.
  Request running = served.request(kQuestions[1], 24);
  running.ignore_eos = true;
  const auto handle = served.submit(std::move(running));
  flush();
  EXPECT_EQ(test::collect(*handle)[0].ids.size(), 24U);
}

TEST(StepLoop, ADeadlineEndsARequestWhereverItIs) {
  Served served({.chunk = 64, .sequences = 1});
  Request endless = served.request(kQuestions[0], -1);
  endless.ignore_eos = true;
  endless.deadline = std::chrono::steady_clock::now() + 30ms;
  Request behind = served.request(kQuestions[1]);
  behind.deadline = std::chrono::steady_clock::now() - 1ms;
  const auto a = served.submit(std::move(endless)), b = served.submit(std::move(behind));
  for (const auto& handle : {a, b}) {
    const Answer answer = test::collect(*handle)[0];
    EXPECT_EQ(answer.reason, FinishReason::error);
    EXPECT_EQ(answer.error.code, ErrorCode::deadline);
  }
}

TEST(StepLoop, ASlowClientLosesNothingAndAStalledOneIsCancelled) {
  LoopOptions options;
  options.stream_capacity = 4;
  options.stream_stall = 100ms;
  Served served({.sequences = 2}, options);
  Request r = served.request(kQuestions[0], 12);
  r.ignore_eos = true;
  const auto stalled = served.submit(std::move(r));
  const Answer other = test::ask(*served.engine, served.request(kQuestions[0]));  // takes as it comes
  EXPECT_EQ(other.text, "The capital of Norway is Oslo.");
  while (stalled->phase() != RequestPhase::finished) std::this_thread::sleep_for(5ms);
  EXPECT_EQ(test::collect(*stalled)[0].reason, FinishReason::cancelled);

  LoopOptions patient = options;
  patient.stream_stall = 60s;
  Served waits({}, patient);
  Request slow = waits.request(kQuestions[0]);
  const auto handle = waits.submit(std::move(slow));
  while (handle->stream().room(2)) std::this_thread::sleep_for(1ms);  // it is full, and the request stands still
  std::this_thread::sleep_for(20ms);
  EXPECT_EQ(test::collect(*handle)[0].text, "The capital of Norway is Oslo.");
}

TEST(StepLoop, AHangingStepFailsItsRequestsAndHealthIsRedUntilItEnds) {
  LoopOptions options;
  options.watchdog = kHang;
  Served served({.sequences = 1}, options);
  served.hold_at_layer(1);
  const auto running = served.submit(served.request(kQuestions[0])),
             waiting = served.submit(served.request(kQuestions[1]));
  for (const auto& handle : {running, waiting}) {
    const Answer answer = test::collect(*handle)[0];
    EXPECT_EQ(answer.error.code, ErrorCode::internal);
    EXPECT_NE(answer.error.message.find("no progress in " + std::to_string(kHang.count()) + " ms"), std::string::npos)
        << answer.error.message;
  }
  EXPECT_EQ(served.engine->health().state, EngineHealth::State::failed);
  EXPECT_EQ(served.engine->submit(served.request(kQuestions[0])).error().code, ErrorCode::unavailable);
  served.release();
  while (!served.engine->health().ok()) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(test::ask(*served.engine, served.request(kQuestions[0])).text, "The capital of Norway is Oslo.");
}

TEST(StepLoop, ARequestInItsFirstStepRuns) {
  Served served({.sequences = 1});
  served.hold_at_layer(1);
  const auto handle = served.submit(served.request(kQuestions[0]));
  while (served.engine->stats().step_running_seconds == 0) std::this_thread::sleep_for(1ms);
  const EngineStats stats = served.engine->stats();
  EXPECT_EQ(stats.running, 1);
  EXPECT_GT(stats.kv_tokens_used, 0);
  served.release();
  EXPECT_EQ(test::collect(*handle)[0].text, "The capital of Norway is Oslo.");
}

TEST(StepLoop, AnExceptionOnTheStepThreadEndsWhatIsThereAndTheLoopGoesOn) {
  Served served({.sequences = 1});
  served.engine->step().set_observer([](int, TensorView<const float, 3>) { throw std::runtime_error("planted"); });
  const auto running = served.submit(served.request(kQuestions[0])),
             waiting = served.submit(served.request(kQuestions[1]));
  const Answer first = test::collect(*running)[0];
  EXPECT_EQ(first.error.code, ErrorCode::internal);
  EXPECT_NE(first.error.message.find("planted"), std::string::npos);
  EXPECT_EQ(test::collect(*waiting)[0].reason, FinishReason::error);
  EXPECT_EQ(served.settled(2).kv_tokens_used, 0);
  served.engine->step().set_observer(nullptr);
  EXPECT_EQ(test::ask(*served.engine, served.request(kQuestions[0])).text, "The capital of Norway is Oslo.");
}

TEST(StepLoop, ADrainLetsAnswersEndAndFailsThemAfterItsDeadline) {
  {
    Served served;
    const auto handle = served.submit(served.request(kQuestions[0]));
    served.engine->drain(std::chrono::steady_clock::now() + 600s);
    EXPECT_EQ(served.engine->submit(served.request(kQuestions[1])).error().code, ErrorCode::unavailable);
    EXPECT_EQ(test::collect(*handle)[0].text, "The capital of Norway is Oslo.");
    while (served.engine->health().state != EngineHealth::State::stopped) std::this_thread::sleep_for(1ms);
  }
  Served served;
  Request endless = served.request(kQuestions[0], -1);
  endless.ignore_eos = true;
  served.hold_at_layer(0);
  const auto handle = served.submit(std::move(endless));
  served.wait_until_held();
  served.engine->drain(std::chrono::steady_clock::now());
  served.release();
  const Answer answer = test::collect(*handle)[0];
  EXPECT_EQ(answer.error.code, ErrorCode::unavailable);
}

TEST(StepLoop, AnEngineEndsWithRequestsInIt) {
  std::shared_ptr<RequestHandle> running, waiting;
  {
    Served served({.sequences = 1});
    Request endless = served.request(kQuestions[0], -1);
    endless.ignore_eos = true;
    running = served.submit(std::move(endless));
    waiting = served.submit(served.request(kQuestions[1]));
  }
  for (const auto& handle : {running, waiting}) EXPECT_EQ(test::collect(*handle)[0].ends, 1);
  running->cancel();  // nobody listens any more
}

TEST(StepLoop, ManyClientsCancelAtRandomAndNothingIsLeft) {
  Served served({.chunk = 32, .sequences = 6, .context = 512, .kv_tokens = 1024});
  std::vector<Answer> solo;
  for (const char* question : kQuestions) solo.push_back(test::ask(*served.engine, served.request(question, 30)));
  std::vector<std::thread> clients;
  for (int c = 0; c < 6; ++c)
    clients.emplace_back([&, c] {
      std::mt19937 random(static_cast<unsigned>(c));
      for (int i = 0; i < kMany; ++i) {
        const size_t q = random() % std::size(kQuestions);
        Request r = served.request(kQuestions[q], 30);
        r.key = std::to_string(c % 3);
        const auto handle = served.submit(std::move(r));
        if (random() % 3 == 0) {
          if (random() % 2) handle->stream().wait_for(std::chrono::milliseconds(random() % 20));
          handle->cancel();
          const Answer answer = test::collect(*handle)[0];
          EXPECT_EQ(answer.ends, 1);
          EXPECT_TRUE(solo[q].text.starts_with(answer.text)) << answer.text;
        } else {
          EXPECT_EQ(test::collect(*handle)[0].ids, solo[q].ids);
        }
      }
    });
  for (std::thread& client : clients) client.join();
  const EngineStats stats = served.settled(6 * kMany + static_cast<int64_t>(std::size(kQuestions)));
  EXPECT_EQ(stats.waiting, 0);
  EXPECT_EQ(stats.kv_tokens_used, 0);
  EXPECT_EQ(stats.finished + stats.cancelled, 6 * kMany + static_cast<int64_t>(std::size(kQuestions)));
  EXPECT_EQ(stats.failed, 0);
}

}  // namespace
}  // namespace thermocline
