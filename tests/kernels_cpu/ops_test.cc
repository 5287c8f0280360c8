// The scalar reference of every kernel family, held to vectors of the published code and of the specification.
#include "kernels_cpu/ref/ops.h"

#include "kernels_cpu/attention.h"
#include "kernels_cpu/indexer.h"
#include "tests/support/models.h"

namespace thermocline::cpu {
namespace {

using test::TensorFile;

const TensorFile& ops() {
  static const TensorFile file(test::golden("ops/ops.safetensors"));
  return file;
}

void expect_close(const std::vector<float>& actual, const std::vector<float>& expected, double relative) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i)
    ASSERT_NEAR(actual[i], expected[i], relative * std::max(1.0, std::fabs(static_cast<double>(expected[i])))) << i;
}

TEST(Rounding, FakeFp8IsThePublishedOneBitForBit) {
  for (const int64_t block : {64, 128}) {
    const std::string name = "fake_fp8_" + std::to_string(block);
    std::vector<float> x = ops().floats(name + ".x");
    const std::vector<float> y = ops().floats(name + ".y");
    const int64_t width = ops().info(name + ".x").shape[1];
    for (size_t row = 0; row < x.size() / static_cast<size_t>(width); ++row)
      ref::fake_fp8(&x[row * static_cast<size_t>(width)], width, block);
    EXPECT_EQ(x, y);
    std::vector<float> again = x;
    ref::fake_fp8(again.data(), static_cast<int64_t>(again.size()), block);
    EXPECT_EQ(again, x) << "not idempotent";
  }
}

TEST(Rounding, E4m3CodesAreThePublishedOnes) {
  for (const int64_t block : {64, 128}) {
    const std::string name = "fake_fp8_" + std::to_string(block);
    const std::vector<float> x = ops().floats(name + ".x"), scale = ops().floats(name + ".scale");
    const std::vector<std::byte> codes = ops().bytes(name + ".code_u8");
    for (size_t i = 0; i < x.size(); ++i) {
      const float scaled = x[i] / scale[i / static_cast<size_t>(block)];
      EXPECT_EQ(float_to_e4m3(scaled), static_cast<uint8_t>(codes[i])) << i;
    }
  }
}

TEST(Rounding, FakeFp4IsThePublishedOneBitForBit) {
  std::vector<float> x = ops().floats("fake_fp4_32.x");
  ref::fake_fp4(x.data(), static_cast<int64_t>(x.size()));
  EXPECT_EQ(x, ops().floats("fake_fp4_32.y"));
  std::vector<float> again = x;
  ref::fake_fp4(again.data(), static_cast<int64_t>(again.size()));
  EXPECT_EQ(again, x) << "not idempotent";
}

TEST(Rounding, ExamplesOfTheSpecification) {
  std::vector<float> x(64), y(32);
  for (int i = 0; i < 64; ++i) x[i] = 0.37f * static_cast<float>(i - 32);
  ref::fake_fp8(x.data(), 64, 64);
  EXPECT_EQ(x[0], -12);
  EXPECT_EQ(x[1], -11);
  EXPECT_EQ(x[7], -9);
  EXPECT_EQ(x[31], -0.375f);
  EXPECT_EQ(x[63], 11);
  for (int i = 0; i < 32; ++i) y[i] = 0.1f * static_cast<float>(i) - 1.3f;
  ref::fake_fp4(y.data(), 32);
  EXPECT_EQ(y[0], -1.5f);
  EXPECT_EQ(y[5], -0.75f);
  EXPECT_EQ(y[14], 0);
  EXPECT_EQ(y[20], 0.75f);
  EXPECT_EQ(y[31], 2);
}

TEST(Hadamard, MatchesAndIsItsOwnInverse) {
  for (const int64_t n : {64, 128}) {
    const std::string name = "hadamard_" + std::to_string(n);
    std::vector<float> x = ops().floats(name + ".x");
    const std::vector<float> original = x;
    for (size_t row = 0; row < x.size(); row += static_cast<size_t>(n)) ref::hadamard(&x[row], n);
    expect_close(x, ops().floats(name + ".y"), 1e-5);
    for (size_t row = 0; row < x.size(); row += static_cast<size_t>(n)) ref::hadamard(&x[row], n);
    expect_close(x, original, 1e-5);
  }
}

