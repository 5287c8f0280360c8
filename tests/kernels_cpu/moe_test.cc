#include "kernels_cpu/moe.h"

#include <atomic>

#include "kernels_cpu/ref/ops.h"
#include "tests/support/models.h"
#include "tests/support/packed.h"

namespace thermocline::cpu {
namespace {

struct Layer {
  static constexpr int kExperts = 5;
  static constexpr int64_t kDim = 96, kInter = 64;
  std::vector<test::RandomMatrix> storage;
  std::vector<ExpertWeights> experts;
  ExpertWeights shared;

  explicit Layer(std::mt19937& random) {
    storage.reserve(3 * (kExperts + 1));
    const auto add = [&](GemmKind kind, int64_t n, int64_t k) {
      storage.push_back(test::random_matrix(random, kind, n, k));
      return storage.back().matrix;
    };
    for (int e = 0; e <= kExperts; ++e) {
      const GemmKind kind = e < kExperts ? GemmKind::mxfp4_e8m0 : GemmKind::fp8_f32;
      ExpertWeights w;
      w.w1 = add(kind, kInter, kDim);
      w.w3 = add(kind, kInter, kDim);
      w.w2 = add(kind, kDim, kInter);
      if (e < kExperts)
        experts.push_back(w);
      else
        shared = w;
    }
  }
};

std::vector<float> run(const KernelTable& table, int threads, const Layer& layer, const std::vector<float>& x,
                       const std::vector<int32_t>& ids, const std::vector<float>& weights, int64_t tokens,
                       WeightTraffic* traffic = nullptr) {
  WorkerPool pool(read_topology("node:2 core:2 pu:1").value(), threads);
  const CpuContext cpu{pool, table, traffic};
  GemmInput input = GemmInput::allocate(tokens, Layer::kDim).value();
  MoeWorkspace workspace =
      MoeWorkspace::allocate(threads, tokens, 2, Layer::kExperts, Layer::kDim, Layer::kInter).value();
  const InputFormat format{table.activation};
  prepare(cpu, TensorView<const float, 2>(x.data(), {tokens, Layer::kDim}), format, input);
  std::vector<float> out(static_cast<size_t>(tokens * Layer::kDim));
  moe(cpu, layer.experts, &layer.shared, input, input, {ids.data(), {tokens, 2}}, {weights.data(), {tokens, 2}},
      {10, true, format, format}, workspace, out.data());
  return out;
}

void add_expert(const ExpertWeights& w, const float* x, float weight, std::vector<float>& sum) {
  std::vector<float> g(Layer::kInter), u(Layer::kInter), y(Layer::kDim);
  ref::linear(w.w1, x, g.data());
  ref::linear(w.w3, x, u.data());
  ref::round_to_bf16(g.data(), Layer::kInter);
  ref::round_to_bf16(u.data(), Layer::kInter);
  for (size_t i = 0; i < g.size(); ++i) g[i] = round_bf16(weight * ref::swiglu(g[i], u[i], 10));
  ref::linear(w.w2, g.data(), y.data());
  ref::round_to_bf16(y.data(), Layer::kDim);
  for (size_t d = 0; d < y.size(); ++d) sum[d] += y[d];
}

class MoeTest : public ::testing::TestWithParam<Isa> {
 protected:
  const KernelTable table_ = make_kernel_table(detect_cpu_features(), GetParam());
};

TEST_P(MoeTest, MatchesTheReferenceAndIsBatchInvariant) {
  std::mt19937 random(11);
  const Layer layer(random);
  const int64_t tokens = 23;
  std::vector<float> x = test::random_floats(random, tokens * Layer::kDim, 0.1f), weights;
  ref::round_to_bf16(x.data(), tokens * Layer::kDim);
  std::vector<int32_t> ids;
  for (int64_t token = 0; token < tokens; ++token) {
    const int32_t first = static_cast<int32_t>(random() % Layer::kExperts);
    ids.push_back(first);
    ids.push_back(token == 4 ? first
                             : (first + 1 + static_cast<int32_t>(random() % (Layer::kExperts - 1))) %
                                   Layer::kExperts);  // one token names an expert twice
    weights.push_back(0.25f + 0.01f * static_cast<float>(token));
    weights.push_back(0.75f);
  }
  const std::vector<float> together = run(table_, 2, layer, x, ids, weights, tokens);
  EXPECT_EQ(run(table_, 1, layer, x, ids, weights, tokens), together) << "depends on the threads";
  EXPECT_EQ(run(table_, 4, layer, x, ids, weights, tokens), together) << "depends on the threads";
  for (int64_t token = 0; token < tokens; ++token) {
    const std::vector<float> one(x.begin() + token * Layer::kDim, x.begin() + (token + 1) * Layer::kDim);
    const std::vector<float> got(together.begin() + token * Layer::kDim, together.begin() + (token + 1) * Layer::kDim);
    EXPECT_EQ(run(table_, 2, layer, one, {ids[2 * token], ids[2 * token + 1]},
                  {weights[2 * token], weights[2 * token + 1]}, 1),
              got)
        << "token " << token;
    std::vector<float> expected(Layer::kDim);
    for (int j = 0; j < 2; ++j)
      add_expert(layer.experts[static_cast<size_t>(ids[2 * token + j])], one.data(), weights[2 * token + j], expected);
    add_expert(layer.shared, one.data(), 1, expected);
    double norm = 0, error = 0;
    for (size_t d = 0; d < expected.size(); ++d)
      norm += expected[d] * expected[d], error += (expected[d] - got[d]) * (expected[d] - got[d]);
    EXPECT_LT(std::sqrt(error / norm), 0.01) << "token " << token;  // bf16 results: one in 256 each
  }
}

TEST(MoeTraffic, CountsEachExpertThatIsAskedForAndTheSharedOne) {
  std::mt19937 random(12);
  const Layer layer(random);
  const std::vector<float> x = test::random_floats(random, 3 * Layer::kDim, 0.1f);
  const KernelTable table = make_kernel_table(detect_cpu_features(), Isa::amx);
  for (const int threads : {1, 3}) {
    WeightTraffic traffic(threads, 2);
    run(table, threads, layer, x, {4, 1, 1, 2, 4, 2}, std::vector<float>(6, 0.5f), 3, &traffic);
    const auto bytes = [&](WeightKind kind) { return traffic.kinds()[static_cast<size_t>(kind)].bytes; };
    EXPECT_EQ(bytes(WeightKind::fp4), 3 * layer.experts[0].bytes());
    EXPECT_EQ(bytes(WeightKind::fp8), layer.shared.bytes());
    EXPECT_EQ(traffic.total_bytes(), bytes(WeightKind::fp4) + bytes(WeightKind::fp8));
  }
}

// More rows of an expert, and of the shared one, than a worker takes at once.
TEST_P(MoeTest, MoreRowsThanAWorkerGathersAtOnceChangeNoBit) {
  std::mt19937 random(12);
  const Layer layer(random);
  const int64_t tokens = 2 * kMoeRows + 9;
  std::vector<float> x = test::random_floats(random, tokens * Layer::kDim, 0.1f), weights;
  std::vector<int32_t> ids;
  for (int64_t token = 0; token < tokens; ++token) {
    ids.insert(ids.end(), {0, token % 5 == 0 ? 1 : 2});  // the first has every token, the others some
    weights.insert(weights.end(), {0.5f, 0.01f * static_cast<float>(token % 50)});
  }
  const std::vector<float> together = run(table_, 2, layer, x, ids, weights, tokens);
  for (int64_t first = 0; first < tokens; first += 100) {
    const int64_t count = std::min<int64_t>(100, tokens - first);
    const auto part = [&](const auto& all, int64_t width) {
      return std::remove_cvref_t<decltype(all)>(all.begin() + first * width, all.begin() + (first + count) * width);
    };
    EXPECT_EQ(run(table_, 2, layer, part(x, Layer::kDim), part(ids, 2), part(weights, 2), count),
              part(together, Layer::kDim))
        << "tokens from " << first;
  }
}

// Nothing but caches changes, so what can be told is what was read whole: all of it, what fits, what time was left for.
TEST(StageExperts, ReadsInTurnUntilTheCacheIsFullOrTheTimeIsOver) {
  std::mt19937 random(5);
  const Layer layer(random);
  std::vector<const ExpertWeights*> experts;
  for (const ExpertWeights& e : layer.experts) experts.push_back(&e);
  const KernelTable table = make_kernel_table(detect_cpu_features(), Isa::amx);
  for (const int threads : {1, 3, 4}) {
    WorkerPool pool(read_topology("node:2 core:2 pu:1").value(), threads);
    const CpuContext cpu{pool, table};
    const auto never = [] { return false; };
    EXPECT_EQ(stage_experts(cpu, experts, 1 << 30, never), Layer::kExperts);
    EXPECT_EQ(stage_experts(cpu, {}, 1 << 30, never), 0);
    EXPECT_EQ(stage_experts(cpu, experts, 1 << 30, [] { return true; }), 0);
    EXPECT_EQ(stage_experts(cpu, experts, 1, never), 0);
    // Half of the bytes: gates and ups are read, downs are not.
    const auto all = static_cast<int64_t>(layer.experts[0].bytes()) * Layer::kExperts;
    EXPECT_EQ(stage_experts(cpu, experts, all / 2 / threads, never), 0);
    std::atomic<int> looks = 0;
    const int some = stage_experts(cpu, experts, 1 << 30, [&] { return ++looks > 12; });
    EXPECT_LT(some, Layer::kExperts);
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, MoeTest, ::testing::ValuesIn(test::isas()),
                         [](const auto& test) { return test::isa_test_name(test.param); });

}  // namespace
}  // namespace thermocline::cpu
