// runtime/engine: stop strings, generation against recorded continuations.
#include "tests/support/answers.h"

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
  StopMatcher including(stops, true);
  EXPECT_EQ(including.push("xENDy", stopped), "xEND");
}

/// Greedy continuations recorded from the published code, token for token, in published and bf16 numerics.
class Greedy : public ::testing::TestWithParam<Isa> {};

TEST_P(Greedy, ContinuationsAreTheRecordedOnes) {
  const auto tokenizer = Tokenizer::load(test::demo_model()).value();
  std::map<std::string, std::unique_ptr<Engine>> engines;
  int count = 0;
  for (const Json& line : test::read_jsonl(test::golden("demo/greedy.jsonl"))) {
    const std::string numerics = line["numerics"].get<std::string>();
    if (!engines[numerics]) {
      engines[numerics] = test::open_engine(
          {.folder = test::demo_model(), .numerics = parse_numerics(numerics).value(), .isa = GetParam()});
      ASSERT_TRUE(engines[numerics]->start(*tokenizer).ok());
    }
    const std::vector<int32_t> expected = line["ids"].get<std::vector<int32_t>>();
    Request request =
        test::request_of(*tokenizer, line["prompt"].get<std::string>(), static_cast<int64_t>(expected.size()));
    ASSERT_EQ(request.prompt.size(), line["prompt_tokens"].get<size_t>());
    request.skip_special_tokens = false;
    const test::Answer answer = test::ask(*engines[numerics], std::move(request));
    EXPECT_EQ(answer.ids, expected) << numerics << ": " << line["prompt"];
    EXPECT_EQ(answer.text, line["text"].get<std::string>());
#ifdef TC_SANITIZED
    if (++count == 6) break;
#else
    ++count;
#endif
  }
  EXPECT_GT(count, 5);
}

INSTANTIATE_TEST_SUITE_P(Isa, Greedy, ::testing::ValuesIn(test::model_isas()),
                         [](const auto& test) { return test::isa_test_name(test.param); });

}  // namespace
}  // namespace thermocline