TEST(Rope, TablesAndRotationsMatch) {
  for (const auto& [name, frequencies] :
       {std::pair(std::string("rope_10000"), ref::rope_frequencies(64, 10000)),
        std::pair(std::string("rope_yarn_160000_16_65536"), ref::rope_frequencies(64, 160000, 16, 65536, 32, 1))}) {
    expect_close(frequencies, ops().floats(name + ".freq"), 1e-6);
    const std::vector<float> freq = ops().floats(name + ".freq"), x = ops().floats(name + ".x"),
                             y = ops().floats(name + ".y"), inverse = ops().floats(name + ".y_inverse");
    const std::vector<std::byte> raw = ops().bytes(name + ".pos");
    for (size_t row = 0; row < 10; ++row) {
      int64_t pos;
      std::memcpy(&pos, raw.data() + row * 8, 8);
      std::vector<float> cos(32), sin(32),
          forward(x.begin() + static_cast<long>(row) * 128, x.begin() + static_cast<long>(row + 1) * 128),
          back = forward;
      ref::rope_angles(freq, pos, cos.data(), sin.data());
      ref::rope(&forward[64], cos.data(), sin.data(), 32, false, false);
      ref::rope(&back[64], cos.data(), sin.data(), 32, true, false);
      for (size_t d = 0; d < 128; ++d) {
        EXPECT_NEAR(forward[d], y[row * 128 + d], 1e-5) << name << " " << pos;
        EXPECT_NEAR(back[d], inverse[row * 128 + d], 1e-5) << name << " " << pos;
      }
    }
  }
}

TEST(Rope, YarnTableOfTheSpecification) {
  const std::vector<float> w = ref::rope_frequencies(64, 160000, 16, 65536, 32, 1);
  const std::pair<int, double> expected[] = {
      {0, 1}, {1, 0.687656022}, {15, 0.00363553858}, {16, 0.002265625}, {24, 1.953125e-05}, {31, 5.68052904e-07}};
  for (const auto& [i, value] : expected) EXPECT_NEAR(w[static_cast<size_t>(i)] / value, 1, 1e-6) << i;
}

TEST(HyperConnection, SplitMatches) {
  for (const auto& [hc, iterations] : {std::pair(2, 5), std::pair(4, 20)}) {
    const std::string name = "hc_split_" + std::to_string(hc) + "_" + std::to_string(iterations);
    const std::vector<float> mixes = ops().floats(name + ".mixes"), scale = ops().floats(name + ".scale"),
                             base = ops().floats(name + ".base");
    const size_t outputs = base.size(), rows = mixes.size() / outputs, s = static_cast<size_t>(hc);
    std::vector<float> pre(rows * s), post(rows * s), comb(rows * s * s);
    for (size_t row = 0; row < rows; ++row)
      ref::hc_split(&mixes[row * outputs], scale.data(), base.data(), hc, iterations, 1e-6f, &pre[row * s],
                    &post[row * s], &comb[row * s * s]);
    expect_close(pre, ops().floats(name + ".pre"), 1e-5);
    expect_close(post, ops().floats(name + ".post"), 1e-5);
    expect_close(comb, ops().floats(name + ".comb"), 1e-5);
  }
}

