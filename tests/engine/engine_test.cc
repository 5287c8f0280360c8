// runtime/engine: stop strings, generation against recorded continuations.
#include "runtime/engine/generation.h"
#include "tests/support/models.h"

namespace thermocline {
namespace {

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
