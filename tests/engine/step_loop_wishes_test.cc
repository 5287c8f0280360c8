// runtime/engine: what a request may want of the step loop beside tokens: an end of its reasoning, news of its prompt,
// and not to wait for ever.
#include <thread>

#include "tests/support/served.h"

namespace thermocline {
namespace {

using namespace std::chrono_literals;
using test::Answer;
using test::kQuestions;
using test::Served;

TEST(StepLoop, ReasoningEndsWithItsBudget) {
  Served served({.chunk = 64, .sequences = 2});
  const int32_t end = *served.tokenizer->id_of("</think>");
  const auto ask = [&](int64_t budget, bool logprobs = false, double temperature = 0) {
    Request r = served.request(kQuestions[1], 16);
    r.reasoning_budget = budget;
    r.reasoning_end = end;
    r.ignore_eos = true;
    r.sampling.temperature = temperature;
    if (logprobs) r.top_logprobs = 1;
    return test::ask(*served.engine, std::move(r));
  };
  const Answer free = ask(-1);
  ASSERT_EQ(std::count(free.ids.begin(), free.ids.end(), end), 0) << "it thinks on";
  for (const int64_t budget : {0, 1, 5}) {
    const Answer limited = ask(budget);
    EXPECT_TRUE(std::equal(free.ids.begin(), free.ids.begin() + budget, limited.ids.begin())) << budget;
    EXPECT_EQ(limited.ids[static_cast<size_t>(budget)], end) << budget;
    EXPECT_EQ(std::count(limited.ids.begin(), limited.ids.end(), end), 1) << "once, and the answer goes on";
    EXPECT_EQ(limited.ids.size(), 16u);
    const Answer scored = ask(budget, true);
    EXPECT_EQ(scored.ids, limited.ids);
    EXPECT_LT(scored.logprobs[static_cast<size_t>(budget)].logprob, 0)
        << "the model's own, of a token it did not choose";
    EXPECT_EQ(ask(budget, false, .8).ids[static_cast<size_t>(budget)], end);
  }
  EXPECT_EQ(ask(100).ids, free.ids);
}

TEST(StepLoop, ProgressOfAPromptIsTold) {
  Served served({.chunk = 32, .sequences = 1, .prefix_cache_bytes = 64 << 20});
  for (const bool cached : {false, true}) {
    Request r = served.request(kQuestions[0], 2);
    r.prompt.resize(150, 5);
    r.report_progress = true;
    const auto handle = served.submit(std::move(r));
    std::vector<TokenEvent> told;
    int tokens = 0;
    while (handle->stream().wait_for(std::chrono::seconds(60)) && !handle->stream().finished())
      for (TokenEvent& event : handle->stream().take()) {
        if (event.kind == TokenEvent::Kind::progress) {
          EXPECT_EQ(tokens, 0) << "before the first token";
          told.push_back(std::move(event));
        } else {
          ++tokens;
        }
      }
    ASSERT_FALSE(told.empty());
    EXPECT_EQ(told.front().processed_tokens, cached ? 149 : 0) << "what the cache has is there from the start";
    EXPECT_EQ(told.front().stats.cached_tokens, told.front().processed_tokens);
    EXPECT_TRUE(cached || told.size() >= 5) << "chunks of 32 of 150 tokens";
    for (size_t i = 1; i < told.size(); ++i) EXPECT_GT(told[i].processed_tokens, told[i - 1].processed_tokens);
    EXPECT_LT(told.back().processed_tokens, 150);
    EXPECT_EQ(told.back().stats.prompt_tokens, 150);
  }
}

TEST(StepLoop, WhoWaitsTooLongIsRefused) {
  LoopOptions options;
  options.queue_timeout = 50ms;
  Served served({.chunk = 64, .sequences = 1}, options);
  served.hold_at_layer(0);
  const auto running = served.submit(served.request(kQuestions[0]));
  served.wait_until_held();
  Request three = served.request(kQuestions[1]);
  three.choices = 3;
  const auto waiting = served.submit(std::move(three));
  std::this_thread::sleep_for(60ms);
  served.release();
  for (const Answer& refused : test::collect(*waiting, 3)) {
    EXPECT_EQ(refused.error.code, ErrorCode::overloaded);
    EXPECT_NE(refused.error.message.find("--queue-timeout"), std::string::npos) << refused.error.message;
  }
  EXPECT_EQ(test::collect(*running)[0].text, "The capital of Norway is Oslo.") << "who has begun goes on";
  const EngineStats stats = served.settled(4);
  EXPECT_EQ(stats.waiting, 0);
  EXPECT_EQ(stats.failed, 3) << "no choice was begun";
}

}  // namespace
}  // namespace thermocline