TEST(HyperConnection, ExampleOfTheSpecification) {
  std::vector<float> m(24), base(24), pre(4), post(4), comb(16);
  for (int i = 0; i < 24; ++i) {
    m[i] = static_cast<float>((i - 11.5) / 8);
    base[i] = 0.1f * static_cast<float>(i % 5 - 2);
  }
  const float scale[] = {0.5f, 0.25f, 2.0f};
  ref::hc_split(m.data(), scale, base.data(), 4, 20, 1e-6f, pre.data(), post.data(), comb.data());
  expect_close(pre, {0.2852137f, 0.3194620f, 0.3557759f, 0.3938289f}, 1e-6);
  expect_close(post, {0.9828142f, 0.8011235f, 0.8648937f, 0.9298031f}, 1e-6);
  expect_close(comb,
               {0.2892855f, 0.2892856f, 0.1979980f, 0.2234299f, 0.2563577f, 0.2563577f, 0.2892856f, 0.1979980f,
                0.2271779f, 0.2271778f, 0.2563577f, 0.2892856f, 0.2271779f, 0.2271778f, 0.2563577f, 0.2892856f},
               1e-6);
}

TEST(HyperConnection, WriteReadsEveryStreamBeforeWritingAny) {
  std::mt19937 random(3);
  const int hc = 3;
  const int64_t dim = 77;
  const std::vector<float> streams = test::random_floats(random, hc * dim), y = test::random_floats(random, dim),
                           post = test::random_floats(random, hc), comb = test::random_floats(random, hc * hc);
  std::vector<float> out = streams, expected(streams.size());
  ref::hc_write(out.data(), y.data(), post.data(), comb.data(), hc, dim, false);
  for (int k = 0; k < hc; ++k)
    for (int64_t d = 0; d < dim; ++d) {
      double sum = post[static_cast<size_t>(k)] * y[static_cast<size_t>(d)];
      for (int j = 0; j < hc; ++j)
        sum += static_cast<double>(comb[static_cast<size_t>(j * hc + k)]) * streams[static_cast<size_t>(j * dim + d)];
      expected[static_cast<size_t>(k * dim + d)] = static_cast<float>(sum);
    }
  expect_close(out, expected, 1e-5);
}

TEST(Router, TiesGoToTheLowerIdAndBiasMovesChoiceNotWeight) {
  const std::vector<float> logits = ops().floats("route.logits"), bias = ops().floats("route.bias"),
                           expected = ops().floats("route.weights_scale_1.5");
  const std::vector<int32_t> ids = ops().ids("route.ids");
  for (size_t row = 0; row < 40; ++row) {
    std::vector<float> scores(24), weights(6);
    std::vector<int32_t> chosen(6);
    for (size_t e = 0; e < 24; ++e) scores[e] = ref::sqrt_softplus(logits[row * 24 + e]);
    ref::route(scores.data(), bias.data(), 24, 6, 1.5f, chosen.data(), weights.data());
    std::map<int32_t, float> actual, wanted;
    for (size_t j = 0; j < 6; ++j) {
      actual[chosen[j]] = weights[j];
      wanted[ids[row * 6 + j]] = expected[row * 6 + j];
    }
    ASSERT_EQ(actual.size(), 6u);
    for (const auto& [id, weight] : wanted) {
      ASSERT_TRUE(actual.contains(id)) << "row " << row << " expert " << id;
      EXPECT_NEAR(actual[id], weight, 1e-5);
    }
  }
}

TEST(Router, SqrtSoftplusOfTheSpecification) {
  const std::pair<float, float> cases[] = {{-20, 4.53999e-5f}, {-5, 0.0819472f}, {-1, 0.5596979f}, {0, 0.8325546f},
                                           {1, 1.1459763f},    {5, 2.2375691f},  {20, 4.4721360f}};
  for (const auto& [x, y] : cases) EXPECT_NEAR(ref::sqrt_softplus(x), y, 1e-6) << x;
}

TEST(Swiglu, MatchesAndClamps) {
  const std::vector<float> gate = ops().floats("swiglu_10.gate"), up = ops().floats("swiglu_10.up");
  std::vector<float> y;
  for (size_t i = 0; i < gate.size(); ++i) y.push_back(ref::swiglu(gate[i], up[i], 10));
  expect_close(y, ops().floats("swiglu_10.y"), 1e-5);
  EXPECT_NEAR(ref::swiglu(12, 3, 10), 29.9986381, 1e-5);
  EXPECT_NEAR(ref::swiglu(-12, -11, 10), 7.373010e-4, 1e-8);
}

