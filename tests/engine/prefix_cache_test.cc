// Warm equals cold: answers of a loop with the prefix cache against those of one without, to the last bit of every
// log-probability, whatever was asked before, beside it, or was cut off.
#include <thread>

#include "tests/support/warm_cold.h"

namespace thermocline {
namespace {

using test::Answer;
using test::expect_same;
using test::Loop;
using test::ModelSetup;
using test::request;
using test::text_of;
using test::Where;

class Warm : public testing::TestWithParam<Where> {
 protected:
  ModelSetup setup(int64_t cache_bytes, int64_t chunk = 512) const {
    return {.folder = test::long_demo(),
            .chunk = chunk,
            .sequences = 4,
            .context = tokens(8192, 256),
            .kv_tokens = tokens(16384, 1024),
            .prefix_cache_bytes = cache_bytes,
            .device = GetParam().device};
  }
  static constexpr int64_t kBytes = 256 << 20, kLittle = 2 << 20;
  bool simt() const { return GetParam().device == "simt"; }  // a second for 30 tokens
  int64_t tokens(int64_t host, int64_t simt) const { return this->simt() ? simt : host; }
#ifdef TC_SANITIZED  // ten times slower
  static constexpr int64_t kLong = 1100, kLonger = 1300, kUsers = 6;
#else
  static constexpr int64_t kLong = 5000, kLonger = 2600, kUsers = 12;
#endif
};

TEST_P(Warm, EqualsColdForEveryPrefixLength) {
  Loop cold(setup(0));
  for (const int64_t chunk : {512, 100}) {
    if (simt() && chunk == 512) continue;
    Loop warm(setup(kBytes, chunk));
    for (const int64_t length : std::vector<int64_t>{1, 3, 4, 5, 127, 128, 129, 255, 256, 257, kLong}) {
      if (simt() && length != 4 && length != 129) continue;
      const std::vector<int32_t> prompt = text_of(length);
      const Answer first = warm.ask(request(prompt)), again = warm.ask(request(prompt));
      const Answer want = cold.ask(request(prompt));
      const std::string what = std::to_string(length) + " tokens in chunks of " + std::to_string(chunk);
      expect_same(first, want, what + ", first");
      expect_same(again, want, what + ", again");
      EXPECT_EQ(again.stats.cached_tokens, length - 1) << what;
      EXPECT_EQ(want.stats.cached_tokens, 0);
      // The next turn begins with prompt and answer.
      std::vector<int32_t> next = prompt;
      next.insert(next.end(), want.ids.begin(), want.ids.end());
      next.push_back(9);
      const Answer turn = warm.ask(request(next));
      expect_same(turn, cold.ask(request(next)), what + ", the next turn");
      EXPECT_EQ(turn.stats.cached_tokens, length + 5) << what;
    }
  }
}

TEST_P(Warm, EqualsColdWhenATokenIsAnother) {
  Loop cold(setup(0)), warm(setup(kBytes));
  const int64_t length = tokens(kLonger, 70);
  const std::vector<int32_t> prompt = text_of(length);
  (void)warm.ask(request(prompt));
  for (const int64_t at : {int64_t{0}, int64_t{3}, length / 20, length / 2, length * 9 / 10, length - 2, length - 1}) {
    if (simt() && at != length / 2 && at != length - 1) continue;
    std::vector<int32_t> other = prompt;
    other[static_cast<size_t>(at)] += 1;
    const Answer got = warm.ask(request(other));
    expect_same(got, cold.ask(request(other)), "token " + std::to_string(at));
    // A checkpoint lies at every 1,024 tokens of a long prompt.
    EXPECT_EQ(got.stats.cached_tokens, at == length - 1 ? length - 1 : at / 1024 * 1024) << at;
  }
}

TEST_P(Warm, EqualsColdAfterACancelInThePromptAndInTheAnswer) {
  Loop cold(setup(0)), warm(setup(kBytes, 64));
  const std::vector<int32_t> prompt = text_of(tokens(900, 70));
  const Answer want = cold.ask(request(prompt));
  for (const int stop_after : {1, 9, 200}) {  // steps: the first chunk, a later one, an answer that has begun
    std::atomic<int> steps{0};
    std::atomic<RequestHandle*> running{nullptr};
    Request r = request(prompt, 64);
    r.cache_salt = std::to_string(stop_after);
    const auto handle = warm.submit(std::move(r));
    while (handle->phase() == RequestPhase::waiting) std::this_thread::yield();
    const int64_t tokens = stop_after == 200 ? 1 : 0;
    while (tokens > 0 && handle->phase() != RequestPhase::decode && handle->phase() != RequestPhase::finished)
      std::this_thread::yield();
    if (stop_after == 9) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    handle->cancel();
    (void)test::collect(*handle);
    Request again = request(prompt);
    again.cache_salt = std::to_string(stop_after);
    expect_same(warm.ask(std::move(again)), want, "cancelled, case " + std::to_string(stop_after));
  }
}

TEST_P(Warm, EveryChoiceSharesOnePrompt) {
  Loop cold(setup(0)), warm(setup(kBytes));
  const std::vector<int32_t> prompt = text_of(tokens(300, 30));
  const auto choices = [&] {
    Request r = request(prompt, 8);
    r.choices = 4;
    r.sampling.temperature = 1;
    r.sampling.has_seed = true;
    r.sampling.seed = 3;
    return r;
  };
  const std::vector<Answer> want = test::collect(*cold.submit(choices()), 4),
                            got = test::collect(*warm.submit(choices()), 4);
  for (size_t i = 0; i < 4; ++i) {
    expect_same(got[i], want[i], "choice " + std::to_string(i));
    EXPECT_EQ(got[i].stats.cached_tokens, i == 0 ? 0 : static_cast<int64_t>(prompt.size()) - 1);
  }
}

// Choices that wait for the first one's prompt end with their request, before it, within it and after it.
TEST_P(Warm, WaitingChoicesEndWithTheirRequest) {
  Loop warm(setup(kBytes, 16));
  for (int round = 0; round < (simt() ? 2 : 40); ++round) {
    Request r = request(text_of(20 + round), 40);
    r.choices = 4;
    r.cache_salt = std::to_string(round);
    const auto handle = warm.submit(std::move(r));
    if (round % 4 == 1)
      while (handle->phase() == RequestPhase::waiting) std::this_thread::yield();
    if (round % 4 == 2)
      while (handle->phase() != RequestPhase::decode) std::this_thread::yield();
    handle->cancel();
    for (const Answer& answer : test::collect(*handle, 4)) EXPECT_EQ(answer.ends, 1);
  }
  EngineStats stats = warm.engine->stats();
  for (; stats.running + stats.waiting > 0; stats = warm.engine->stats()) std::this_thread::yield();
  EXPECT_EQ(stats.kv_tokens_used, 0);
}

TEST_P(Warm, IsPrivateToTheKey) {
  Loop warm(setup(kBytes));
  const auto as = [&](const char* key, const char* salt) {
    Request r = request(text_of(20), 1);
    r.key = key;
    r.cache_salt = salt;
    return warm.ask(std::move(r)).stats.cached_tokens;
  };
  EXPECT_EQ(as("alice", ""), 0);
  EXPECT_EQ(as("bob", ""), 0) << "another key computes it for itself";
  EXPECT_EQ(as("alice", "x"), 0);
  EXPECT_EQ(as("alice", ""), 19);
}

// Prompt log-probabilities need the logits of every token: nothing of such a prompt is taken from the cache.
TEST_P(Warm, PromptLogprobsAreComputed) {
  Loop cold(setup(0)), warm(setup(kBytes));
  const int64_t length = tokens(100, 12);
  Request r = request(text_of(length), 1), same = request(text_of(length), 1);
  (void)warm.ask(request(text_of(length), 1));
  r.prompt_top_logprobs = 1;
  same.prompt_top_logprobs = 1;
  const Answer got = warm.ask(std::move(r)), want = cold.ask(std::move(same));
  EXPECT_EQ(got.stats.cached_tokens, 0);
  ASSERT_EQ(got.prompt_logprobs.size(), want.prompt_logprobs.size());
  for (size_t i = 0; i < want.prompt_logprobs.size(); ++i)
    EXPECT_EQ(got.prompt_logprobs[i].logprob, want.prompt_logprobs[i].logprob);
}

// Conversations that share a beginning, side by side, with pages for a tenth of them: what one leaves another finds, or
// not; every answer is the one it has alone, and in the end no sequence holds a page.
TEST_P(Warm, ConversationsInLittleMemoryEqualTheirSoloRuns) {
  ModelSetup little = setup(kLittle, 96);
  little.context = tokens(1024, 256);
  little.kv_tokens = tokens(2048, 256);
  if (simt()) little.hot_rows = 20;
  Loop cold(setup(0)), warm(little);
  const int users = simt() ? 3 : kUsers, turns = simt() ? 2 : 3;
  const std::vector<int32_t> system = text_of(tokens(260, 40));
  std::vector<std::vector<int32_t>> prompts(static_cast<size_t>(users), system);
  int64_t cached = 0;
  for (int turn = 0; turn < turns; ++turn) {
    std::vector<std::shared_ptr<RequestHandle>> handles;
    for (int user = 0; user < users; ++user) {
      std::vector<int32_t>& prompt = prompts[static_cast<size_t>(user)];
      const std::vector<int32_t> said = text_of(40 + 13 * user);
      prompt.insert(prompt.end(), said.end() - tokens(30, 6) - user, said.end());
      handles.push_back(warm.submit(request(prompt, 5)));
    }
    for (int user = 0; user < users; ++user) {
      std::vector<int32_t>& prompt = prompts[static_cast<size_t>(user)];
      const Answer got = test::collect(*handles[static_cast<size_t>(user)])[0];
      expect_same(got, cold.ask(request(prompt, 5)), "user " + std::to_string(user) + ", turn " + std::to_string(turn));
      cached += got.stats.cached_tokens;
      prompt.insert(prompt.end(), got.ids.begin(), got.ids.end());
    }
  }
  EXPECT_GT(cached, 0);
  EngineStats stats = warm.engine->stats();
  for (; stats.running > 0; stats = warm.engine->stats()) std::this_thread::yield();
  EXPECT_EQ(stats.kv_tokens_used, 0);
  EXPECT_GT(stats.prefix_cache.evictions, 0);
  EXPECT_LE(stats.prefix_cache.checkpoint_bytes, kLittle);
  if (simt()) {
    EXPECT_GT(stats.hot_rows.copied, 0);
    EXPECT_GT(stats.hot_rows.found, 0);
  }
}

// Sequences that share a beginning outgrow the pages together: who gives way gives back only what nobody else has, and
// every answer is still the one it has alone; also where clients are read one after the other, and the streams of those
// behind are full when they give way and come back.
TEST(WarmAndCrowded, WhoeverGivesWayGivesOnlyItsOwnPages) {
  LoopOptions patient;
  patient.stream_stall = std::chrono::minutes(10);
  const std::vector<int32_t> system = text_of(260);
#ifdef TC_SANITIZED  // minutes
  const std::vector<size_t> capacities = {4};
#else
  const std::vector<size_t> capacities = {1024, 4};
#endif
  for (const size_t capacity : capacities) {
    patient.stream_capacity = capacity;
    Loop cold({.sequences = 6, .context = 1024}, patient);
    Loop warm({.sequences = 6, .context = 1024, .kv_tokens = 1024, .prefix_cache_bytes = 8 << 20}, patient);
    (void)warm.ask(request(system, 1));
    const int64_t answer = capacity == 4 ? 300 : 560;
    std::vector<std::shared_ptr<RequestHandle>> handles, alone;
    for (int user = 0; user < 5; ++user) {
      std::vector<int32_t> prompt = system;
      for (int i = 0; i <= user; ++i) prompt.push_back(100 + user);
      handles.push_back(warm.submit(request(prompt, answer)));
      alone.push_back(cold.submit(request(prompt, answer)));
    }
    for (size_t user = 0; user < handles.size(); ++user)
      expect_same(test::collect(*handles[user])[0], test::collect(*alone[user])[0], "user " + std::to_string(user));
    EngineStats stats = warm.engine->stats();
    for (; stats.running > 0; stats = warm.engine->stats()) std::this_thread::yield();
    EXPECT_GT(stats.preemptions + (capacity == 4), 0);
    EXPECT_EQ(stats.kv_tokens_used, 0);
    EXPECT_EQ(stats.failed, 0);
  }
}

std::vector<Where> places() {
#ifdef TC_SANITIZED
  return {{"cpu", "none"}};
#else
  return {{"cpu", "none"}, {"simt", "simt"}};
#endif
}
INSTANTIATE_TEST_SUITE_P(Places, Warm, testing::ValuesIn(places()), [](const auto& place) { return place.param.name; });

}  // namespace
}  // namespace thermocline
