// runtime/engine: sampling, stop strings, generation against recorded continuations.
#include "runtime/engine/generation.h"
#include "runtime/engine/sampler.h"
#include "tests/support/models.h"

namespace thermocline {
namespace {

SamplingParams params(double temperature) {
  SamplingParams p;
  p.temperature = temperature;
  p.seed = 7;
  p.has_seed = true;
  return p;
}

std::vector<int> histogram(const SamplingParams& p, const std::vector<float>& logits, int draws) {
  Sampler sampler(p, {});
  std::vector<int> counts(logits.size());
  for (int i = 0; i < draws; ++i) ++counts[static_cast<size_t>(sampler.sample(logits))];
  return counts;
}

TEST(Sampler, ZeroTemperatureTakesTheBestAndTheLowerIdAmongEquals) {
  Sampler sampler(params(0), {});
  EXPECT_EQ(sampler.sample(std::vector<float>{1, 3, 3, 2}), 1);
}

TEST(Sampler, DrawsFollowTheDistribution) {
  const std::vector<float> logits = {0, std::log(2.0f), std::log(5.0f)};
  const std::vector<int> counts = histogram(params(1), logits, 40000);
  EXPECT_NEAR(counts[0], 5000, 400);
  EXPECT_NEAR(counts[1], 10000, 500);
  const std::vector<int> hot = histogram(params(100), logits, 30000);
  EXPECT_NEAR(hot[0], 10000, 500);
}

TEST(Sampler, FiltersKeepWhatTheySay) {
  const std::vector<float> logits = {0, std::log(2.0f), std::log(5.0f)};  // 1/8, 2/8, 5/8
  SamplingParams top_k = params(1);
  top_k.top_k = 2;
  EXPECT_EQ(histogram(top_k, logits, 2000)[0], 0);
  SamplingParams top_p = params(1);
  top_p.top_p = 0.6;
  EXPECT_EQ(histogram(top_p, logits, 2000)[2], 2000);
  top_p.top_p = 0.7;
  EXPECT_GT(histogram(top_p, logits, 2000)[1], 0);
  EXPECT_EQ(histogram(top_p, logits, 2000)[0], 0);
  SamplingParams min_p = params(1);
  min_p.min_p = 0.3;
  EXPECT_EQ(histogram(min_p, logits, 2000)[0], 0);
  EXPECT_GT(histogram(min_p, logits, 2000)[1], 0);
}

TEST(Sampler, PenaltiesPushDownWhatWasSeen) {
  SamplingParams p = params(0);
  p.repetition_penalty = 2;
  const std::vector<int32_t> prompt = {1};
  Sampler repetition(p, prompt);
  EXPECT_EQ(repetition.sample(std::vector<float>{2.0f, 3.0f}), 0);
  p = params(0);
  p.presence_penalty = 1;
  Sampler presence(p, prompt);  // the prompt does not count
  EXPECT_EQ(presence.sample(std::vector<float>{2.5f, 3.0f}), 1);
  EXPECT_EQ(presence.sample(std::vector<float>{2.5f, 3.0f}), 0);
  p = params(0);
  p.frequency_penalty = 0.3;
  Sampler frequency(p, {});
  EXPECT_EQ(frequency.sample(std::vector<float>{2.5f, 3.0f}), 1);
  EXPECT_EQ(frequency.sample(std::vector<float>{2.5f, 3.0f}), 1);
  EXPECT_EQ(frequency.sample(std::vector<float>{2.5f, 3.0f}), 0);
}

TEST(Sampler, ASeedRepeatsAndRangesAreNamed) {
  std::mt19937 random(1);
  const std::vector<float> logits = test::random_floats(random, 500);
  Sampler a(params(1), {}), b(params(1), {});
  for (int i = 0; i < 50; ++i) EXPECT_EQ(a.sample(logits), b.sample(logits));
  SamplingParams bad;
  bad.top_p = 1.5;
  EXPECT_EQ(bad.check().error().field, "top_p");
  bad = {};
  bad.temperature = std::nan("");
  EXPECT_EQ(bad.check().error().field, "temperature");
}

TEST(StopMatcher, FindsStopsAcrossPiecesAndLosesNothing) {
  const std::vector<std::string> stops = {"END", "##"};
  StopMatcher matcher(stops);
  bool stopped = false;
  EXPECT_EQ(matcher.push("abE", stopped), "ab");
  EXPECT_EQ(matcher.push("N", stopped), "");
  EXPECT_EQ(matcher.push("xE", stopped), "ENx");
  EXPECT_EQ(matcher.push("NDyz", stopped), "");
  EXPECT_TRUE(stopped);
  StopMatcher open(stops);
  EXPECT_EQ(open.push("a#", stopped), "a");
  EXPECT_EQ(open.finish(), "#");
}

/// Greedy continuations recorded from the published code, token for token, in published and bf16 numerics.
class Greedy : public ::testing::TestWithParam<Isa> {};

TEST_P(Greedy, ContinuationsAreTheRecordedOnes) {
  const auto tokenizer = Tokenizer::load(test::demo_model()).value();
  std::map<std::string, std::unique_ptr<Engine>> engines;
  int count = 0;
  for (const Json& line : test::read_jsonl(test::golden("demo/greedy.jsonl"))) {
    const std::string numerics = line["numerics"].get<std::string>();
    if (!engines[numerics])
      engines[numerics] = test::open_engine(
          {.folder = test::demo_model(), .numerics = parse_numerics(numerics).value(), .isa = GetParam()});
    GenerationRequest request;
    request.prompt = tokenizer->encode(line["prompt"].get<std::string>()).value();
    ASSERT_EQ(request.prompt.size(), line["prompt_tokens"].get<size_t>());
    request.sampling.temperature = 0;
    const std::vector<int32_t> expected = line["ids"].get<std::vector<int32_t>>();
    request.max_tokens = static_cast<int64_t>(expected.size());
    auto sequence = engines[numerics]->new_sequence().value();
    std::string text;
    const std::atomic<bool> cancel{false};
    const GenerationResult result =
        generate(*engines[numerics], *tokenizer, *sequence, request, cancel, [&](const std::string& piece, int32_t) {
          text += piece;
          return true;
        }).value();
    EXPECT_EQ(result.ids, expected) << numerics << ": " << line["prompt"];
    std::string expected_text = line["text"].get<std::string>();
    EXPECT_EQ(text, expected_text);
#ifdef TC_SANITIZED
    if (++count == 6) break;
#else
    ++count;
#endif
  }
  EXPECT_GT(count, 5);
}

INSTANTIATE_TEST_SUITE_P(Isa, Greedy, ::testing::ValuesIn(test::isas()),
                         [](const auto& test) { return test::isa_test_name(test.param); });

TEST(Generation, StopsLimitsAndCancels) {
  const auto tokenizer = Tokenizer::load(test::demo_model()).value();
  const auto engine = test::open_engine({.folder = test::demo_model()});
  GenerationRequest request;
  request.prompt =
      tokenizer->encode("<｜begin▁of▁sentence｜><｜User｜>What is the capital of Norway?<｜Assistant｜></think>")
          .value();
  request.sampling.temperature = 0;
  std::atomic<bool> cancel{false};
  std::string text;
  const auto run = [&] {
    text.clear();
    auto sequence = engine->new_sequence().value();
    return generate(*engine, *tokenizer, *sequence, request, cancel, [&](const std::string& piece, int32_t) {
      text += piece;
      return true;
    });
  };
  EXPECT_EQ(run()->reason, FinishReason::stop);
  EXPECT_EQ(text, "The capital of Norway is Oslo.");
  request.stop = {"Norway is"};
  EXPECT_EQ(run()->reason, FinishReason::stop);
  EXPECT_EQ(text, "The capital of ");
  request.stop.clear();
  request.max_tokens = 2;
  EXPECT_EQ(run()->reason, FinishReason::length);
  EXPECT_EQ(run()->completion_tokens, 2);
  request.max_tokens = 20;
  request.ignore_eos = true;
  EXPECT_EQ(run()->completion_tokens, 20);
  cancel = true;
  EXPECT_EQ(run()->reason, FinishReason::cancelled);
  cancel = false;
  request.prompt.clear();
  EXPECT_EQ(run().error().field, "prompt");
  request.prompt.assign(2000, 5);
  EXPECT_EQ(run().error().field, "prompt");
}

}  // namespace
}  // namespace thermocline