TEST(Compressor, PooledRowsMatch) {
  for (const auto& [ratio, overlap] : {std::pair<int64_t, bool>(4, true), std::pair<int64_t, bool>(128, false)}) {
    const std::string name = "compress_" + std::to_string(ratio);
    const std::vector<float> a = ops().floats(name + ".kv"), gate = ops().floats(name + ".gate"),
                             ape = ops().floats(name + ".ape"), pooled = ops().floats(name + ".pooled");
    const int64_t width = ops().info(name + ".kv").shape[1], row_width = overlap ? width / 2 : width;
    std::vector<float> z = gate;
    for (size_t i = 0; i < z.size(); ++i) z[i] += ape[i % ape.size()];
    std::vector<float> rows;
    for (int64_t r = 0; r < static_cast<int64_t>(pooled.size()) / row_width; ++r) {
      std::vector<const float*> as, zs;
      for (int64_t pos = std::max<int64_t>(0, overlap ? (r - 1) * ratio : r * ratio); pos < (r + 1) * ratio; ++pos) {
        const int64_t at = pos * width + (overlap && pos >= r * ratio ? row_width : 0);
        as.push_back(&a[static_cast<size_t>(at)]);
        zs.push_back(&z[static_cast<size_t>(at)]);
      }
      std::vector<float> row(static_cast<size_t>(row_width));
      ref::compress_window(as.data(), zs.data(), static_cast<int64_t>(as.size()), row_width, row.data());
      rows.insert(rows.end(), row.begin(), row.end());
    }
    expect_close(rows, pooled, 1e-5);
  }
}

TEST(Indexer, TopkTakesTheLowerIndexAmongEqualsInRisingOrder) {
  const std::vector<float> scores = {1, 5, 3, 5, 3, 3, -1};
  std::vector<int32_t> order(7), out(4);
  ref::select_topk(scores.data(), 7, 4, order.data(), out.data());
  EXPECT_EQ(out, (std::vector<int32_t>{1, 2, 3, 4}));
}

/// The families with a version per instruction set.
class EveryIsa : public ::testing::TestWithParam<Isa> {
 protected:
  const KernelTable table_ = make_kernel_table(detect_cpu_features(), GetParam());
};

TEST_P(EveryIsa, IndexScoresOfF32KeysMatch) {
  const std::vector<float> q = ops().floats("index.q"), keys = ops().floats("index.keys"),
                           expected = ops().floats("index.score");
  std::vector<float> gate = ops().floats("index.gate");
  for (float& g : gate) g /= std::sqrt(64.0f * 8.0f);  // index_head_dim^-0.5 index_n_heads^-0.5
  std::vector<const void*> rows;
  for (size_t r = 0; r < 50; ++r) rows.push_back(&keys[r * 64]);
  for (size_t token = 0; token < 6; ++token) {
    std::vector<float> dots(8 * 50), scores(50);
    index_scores_f32(table_, &q[token * 512], 8, rows.data(), 50, 64, &gate[token * 8], dots.data(), scores.data());
    for (size_t r = 0; r < 50; ++r)
      EXPECT_NEAR(scores[r], expected[token * 50 + r], 1e-4 * std::max(1.0f, std::fabs(expected[token * 50 + r])));
    for (size_t r = 21; r < 30; ++r) EXPECT_EQ(scores[r], scores[20]);
  }
}

