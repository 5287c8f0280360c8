// The forward pass against the published model code: golden logits at every position, for every chunking, instruction
// set, thread count and batch.
#include "runtime/kv/synthetic_rows.h"
#include "tests/support/models.h"

namespace thermocline {
namespace {

constexpr double kFp32Tolerance = 2e-3;
constexpr double kInt8Kl = 3e-4;

class TinyModel : public ::testing::TestWithParam<const char*> {
 protected:
  const std::filesystem::path folder_ = test::golden(GetParam());
  const test::TensorFile golden_{folder_ / "golden.safetensors"};
};

TEST_P(TinyModel, Fp32LogitsAndMtpMatchAtEveryPosition) {
  const auto engine = test::open_engine({.folder = folder_, .numerics = Numerics::fp32, .mtp = true});
  std::vector<int32_t> ids = golden_.ids("ids");
#ifdef TC_SANITIZED
  ids.resize(150);  // ten times slower
#endif
  const std::vector<float> logits = golden_.floats("logits"), mtp = golden_.floats("mtp_logits");
  const size_t vocab = static_cast<size_t>(engine->geometry().vocab_size);
  const test::RunLogits whole = test::run_logits(*engine, ids, 512, -1, true);
  ASSERT_EQ(whole.logits.size(), ids.size() * vocab);
  EXPECT_LT(test::max_difference(whole.logits, logits, whole.logits.size()), kFp32Tolerance);
  ASSERT_EQ(whole.mtp.size(), (ids.size() - 1) * vocab);
  EXPECT_LT(test::max_difference(whole.mtp, mtp, std::min(mtp.size(), whole.mtp.size())), kFp32Tolerance);
}

/// Those whose residual streams were recorded too.
class TinyStreams : public TinyModel {};

TEST_P(TinyStreams, MatchAfterEveryLayer) {
  const auto engine = test::open_engine({.folder = folder_, .numerics = Numerics::fp32});
  std::vector<int32_t> ids = golden_.ids("ids");
  ids.resize(48);
  int layers = 0;
  engine->step().set_observer([&](int layer, TensorView<const float, 3> streams) {
    const std::vector<float> expected = golden_.floats("layers." + std::to_string(layer) + ".output");
    ASSERT_EQ(static_cast<int64_t>(expected.size()), streams.size());
    EXPECT_LT(test::max_difference(std::vector<float>(streams.data, streams.data + streams.size()), expected,
                                   expected.size()),
              kFp32Tolerance)
        << layer;
    ++layers;
  });
  test::run_logits(*engine, ids, 512);
  EXPECT_EQ(layers, engine->geometry().n_layers);
}

const auto kModelName = [](const auto& test) { return std::string(test.param).replace(4, 1, "_"); };
INSTANTIATE_TEST_SUITE_P(Golden, TinyModel, ::testing::Values("tiny-csa", "tiny-flash", "tiny-pro", "tiny-odd"),
                         kModelName);
INSTANTIATE_TEST_SUITE_P(Golden, TinyStreams, ::testing::Values("tiny-csa", "tiny-flash", "tiny-pro"), kModelName);

/// Chunkings and decoding from anywhere give the same bits, within one numerics and instruction set.
struct Path {
  const char* model;
  Numerics numerics;
  Isa isa;
  bool int8 = false;
};

class Chunking : public ::testing::TestWithParam<Path> {};

TEST_P(Chunking, AnySplitGivesTheSameBits) {
  const Path path = GetParam();
  const bool demo = std::string_view(path.model) == "demo";
  const std::filesystem::path folder = demo ? test::demo_model() : test::golden(path.model);
  const auto engine =
      test::open_engine({.folder = folder, .numerics = path.numerics, .isa = path.isa, .int8 = path.int8});
  std::vector<int32_t> ids =
      test::TensorFile(demo ? test::golden("demo/golden.safetensors") : folder / "golden.safetensors").ids("ids");
#ifdef TC_SANITIZED
  ids.resize(70);
#else
  if (ids.size() > 300) ids.resize(300);
#endif
  const std::vector<float> whole = test::run_logits(*engine, ids, static_cast<int64_t>(ids.size())).logits;
  for (const int64_t chunk : {1, 3, 4, 127, 128})
    EXPECT_EQ(test::run_logits(*engine, ids, chunk).logits, whole) << "chunk " << chunk;
  for (const int64_t from : {5, 63, static_cast<int>(ids.size()) - 2})
    EXPECT_EQ(test::run_logits(*engine, ids, 50, from).logits, whole) << "decode from " << from;
}

std::vector<Path> paths_of(const char* model) {
  std::vector<Path> list = {{model, Numerics::fp32, Isa::scalar}};
  for (const Isa isa : test::model_isas())
    for (const Numerics numerics : {Numerics::published, Numerics::bf16}) list.push_back({model, numerics, isa});
  list.push_back({model, Numerics::published, test::model_isas().back(), true});
  return list;
}

// The smallest model has every kind of layer. The others add shapes, not code: they run what a user gets, the best
// instruction set in the published numerics; under sanitizers, ten times slower, not at all.
std::vector<Path> paths() {
  std::vector<Path> list = paths_of("tiny-csa");
#ifndef TC_SANITIZED
  for (const char* model : {"tiny-odd", "tiny-pro", "demo"}) list.push_back({model, Numerics::published, Isa::amx});
#endif
  return list;
}

std::vector<Path> all_paths() {
  std::vector<Path> list;
  for (const char* model : {"tiny-csa", "tiny-odd", "tiny-pro", "demo"})
    for (const Path& path : paths_of(model)) list.push_back(path);
  return list;
}

std::string path_name(const ::testing::TestParamInfo<Path>& info) {
  std::string name = std::string(info.param.model) + "_" +
                     std::string(kNumericsNames[static_cast<int>(info.param.numerics)]) + "_" +
                     test::isa_test_name(info.param.isa) + (info.param.int8 ? "_int8" : "");
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Paths, Chunking, ::testing::ValuesIn(paths()), path_name);
INSTANTIATE_TEST_SUITE_P(Long, Chunking, ::testing::ValuesIn(all_paths()), path_name);

/// The demo model against recorded logits, within the bounds the recording came with.
class DemoModel : public ::testing::TestWithParam<Path> {};

struct Agreement {
  double mean_kl = 0, top1 = 0;
};
Agreement compare(const std::vector<float>& expected, const std::vector<float>& actual, size_t vocab) {
  const size_t tokens = expected.size() / vocab;
  Agreement a;
  for (size_t t = 0; t < tokens; ++t) {
    const float *p = &expected[t * vocab], *q = &actual[t * vocab];
    double p_sum = 0, q_sum = 0, p_max = *std::max_element(p, p + vocab), q_max = *std::max_element(q, q + vocab);
    for (size_t i = 0; i < vocab; ++i) p_sum += std::exp(p[i] - p_max), q_sum += std::exp(q[i] - q_max);
    for (size_t i = 0; i < vocab; ++i) {
      const double log_p = p[i] - p_max - std::log(p_sum), log_q = q[i] - q_max - std::log(q_sum);
      a.mean_kl += std::exp(log_p) * (log_p - log_q) / static_cast<double>(tokens);
    }
    a.top1 += (std::max_element(p, p + vocab) - p == std::max_element(q, q + vocab) - q) / static_cast<double>(tokens);
  }
  return a;
}

TEST_P(DemoModel, KlAndTop1AreWithinTheBounds) {
  const Path path = GetParam();
  const std::string name(kNumericsNames[static_cast<int>(path.numerics)]);
  const test::TensorFile golden(test::golden("demo/golden.safetensors"));
  const Json bounds = parse_json(read_text_file(test::golden("demo/golden.json")).value()).value()["bounds"][name];
  const auto engine = test::open_engine({.folder = test::demo_model(), .numerics = path.numerics, .isa = path.isa});
  const Agreement a = compare(golden.floats("logits_" + name), test::run_logits(*engine, golden.ids("ids"), 512).logits,
                              static_cast<size_t>(engine->geometry().vocab_size));
  EXPECT_LE(a.mean_kl, bounds["mean_kl"].get<double>());
  EXPECT_GE(a.top1, bounds["top1_agreement"].get<double>());
}

// INT8 inputs of the routed experts, per 32 columns, against the exact path of the same numerics. docs/numerics.md has
// what was measured; the bound leaves a factor of two.
TEST_P(DemoModel, Int8ActivationsStayNearTheExactPath) {
  const Path path = GetParam();
  const std::vector<int32_t> ids = test::TensorFile(test::golden("demo/golden.safetensors")).ids("ids");
  test::ModelSetup setup{.folder = test::demo_model(), .numerics = path.numerics, .isa = path.isa};
  const auto exact = test::open_engine(setup);
  setup.int8 = true;
  const auto int8 = test::open_engine(setup);
  const Agreement a = compare(test::run_logits(*exact, ids, 512).logits, test::run_logits(*int8, ids, 512).logits,
                              static_cast<size_t>(exact->geometry().vocab_size));
  RecordProperty("mean_kl", std::to_string(a.mean_kl));
  EXPECT_GT(a.mean_kl, 0) << "the flag changed nothing";
  EXPECT_LE(a.mean_kl, kInt8Kl);
  EXPECT_GE(a.top1, 0.98);
}

/// Logits of three sequences that share every step, each with a chunk of its own.
std::vector<float> batched_logits(Engine& engine, const std::vector<int32_t>& ids) {
  std::vector<std::unique_ptr<SequenceKv>> sequences;
  std::vector<SequenceKv*> kv;
  for (int i = 0; i < 3; ++i) {
    sequences.push_back(engine.driver().new_sequence().value());
    kv.push_back(sequences.back().get());
  }
  std::vector<float> all;
  for (const int64_t round : {40, 1, 1, 20, 1}) {
    sched::Batch batch;
    for (int i = 0; i < 3; ++i) {
      const int64_t count = round == 1 ? 1 : round + 3 * i;
      for (int64_t j = 0; j < count; ++j) batch.logit_rows.push_back(static_cast<int32_t>(batch.size() + j));
      batch.add(i, kv[static_cast<size_t>(i)]->length(),
                &ids[static_cast<size_t>(7 * i + kv[static_cast<size_t>(i)]->length())], count);
    }
    TC_CHECK(engine.step().run({batch, kv}).ok());
    const auto logits = engine.step().logits();
    all.insert(all.end(), logits.data, logits.data + logits.size());
  }
  return all;
}

// Rows are on FP8's grid, so a cache that keeps them in FP8 changes no bit: prefill in chunks, decoding, batches, with
// fewer tokens than workers and with more.
TEST_P(DemoModel, Fp8RowsGiveTheBitsOfBf16Rows) {
  std::vector<int32_t> ids = test::TensorFile(test::golden("demo/golden.safetensors")).ids("ids");
  ids.resize(180);
  const int64_t decode_from = static_cast<int64_t>(ids.size()) - 6;
  std::vector<float> expected, batched;
  for (const KvDtype dtype : {KvDtype::bf16, KvDtype::fp8})
    for (const int threads : {2, 5}) {
      const auto engine = test::open_engine({.folder = test::demo_model(),
                                             .numerics = GetParam().numerics,
                                             .isa = GetParam().isa,
                                             .threads = threads,
                                             .sequences = 3,
                                             .topology = "node:1 core:5 pu:1",
                                             .kv_dtype = dtype});
      const std::vector<float> logits = test::run_logits(*engine, ids, 70, decode_from).logits;
      const std::vector<float> together = batched_logits(*engine, ids);
      if (expected.empty()) expected = logits, batched = together;
      EXPECT_EQ(logits, expected) << threads << " threads, FP8 " << (dtype == KvDtype::fp8);
      EXPECT_EQ(together, batched) << threads << " threads, FP8 " << (dtype == KvDtype::fp8);
    }
}

std::vector<Path> demo_paths() {
  std::vector<Path> list;
  for (const Isa isa : test::model_isas())
    for (const Numerics numerics : {Numerics::published, Numerics::bf16}) {
#ifdef TC_SANITIZED
      if (numerics == Numerics::bf16) continue;  // the same code with one rounding less, and minutes of it
#endif
      list.push_back({"demo", numerics, isa});
    }
  return list;
}

INSTANTIATE_TEST_SUITE_P(Paths, DemoModel, ::testing::ValuesIn(demo_paths()), path_name);

TEST(DemoFp32, LogitsMatch) {
  const test::TensorFile golden(test::golden("demo/golden.safetensors"));
  const auto engine = test::open_engine({.folder = test::demo_model(), .numerics = Numerics::fp32});
  const std::vector<float> expected = golden.floats("logits_fp32");
  EXPECT_LT(test::max_difference(test::run_logits(*engine, golden.ids("ids"), 512).logits, expected, expected.size()),
            kFp32Tolerance);
}

/// A token's logits are the same bits alone, in a batch of several sequences, and for any number of threads and nodes.
struct InvarianceCase {
  Numerics numerics;
  bool int8 = false;
};
class Invariance : public ::testing::TestWithParam<InvarianceCase> {};

TEST_P(Invariance, BatchThreadsAndNodesChangeNoBit) {
  const std::vector<int32_t> ids = test::TensorFile(test::golden("demo/golden.safetensors")).ids("ids");
  const auto alone = test::open_engine(
      {.folder = test::demo_model(), .numerics = GetParam().numerics, .threads = 1, .int8 = GetParam().int8});
  const int64_t vocab = alone->geometry().vocab_size;
  const std::vector<std::vector<int32_t>> prompts = {{ids.begin(), ids.begin() + 150},
                                                     {ids.begin() + 3, ids.begin() + 140},
                                                     {ids.begin() + 40, ids.begin() + 45},
                                                     {ids.begin() + 7, ids.begin() + 100}};
  std::vector<std::vector<float>> expected;
  for (const auto& prompt : prompts) expected.push_back(test::run_logits(*alone, prompt, 512).logits);

#ifdef TC_SANITIZED  // a minute each
  const std::vector<std::pair<int, std::string>> topologies = {{3, "node:2 core:2 pu:1"}};
#else
  const std::vector<std::pair<int, std::string>> topologies = {
      {2, ""}, {3, "node:2 core:2 pu:1"}, {4, "node:4 core:1 pu:1"}};
#endif
  for (const auto& [threads, topology] : topologies) {
    const auto engine = test::open_engine({.folder = test::demo_model(),
                                           .numerics = GetParam().numerics,
                                           .threads = threads,
                                           .sequences = 4,
                                           .topology = topology,
                                           .int8 = GetParam().int8});
    std::vector<std::unique_ptr<SequenceKv>> sequences;
    std::vector<SequenceKv*> kv;
    for (size_t i = 0; i < prompts.size(); ++i) {
      sequences.push_back(engine->driver().new_sequence().value());
      kv.push_back(sequences.back().get());
    }
    // Every step takes another number of tokens from each sequence that has some left.
    std::mt19937 random(static_cast<unsigned>(threads));
    bool more = true;
    while (more) {
      sched::Batch batch;
      std::vector<std::pair<size_t, int64_t>> rows;
      for (size_t i = 0; i < prompts.size(); ++i) {
        const int64_t pos = sequences[i]->length(), left = static_cast<int64_t>(prompts[i].size()) - pos;
        const int64_t count = std::min<int64_t>(left, static_cast<int64_t>(random() % 30));
        if (count == 0) continue;
        for (int64_t j = 0; j < count; ++j) {
          batch.logit_rows.push_back(static_cast<int32_t>(batch.size() + j));
          rows.emplace_back(i, pos + j);
        }
        batch.add(static_cast<int>(i), pos, prompts[i].data() + pos, count);
      }
      const Result<StepReport> status = batch.size() > 0 ? engine->step().run({batch, kv}) : StepReport();
      ASSERT_TRUE(status.ok());
      for (size_t row = 0; row < rows.size(); ++row) {
        const auto& [i, pos] = rows[row];
        const float* got = engine->step().logits().row(static_cast<int64_t>(row));
        ASSERT_EQ(std::memcmp(got, &expected[i][static_cast<size_t>(pos * vocab)], static_cast<size_t>(vocab) * 4), 0)
            << "sequence " << i << " position " << pos << ", " << threads << " threads";
      }
      more = false;
      for (size_t i = 0; i < prompts.size(); ++i)
        more |= sequences[i]->length() < static_cast<int64_t>(prompts[i].size());
    }
  }
}

// One token of each of 2 to 64 sequences in a step: the same bits as alone.
TEST_P(Invariance, DecodingInABatchChangesNoBit) {
#ifdef TC_SANITIZED
  constexpr int kMost = 9;
#else
  constexpr int kMost = 64;
#endif
  const std::vector<int32_t> ids = test::TensorFile(test::golden("demo/golden.safetensors")).ids("ids");
  const auto engine = test::open_engine({.folder = test::demo_model(),
                                         .numerics = GetParam().numerics,
                                         .sequences = kMost + 1,
                                         .topology = "node:2 core:1 pu:1",
                                         .int8 = GetParam().int8});
  const size_t vocab = static_cast<size_t>(engine->geometry().vocab_size);
  std::vector<std::unique_ptr<SequenceKv>> sequences;
  std::vector<SequenceKv*> kv;
  std::vector<std::vector<float>> expected;
  for (int i = 0; i < kMost; ++i) {  // sequence i: a prompt of its own, then one token decoded alone
    const std::vector<int32_t> prompt(ids.begin() + i, ids.begin() + i + 5 + i % 7);
    auto alone = engine->driver().new_sequence().value();
    ASSERT_TRUE(engine->driver().prefill(*alone, prompt).ok());
    ASSERT_TRUE(engine->driver().decode(*alone, ids[static_cast<size_t>(i + 20)]).ok());
    expected.emplace_back(engine->driver().logits().begin(), engine->driver().logits().end());
    sequences.push_back(engine->driver().new_sequence().value());
    ASSERT_TRUE(engine->driver().prefill(*sequences.back(), prompt).ok());
    kv.push_back(sequences.back().get());
  }
  int first = 0;
  for (const int size : {2, 3, 8, 17, 34}) {  // every sequence takes its step once, 64 in all
    const int count = std::min(size, kMost - first);
    if (count <= 0) break;
    sched::Batch batch;
    for (int i = 0; i < count; ++i) {
      batch.logit_rows.push_back(i);
      batch.add(first + i, kv[static_cast<size_t>(first + i)]->length(), &ids[static_cast<size_t>(first + i + 20)], 1);
    }
    ASSERT_TRUE(engine->step().run({batch, kv}).ok());
    for (int i = 0; i < count; ++i)
      ASSERT_EQ(std::memcmp(engine->step().logits().row(i), expected[static_cast<size_t>(first + i)].data(), vocab * 4),
                0)
          << "sequence " << first + i << " in a batch of " << count;
    first += count;
  }
}

std::vector<InvarianceCase> invariance_cases() {
  std::vector<InvarianceCase> list = {{Numerics::published}, {Numerics::published, true}};
#ifndef TC_SANITIZED  // the same code with fewer roundings, and minutes of it
  list.insert(list.end(), {{Numerics::bf16}, {Numerics::fp32}});
#endif
  return list;
}

INSTANTIATE_TEST_SUITE_P(Numerics, Invariance, ::testing::ValuesIn(invariance_cases()), [](const auto& test) {
  return std::string(kNumericsNames[static_cast<int>(test.param.numerics)]) + (test.param.int8 ? "_int8" : "");
});

// A decode step at long context has fewer heads than workers: rows are split over them in blocks, and index keys too.
// The same bits as one worker that does it all, and as rows kept in bf16. More FP8 rows than a slot of scratch holds.
TEST(LongContext, RowsSplitOverManyWorkersGiveTheSameBits) {
  std::vector<std::vector<float>> expected;
  for (const auto& [threads, topology, dtype] : std::vector<std::tuple<int, std::string, KvDtype>>{
           {1, "", KvDtype::fp8}, {5, "node:2 core:3 pu:1", KvDtype::fp8}, {5, "node:2 core:3 pu:1", KvDtype::bf16}}) {
    const auto engine = test::open_engine({.folder = test::golden("tiny-odd"),  // an HCA layer of ratio 16: 520 rows
                                           .threads = threads,
                                           .topology = topology,
                                           .context = 8400,
                                           .kv_dtype = dtype});
    auto sequence = synthetic_sequence(engine->driver().kv(), engine->geometry(), engine->pool(), 8320).value();
    for (size_t i = 0; i < 3; ++i) {
      ASSERT_TRUE(engine->driver().decode(*sequence, static_cast<int32_t>(41 + i)).ok());
      const std::vector<float> logits(engine->driver().logits().begin(), engine->driver().logits().end());
      if (threads == 1)
        expected.push_back(logits);
      else
        EXPECT_EQ(logits, expected[i]) << "token " << i;
    }
  }
}

// Three sequences of the same tokens, two that grew in turn and one alone, decode three more each; the logits.
std::vector<std::vector<float>> decode_three(const test::ModelSetup& setup, std::span<const int32_t> ids) {
  const auto engine = test::open_engine(setup);
  const auto length = static_cast<int64_t>(ids.size()) - 3;
  std::vector<std::unique_ptr<SequenceKv>> sequences;
  for (int i = 0; i < 3; ++i) sequences.push_back(engine->driver().new_sequence().value());
  const auto grow = [&](int i, int64_t count) {
    const auto more = ids.subspan(static_cast<size_t>(sequences[i]->length()), static_cast<size_t>(count));
    TC_CHECK(engine->driver().prefill(*sequences[i], more).ok());
  };
  for (int64_t pos = 0; pos < length; pos += kPageTokens)
    for (const int i : {0, 1}) grow(i, std::min(kPageTokens, length - pos));
  grow(2, length);
  std::vector<std::vector<float>> logits;
  for (const int32_t id : ids.last(3))
    for (auto& sequence : sequences) {
      TC_CHECK(engine->driver().decode(*sequence, id).ok());
      logits.emplace_back(engine->driver().logits().begin(), engine->driver().logits().end());
    }
  return logits;
}

// Index keys over several nodes: each team scans its own where pages lie evenly, all workers all of them where they do
// not, as those of two sequences that grew in turn. The same bits as one worker.
TEST(LongContext, KeysOverSeveralNodesGiveTheSameBits) {
#ifdef TC_SANITIZED  // minutes
  constexpr int64_t kPages = 2;
  const std::vector<Numerics> all_numerics = {Numerics::published};
  const std::vector<std::pair<int, std::string>> topologies = {{3, "node:2 core:2 pu:1"}};
#else
  constexpr int64_t kPages = 4;
  const std::vector<Numerics> all_numerics = {Numerics::published, Numerics::fp32};
  const std::vector<std::pair<int, std::string>> topologies = {{3, "node:2 core:2 pu:1"}, {4, "node:4 core:1 pu:1"}};
#endif
  std::vector<int32_t> all(kPages * kPageTokens + 100 + 3);
  std::mt19937 random(43);
  for (int32_t& id : all) id = static_cast<int32_t>(random() % 64);
  test::ModelSetup setup{.folder = test::golden("tiny-odd"), .sequences = 3, .context = 1200};
  for (const Numerics numerics : all_numerics) {
    const auto ids = std::span(all).first(numerics == Numerics::fp32 ? 403 : all.size());  // that is slow
    setup.numerics = numerics;
    setup.threads = 1;
    setup.topology = "";
    const std::vector<std::vector<float>> expected = decode_three(setup, ids);
    for (const auto& [threads, topology] : topologies) {
      setup.threads = threads;
      setup.topology = topology;
      const std::vector<std::vector<float>> logits = decode_three(setup, ids);
      for (size_t i = 0; i < 9; ++i)
        EXPECT_EQ(logits[i], expected[i]) << topology << ", sequence " << i % 3 << ", token " << i / 3;
    }
  }
}

// A simulated machine with several nodes: weights are sliced over one arena a node, bytes are counted by who read them
// and where they lie.
TEST(Numa, EveryWorkerReadsItsOwnNodesWeightsOnly) {
  for (const auto& [threads, topology, nodes] :
       {std::tuple(2, "node:2 core:2 pu:1", 2), std::tuple(4, "node:2 core:2 pu:1", 2),
        std::tuple(4, "node:4 core:1 pu:1", 4), std::tuple(3, "node:2 core:2 pu:1", 2),
        std::tuple(1, "node:4 core:1 pu:1", 1)}) {
    const auto engine = test::open_engine({.folder = test::demo_model(), .threads = threads, .topology = topology});
    const auto& weights = engine->weights();
    ASSERT_EQ(static_cast<int>(weights.arenas.size()), nodes);
    const auto in_arena = [&](const void* p, int node) {
      const NumaBuffer& arena = weights.arenas[static_cast<size_t>(node)];
      return p >= arena.data() && p < arena.data() + arena.size();
    };
    const auto expect_sliced = [&](const cpu::PackedMatrix& m) {
      for (int64_t g = 0; g < m.row_groups(); ++g) {
        ASSERT_TRUE(in_arena(m.row_group(g).tiles, m.node_of(g)));
        ASSERT_TRUE(in_arena(m.row_group(g).scales, m.node_of(g)));
      }
    };
    for (const auto& layer : weights.layers) {
      for (const cpu::PackedMatrix* m : {&layer.wq_a, &layer.wq_b, &layer.wkv, &layer.wo_a, &layer.wo_b, &layer.gate})
        expect_sliced(*m);
      for (const auto& e : layer.experts)
        for (const cpu::PackedMatrix* m : {&e.w1, &e.w3, &e.w2}) expect_sliced(*m);
      for (int node = 0; node < nodes; ++node) ASSERT_TRUE(in_arena(layer.hc_ffn.fn_on(node), node));
    }
    auto sequence = engine->driver().new_sequence().value();
    ASSERT_TRUE(engine->driver().prefill(*sequence, std::vector<int32_t>{0, 5, 9, 17}).ok());
    ASSERT_TRUE(engine->driver().decode(*sequence, 3).ok());
    const cpu::WeightTraffic& traffic = engine->step().traffic();
    std::vector<uint64_t> by_node(static_cast<size_t>(nodes));
    for (int worker = 0; worker < threads; ++worker)
      for (int node = 0; node < nodes; ++node) {
        if (node != engine->pool().team(worker).node) {
          EXPECT_EQ(traffic.bytes(worker, node), 0u) << "remote reads";
        }
        by_node[static_cast<size_t>(node)] += traffic.bytes(worker, node);
      }
    // Every weight of a token is read once. The indexer's two are not while every row is selected anyway.
    uint64_t unread = 0;
    for (const auto& layer : weights.layers)
      unread += static_cast<uint64_t>(layer.index_wq_b.bytes() + layer.index_weights_proj.bytes());
    EXPECT_EQ(traffic.total_bytes(), weights.bytes_per_token(engine->geometry()) - unread);
    for (const uint64_t bytes : by_node)  // 256 wide layers leave little to share out evenly
      EXPECT_GT(static_cast<double>(bytes), 0.6 * static_cast<double>(traffic.total_bytes()) / nodes)
          << nodes << " nodes";
  }
}

// Routers asked ahead say what hash layers will choose exactly, what others will choose better than counts could, and
// change nothing.
TEST(Step, RoutersCanBeAskedAhead) {
  class Watch : public StepExecutor::Recorder {
   public:
    explicit Watch(const ModelGeometry& g) : g_(g) {}
    void stepped(const StepInput&, const StepReport& report) override {
      const RoutedExperts& r = report.routed;
      ASSERT_EQ(r.guesses, g_.n_activated_experts + 2);
      for (int layer = 0; layer < g_.n_layers; ++layer)
        for (int distance = 1; distance <= 2; ++distance)
          for (int64_t token = 0; token < r.tokens; ++token) look(r, layer, distance, token);
    }
    int64_t known = 0, hashed = 0, right[3] = {}, asked[3] = {}, nobody = 0;

   private:
    void look(const RoutedExperts& r, int layer, int distance, int64_t token) {
      const auto l = static_cast<size_t>(layer);
      const std::span<const int32_t> chosen(r.ids[l] + token * r.top_k, static_cast<size_t>(r.top_k)),
          guesses(r.guess_ids[distance - 1][l] + token * r.guesses, static_cast<size_t>(r.guesses));
      if (layer < distance) {
        nobody += std::count(guesses.begin(), guesses.end(), -1) == r.guesses;
        return;
      }
      for (const int32_t e : chosen) {
        const bool guessed = std::find(guesses.begin(), guesses.end(), e) != guesses.end();
        (g_.is_hash_layer(layer) ? known : right[distance]) += guessed;
        ++(g_.is_hash_layer(layer) ? hashed : asked[distance]);
      }
    }
    const ModelGeometry& g_;
  };
  const test::TensorFile golden(test::golden("demo/golden.safetensors"));
  std::vector<int32_t> ids = golden.ids("ids");
  ids.resize(24);
  const auto open = [](const std::filesystem::path& trace) {
    EngineOptions options;
    options.model = test::demo_model();
    options.max_isa = test::kModelIsa;
    options.threads = 2;
    options.max_context = 256;
    options.max_chunk = options.max_logit_rows = 8;
    options.quiet = true;
    options.record_trace = trace;
    return Engine::open(options).value();
  };
  const std::vector<float> expected = test::run_logits(*open({}), ids, 8).logits;
  const test::TempDir folder;
  const std::unique_ptr<Engine> engine = open(folder.path() / "trace");
  Watch watch(engine->geometry());
  engine->step().set_recorders({&watch});
  EXPECT_EQ(test::run_logits(*engine, ids, 8).logits, expected);
  EXPECT_GT(watch.hashed, 0);
  EXPECT_EQ(watch.known, watch.hashed);
  EXPECT_EQ(watch.nobody, 24 * 3);
  const auto share = [&](int d) { return static_cast<double>(watch.right[d]) / static_cast<double>(watch.asked[d]); };
  EXPECT_GT(share(1), 0.6);
  EXPECT_GT(share(1), share(2));
}

// What a step reports of its own time and of its experts.
TEST(Step, SaysWhatItWasAt) {
  const std::unique_ptr<Engine> engine = test::open_engine({.context = 256});
  const std::unique_ptr<SequenceKv> sequence = engine->driver().new_sequence().value();
  SequenceKv* const kv = sequence.get();
  const std::vector<int32_t> ids(20, 7);
  sched::Batch batch;
  batch.add(0, 0, ids.data(), 20);
  batch.logit_rows.push_back(19);
  const StepReport report = engine->step().run({batch, std::span(&kv, 1)}).value();
  const ModelGeometry& g = engine->geometry();
  EXPECT_EQ(report.experts.layers, g.n_layers);
  EXPECT_EQ(report.experts.pairs, int64_t{20} * g.n_activated_experts * g.n_layers);
  EXPECT_EQ(report.experts.cpu_pairs, report.experts.pairs);
  EXPECT_GE(report.experts.experts, int64_t{g.n_activated_experts} * g.n_layers);
  EXPECT_LE(report.experts.experts, int64_t{g.n_routed_experts} * g.n_layers);
  double sum = 0;
  using sched::Phase;
  for (const Phase phase : {Phase::dense, Phase::attention, Phase::index, Phase::experts_cpu, Phase::head}) {
    EXPECT_GT(report.time[phase], 0) << static_cast<int>(phase);
    sum += report.time[phase];
  }
  EXPECT_LE(sum, report.time.total);
  EXPECT_EQ(report.time[Phase::experts_gpu], 0);
}

TEST(Step, ErrorsLeaveTheSequenceAsItWas) {
  const auto engine = test::open_engine({.folder = test::demo_model()});
  auto sequence = engine->driver().new_sequence().value();
  const std::vector<int32_t> good = {0, 5, 9};
  ASSERT_TRUE(engine->driver().prefill(*sequence, good).ok());
  const std::vector<int32_t> bad = {5, 4096};
  const Status status = engine->driver().prefill(*sequence, bad);
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().code, ErrorCode::invalid_argument);
  EXPECT_NE(status.error().message.find("4096"), std::string::npos);
  EXPECT_EQ(sequence->length(), 3);
  const std::vector<int32_t> many(1022, 7);
  EXPECT_FALSE(engine->driver().prefill(*sequence, many).ok()) << "past the context";
  std::atomic<bool> cancel{true};
  const Status cancelled = engine->driver().prefill(*sequence, good, &cancel);
  ASSERT_FALSE(cancelled.ok());
  EXPECT_EQ(cancelled.error().code, ErrorCode::cancelled);
}

}  // namespace
}  // namespace thermocline
