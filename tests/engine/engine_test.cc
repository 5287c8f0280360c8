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

// With what the machine can do, steps are held against it; without, nobody says anything.
TEST(StepForecast, SumsWhatWasPredictedAndWhatWasTaken) {
  const auto tokenizer = Tokenizer::load(test::demo_model()).value();
  sched::MachineProfile machine;
  for (sched::KernelCurve& curve : machine.cpu.weights) curve = sched::KernelCurve::roof(1e6, 1e30, 1);  // 1 MB/s
  machine.cpu.attention_flops_one = machine.cpu.attention_flops_many = 1e30;
  machine.cpu.index_ops_one = machine.cpu.index_ops_many = 1e30;
  for (const bool known : {false, true}) {
    EngineOptions options;
    options.model = test::demo_model();
    options.max_isa = test::kModelIsa;
    options.threads = 2;
    options.max_context = 256;
    options.quiet = true;
    if (known) options.machine = machine;
    const auto engine = Engine::open(options).value();
    ASSERT_TRUE(engine->start(*tokenizer).ok());
    EXPECT_EQ(engine->stats().forecast.steps, 0) << "the loop's own measuring is nobody's step";
    test::ask(*engine, test::request_of(*tokenizer, test::chat_prompt("Hello"), 4));
    const ForecastStats forecast = engine->stats().forecast;
    if (!known) {
      EXPECT_EQ(forecast.steps, 0);
      continue;
    }
    EXPECT_EQ(forecast.steps, engine->stats().steps);
    using sched::Phase;
    EXPECT_GT(forecast.predicted.total, 10 * forecast.measured.total) << "no memory is that slow";
    EXPECT_GT(forecast.predicted[Phase::experts_cpu], 10 * forecast.measured[Phase::experts_cpu]);
    EXPECT_EQ(forecast.factors[static_cast<size_t>(Phase::experts_cpu)], sched::Correction::kLeast);
    EXPECT_LT(forecast.corrected_ns, forecast.predicted.total) << "every step after the first was corrected";
    EXPECT_EQ(forecast.predicted[Phase::experts_gpu], 0);
    EXPECT_EQ(forecast.factors[static_cast<size_t>(Phase::experts_gpu)], 1);
  }
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