// FP4 keys and queries are exact integers times powers of two: every instruction set gives the reference's bits, also
// where the scales of one vector lie too far apart for the fast path, and whatever else is in a group.
TEST_P(EveryIsa, IndexScoresOfFp4KeysAreExact) {
  std::mt19937 random(21);
  for (const int64_t c : {20, 64, 128})
    for (const int heads : {1, 3, 8, 19})
      for (const bool spread : {false, true}) {
        const int64_t n = 77, k_tiles = (c + 31) / 32, groups = (n + 15) / 16;
        const auto fp4 = [&](int64_t count) {
          std::vector<float> x = test::random_floats(random, count);
          for (int64_t i = 0; spread && i < count; ++i)
            if (random() % 64 == 0) x[static_cast<size_t>(i)] *= 100;  // another scale for its block
          for (int64_t i = 0; i < count; i += c) {
            if (random() % 9 == 0) std::fill_n(x.begin() + i, std::min<int64_t>(32, c), 0.0f);
            ref::fake_fp4(&x[static_cast<size_t>(i)], c);
          }
          return x;
        };
        const std::vector<float> keys = fp4(n * c), q = fp4(heads * c);
        std::vector<float> gates = test::random_floats(random, heads), dots(static_cast<size_t>(heads * n)),
                           expected(static_cast<size_t>(n)), scores(static_cast<size_t>(groups * 16));
        ref::round_to_bf16(gates.data(), heads);
        std::vector<uint8_t> packed(static_cast<size_t>(groups * key_group_bytes(k_tiles)));
        std::vector<const uint8_t*> pointers;
        for (int64_t r = 0; r < n; ++r)
          store_index_key(&keys[static_cast<size_t>(r * c)], c, r % 16,
                          &packed[static_cast<size_t>(r / 16 * key_group_bytes(k_tiles))]);
        for (int64_t g = 0; g < groups; ++g)
          pointers.push_back(&packed[static_cast<size_t>(g * key_group_bytes(k_tiles))]);
        std::vector<Int8Chunk> query(static_cast<size_t>(heads * k_tiles));
        for (int h = 0; h < heads; ++h)
          pack_index_query(&q[static_cast<size_t>(h * c)], c, &query[static_cast<size_t>(h * k_tiles)]);
        for (int h = 0; h < heads; ++h)
          for (int64_t r = 0; r < n; ++r) {
            double sum = 0;
            for (int64_t d = 0; d < c; ++d)
              sum += static_cast<double>(q[static_cast<size_t>(h * c + d)]) * keys[static_cast<size_t>(r * c + d)];
            dots[static_cast<size_t>(h * n + r)] = static_cast<float>(sum);
          }
        ref::index_scores(dots.data(), n, gates.data(), heads, n, true, expected.data());
        table_.index_scores_fp4(query.data(), gates.data(), heads, pointers.data(), groups, k_tiles, scores.data());
        for (int64_t r = 0; r < n; ++r)
          ASSERT_EQ(scores[static_cast<size_t>(r)], expected[static_cast<size_t>(r)])
              << "c " << c << " heads " << heads << " row " << r;
        std::vector<float> alone(16);
        table_.index_scores_fp4(query.data(), gates.data(), heads, &pointers[2], 1, k_tiles, alone.data());
        for (size_t r = 0; r < 16; ++r) ASSERT_EQ(alone[r], scores[32 + r]);
      }
}

TEST(Indexer, TopkIsTheReferences) {
  std::mt19937 random(22);
  for (const int64_t n : {1, 2, 50, 1000, 4097})
    for (const int64_t k : {1, 7, 512, 5000})
      for (const int kind : {0, 1, 2, 3}) {  // distinct, many ties, all equal, NaNs of both signs
        std::vector<float> scores = test::random_floats(random, n);
        for (float& s : scores) {
          if (kind == 1) s = std::floor(s * 2);
          if (kind == 2) s = -0.0f;
          if (kind == 3 && random() % 2) s = random() % 2 ? NAN : random() % 2 ? -NAN : INFINITY;
        }
        const int64_t count = std::min(n, k);
        std::vector<int32_t> order(static_cast<size_t>(n)), got(static_cast<size_t>(count)), expected = got;
        select_topk(scores.data(), n, count, order.data(), got.data());
        ref::select_topk(scores.data(), n, count, order.data(), expected.data());
        ASSERT_EQ(got, expected) << "n " << n << " k " << k << " kind " << kind;
        for (int64_t i = 0; i < count; ++i) {
          ASSERT_LT(got[static_cast<size_t>(i)], n);
          ASSERT_GT(got[static_cast<size_t>(i)], i == 0 ? -1 : got[static_cast<size_t>(i) - 1]);
        }
        for (const int parts : {1, 2, 3, 7, 300}) {
          if (count == n) break;
          std::vector<int32_t> scratch(static_cast<size_t>(parts * SplitTopK::kPartScratch)), split(got.size(), -1);
          SplitTopK top(scores.data(), n, count, parts, scratch.data(), order.data(), split.data());
          const auto each = [&](void (SplitTopK::*phase)(int)) {
            for (int part = parts; part-- > 0;) (top.*phase)(part);
          };
          each(&SplitTopK::count);
          top.find();
          each(&SplitTopK::gather);
          top.choose();
          each(&SplitTopK::write);
          ASSERT_EQ(split, expected) << "n " << n << " k " << k << " kind " << kind << " in " << parts << " parts";
        }
      }
}

