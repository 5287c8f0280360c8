// What suites that hold warm to cold share: loops, prompts, and the comparison of answers to the last bit.
#pragma once

#include "tests/support/answers.h"
#include "tests/support/demo_text.h"
#include "tests/support/long_demo.h"

namespace thermocline::test {

struct Where {
  std::string name, device;
};

/// An engine with its loop running.
struct Loop {
  explicit Loop(const ModelSetup& setup, const LoopOptions& options = {}) : engine(open_engine(setup)) {
    TC_CHECK(engine->start(demo_tokenizer(), options).ok());
  }
  std::shared_ptr<RequestHandle> submit(Request request) {
    return std::move(engine->submit(std::move(request))).value();
  }
  Answer ask(Request request) { return collect(*submit(std::move(request)))[0]; }
  PrefixCacheStats stats() const { return engine->stats().prefix_cache; }
  std::unique_ptr<Engine> engine;
};

/// `tokens` of a text; another for every number.
inline std::vector<int32_t> text_of(int64_t tokens, int number = 0) {
  std::string text;
  for (int i = 0; static_cast<int64_t>(text.size()) < 16 * tokens; ++i)
    text += (number > 0 ? std::to_string(number) + ". " : "") + "Tell me story " + std::to_string(i) +
            " about a fox. What is " + std::to_string(i % 9) + " + 4? ";
  std::vector<int32_t> ids = demo_tokenizer().encode(text).value();
  ids.resize(static_cast<size_t>(tokens));
  return ids;
}

inline Request request(std::vector<int32_t> prompt, int64_t max_tokens = 6) {
  Request r;
  r.prompt = std::move(prompt);
  r.sampling.temperature = 0;
  r.max_tokens = max_tokens;
  r.ignore_eos = true;
  r.top_logprobs = 4;
  return r;
}

inline void expect_same(const Answer& got, const Answer& want, const std::string& what) {
  ASSERT_EQ(got.ids, want.ids) << what;
  ASSERT_EQ(got.logprobs.size(), want.logprobs.size()) << what;
  for (size_t t = 0; t < got.logprobs.size(); ++t) {
    EXPECT_EQ(got.logprobs[t].logprob, want.logprobs[t].logprob) << what << ", token " << t;
    for (size_t k = 0; k < got.logprobs[t].top.size(); ++k)
      EXPECT_EQ(got.logprobs[t].top[k].logprob, want.logprobs[t].top[k].logprob) << what;
  }
}

}  // namespace thermocline::test