// `a > b, else the lower row` is no order once a score is NaN: it is neither above, below nor equal to another.
TEST(Indexer, TopkOrdersNanBeyondInfinity) {
  const std::vector<float> scores = {1, NAN, INFINITY, -NAN, 3, -INFINITY, NAN, 2};
  std::vector<int32_t> order(8);
  for (const auto& [k, expected] : std::vector<std::pair<int64_t, std::vector<int32_t>>>{
           {1, {1}}, {2, {1, 6}}, {3, {1, 2, 6}}, {4, {1, 2, 4, 6}}, {7, {0, 1, 2, 4, 5, 6, 7}}}) {
    std::vector<int32_t> out(static_cast<size_t>(k));
    ref::select_topk(scores.data(), 8, k, order.data(), out.data());
    EXPECT_EQ(out, expected);
    select_topk(scores.data(), 8, k, order.data(), out.data());
    EXPECT_EQ(out, expected);
  }
}

TEST_P(EveryIsa, SparseAttentionMatches) {
  const std::vector<float> q = ops().floats("sparse_attn.q"), rows = ops().floats("sparse_attn.rows"),
                           sink = ops().floats("sparse_attn.sink"), expected = ops().floats("sparse_attn.y");
  const std::vector<int32_t> index = ops().ids("sparse_attn.index");
  const float scale = ops().floats("sparse_attn.scale")[0];
  for (size_t token = 0; token < 9; ++token) {
    std::vector<const void*> listed;
    for (size_t i = 0; i < 21; ++i)
      if (index[token * 21 + i] >= 0) listed.push_back(&rows[static_cast<size_t>(index[token * 21 + i]) * 96]);
    std::vector<float> scores(5 * listed.size()), out(5 * 96);
    attention(table_, {&q[token * 480], 5, listed.data(), static_cast<int64_t>(listed.size()), 96, false, scale, false},
              sink.data(), scores.data(), nullptr, out.data());
    for (size_t i = 0; i < out.size(); ++i) EXPECT_NEAR(out[i], expected[token * 480 + i], 1e-5) << token;
  }
}

// Any width, any number of heads and rows, bf16 rows: against the reference, within what K additions can lose, or what
// rounding probabilities and results to bf16 does. Heads in any company give the same bits.
TEST_P(EveryIsa, AttentionOverRaggedShapes) {
  std::mt19937 random(7);
  for (const bool round : {false, true})
    for (const int64_t c : {2, 15, 16, 17, 40, 64, 100, 192, 512})
      for (const int heads : {1, 3, 8, 11})
        for (const int64_t n : {1, 5, 33, 520}) {
          if (n > 100 && c != 64) continue;
          std::vector<float> q = test::random_floats(random, heads * c);
          const std::vector<float> sinks = test::random_floats(random, heads);
          if (round) ref::round_to_bf16(q.data(), heads * c);
          std::vector<float> values = test::random_floats(random, n * c);
          ref::round_to_bf16(values.data(), n * c);
          std::vector<bf16> stored;
          for (const float v : values) stored.push_back(float_to_bf16(v));
          std::vector<const void*> rows;
          std::vector<const float*> float_rows;
          for (int64_t i = 0; i < n; ++i) {
            rows.push_back(&stored[static_cast<size_t>(i * c)]);
            float_rows.push_back(&values[static_cast<size_t>(i * c)]);
          }
          const float scale = 1 / std::sqrt(static_cast<float>(c));
          std::vector<float> scores(static_cast<size_t>(heads * n)), out(static_cast<size_t>(heads * c)),
              partial = out, expected(static_cast<size_t>(c)), one = expected;
          attention(table_, {q.data(), heads, rows.data(), n, c, true, scale, round}, sinks.data(), scores.data(),
                    partial.data(), out.data());
          for (int h = 0; h < heads; ++h) {
            const float* qh = &q[static_cast<size_t>(h * c)];
            ref::attention(qh, float_rows.data(), n, c, scale, sinks[static_cast<size_t>(h)], round, expected.data());
            attention(table_, {qh, 1, rows.data(), n, c, true, scale, round}, &sinks[static_cast<size_t>(h)],
                      scores.data(), partial.data(), one.data());
            for (int64_t d = 0; d < c; ++d) {
              ASSERT_EQ(out[static_cast<size_t>(h * c + d)], one[static_cast<size_t>(d)]) << "head alone";
              // A rounded result may fall on the other side of a bf16 step, and so may one rounded probability.
              ASSERT_NEAR(one[static_cast<size_t>(d)], expected[static_cast<size_t>(d)],
                          round ? 0.02 * std::max(0.3f, std::fabs(expected[static_cast<size_t>(d)])) : 1e-5)
                  << "c " << c << " heads " << heads << " n " << n;
            }
          }
        }
}

// Every code but the NaNs, which no row has, with every scale a row can have: from 1e-4 / 448 to the largest bf16 /
// 448.
TEST_P(EveryIsa, UnpackedFp8CodesAreExact) {
  constexpr int64_t kNope = 256, kRope = 8;
  std::vector<uint8_t> row(2 * kRope + kNope + kNope / kFp8Block);
  std::vector<bf16> out(kNope + kRope);
  for (int scale = 105; scale <= 246; ++scale) {
    for (size_t i = 0; i < 2 * kRope; ++i) row[i] = static_cast<uint8_t>(i * 7);
    for (size_t code = 0; code < 256; ++code) row[2 * kRope + code] = static_cast<uint8_t>(code);
    for (size_t block = 0; block < 4; ++block)  // neighbours that differ
      row[2 * kRope + kNope + block] = static_cast<uint8_t>(block % 2 ? 105 + 246 - scale : scale);
    const void* rows[] = {row.data()};
    table_.unpack_fp8_rows(rows, 1, kNope, kRope, out.data());
    for (size_t code = 0; code < 256; ++code) {
      if ((code & 0x7f) == 0x7f) continue;
      const float value =
          e4m3_to_float(static_cast<uint8_t>(code)) * e8m0_to_float(row[2 * kRope + kNope + code / kFp8Block]);
      ASSERT_EQ(out[code], float_to_bf16(value)) << "code " << code << " scale " << scale;
      ASSERT_EQ(bf16_to_float(out[code]), value);
    }
    ASSERT_EQ(std::memcmp(&out[kNope], row.data(), 2 * kRope), 0);
  }
}

// Packed and unpacked, a row is what bf16 rows hold, bit for bit, whatever lies around it: ragged blocks, zeros of both
// signs, tiny and huge values, and rows that are on the grid already.
TEST_P(EveryIsa, Fp8RowsAreTheBf16Rows) {
  std::mt19937 random(29);
  for (const auto& [nope, rope] : {std::pair<int64_t, int64_t>(448, 64), {20, 4}, {64, 16}, {100, 2}, {1, 2}, {0, 8}}) {
    constexpr int64_t kRows = 41;
    const int64_t c = nope + rope, bytes = 2 * rope + nope + (nope + kFp8Block - 1) / kFp8Block;
    std::vector<uint8_t> packed(static_cast<size_t>(kRows * bytes));
    std::vector<const void*> rows;
    std::vector<bf16> expected, out(static_cast<size_t>(kRows * c) + 1, 0x1234);
    for (int64_t i = 0; i < kRows; ++i) {
      std::vector<float> row = test::random_floats(random, c, std::ldexp(1.0f, static_cast<int>(random() % 60) - 30));
      for (float& x : row) x = random() % 9 == 0 ? std::copysign(0.0f, x) : x * std::exp2f(-float(random() % 20));
      if (i % 3 == 0) ref::fake_fp8(row.data(), nope, kFp8Block);
      if (i % 5 == 0) row[0] = i % 2 ? 3e38f : -3e38f;
      uint8_t* to = &packed[static_cast<size_t>(i * bytes)];
      store_fp8_row(row.data(), nope, rope, to);
      rows.push_back(to);
      ref::fake_fp8(row.data(), nope, kFp8Block);
      for (const float x : row) expected.push_back(float_to_bf16(x));
    }
    table_.unpack_fp8_rows(rows.data(), kRows, nope, rope, out.data());
    ASSERT_EQ(out.back(), 0x1234) << "wrote past the end";
    out.pop_back();
    ASSERT_EQ(out, expected) << nope << " + " << rope;
  }
}

TEST_P(EveryIsa, SoftmaxAndSwigluAreWithinAFewUlps) {
  std::mt19937 random(23);
  for (const int64_t n : {1, 15, 16, 17, 200}) {
    std::vector<float> scores = test::random_floats(random, n, 20), expected = scores;
    const float sum = table_.softmax_with_sink(scores.data(), n, 1.5f, false),
                reference = ref::softmax_with_sink(expected.data(), n, 1.5f, false);
    EXPECT_NEAR(sum, reference, 1e-6 * reference);
    for (size_t i = 0; i < scores.size(); ++i) EXPECT_NEAR(scores[i], expected[i], 3e-7 * expected[i] + 1e-37);
    std::vector<float> gate = test::random_floats(random, n, 30), up = test::random_floats(random, n, 10), out = gate;
    table_.swiglu(gate.data(), up.data(), n, 10, 0.75f, false, out.data());
    for (size_t i = 0; i < out.size(); ++i) {
      const float want = 0.75f * ref::swiglu(gate[i], up[i], 10);
      EXPECT_NEAR(out[i], want, 1e-6 * std::fabs(want) + 1e-30) << gate[i] << " " << up[i];
    }
  }
}

TEST_P(EveryIsa, RmsNormAndGemvOverRaggedSizes) {
  std::mt19937 random(9);
  for (const int64_t n : {1, 7, 16, 31, 64, 65, 1000}) {
    const std::vector<float> x = test::random_floats(random, n), weight = test::random_floats(random, n),
                             w = test::random_floats(random, 3 * n);
    std::vector<float> out(static_cast<size_t>(n)), expected(static_cast<size_t>(n)), dots(3);
    rms_norm(table_, x.data(), weight.data(), n, 1e-6f, false, out.data());
    ref::rms_norm(x.data(), weight.data(), n, 1e-6f, false, expected.data());
    expect_close(out, expected, 1e-5);
    table_.gemv_f32(w.data(), x.data(), 3, n, dots.data());
    for (int64_t i = 0; i < 3; ++i) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < n; ++k)
        sum += static_cast<double>(w[static_cast<size_t>(i * n + k)]) * x[static_cast<size_t>(k)],
            size += std::fabs(w[static_cast<size_t>(i * n + k)] * x[static_cast<size_t>(k)]);
      EXPECT_NEAR(dots[static_cast<size_t>(i)], sum, 1e-6 * size + 1e-7);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, EveryIsa, ::testing::ValuesIn(test::isas()),
                         [](const auto& test) { return test::isa_test_name(test.param); });

}  // namespace
}  // namespace thermocline::cpu
