// The GPU kernels against the scalar reference and the golden vectors of single operations, on the SIMT interpreter or
// a card. Sizes 0, 1, tile - 1, tile, tile + 1 and ragged; bits must not depend on who shares the launch.
#include <cmath>
#include <numeric>

#include "kernels_cpu/indexer.h"
#include "kernels_cpu/ref/ops.h"
#include "runtime/kv/kv_store.h"
#include "tests/support/devices.h"
#include "tests/support/packed.h"

namespace thermocline {
namespace {

namespace ref = cpu::ref;
using gpu::DeviceView;

class Kernels : public test::DeviceTest {
 protected:
  std::mt19937 random_{7};
  std::vector<float> rounded(int64_t n, float deviation = 1) {
    std::vector<float> values = test::random_floats(random_, n, deviation);
    ref::round_to_bf16(values.data(), n);
    return values;
  }
};

// --- GEMM ---

struct GemmCase {
  const char* name;
  cpu::GemmKind kind;
};
class Gemm : public Kernels, public ::testing::WithParamInterface<GemmCase> {};

TEST_P(Gemm, MatchesTheSumAndDoesNotDependOnItsCompany) {
  for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{16, 32}, {40, 96}, {161, 160}, {64, 1184}}) {
    const test::RandomMatrix w = test::random_matrix(random_, GetParam().kind, n, k, 2);
    const gpu::DeviceMatrix device_w = matrix(w.matrix);
    constexpr int64_t kMost = 70;
    const std::vector<float> x = rounded(kMost * k);
    bf16* const device_x = up(test::to_bf16(x));
    std::vector<float> all;
    for (const int64_t rows :
         {kMost, int64_t{1}, int64_t{7}, int64_t{8}, int64_t{9}, int64_t{16}, int64_t{17}, int64_t{64}}) {
      float* const y = zeros<float>(rows * n);
      gpu::GemmArgs args;
      args.num_jobs = 1;
      args.jobs[0] = {device_w, device_x, k, y, n, rows, 0, device_w.row_groups(), false};
      kernels().gemm(*stream_, args);
      const std::vector<float> got = down(y, rows * n);
      if (rows == kMost) {
        all = got;
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t i = 0; i < n; ++i) {
            double sum = 0, norm = 0;
            for (int64_t j = 0; j < k; ++j) {
              const double product =
                  static_cast<double>(w.values[static_cast<size_t>(i * k + j)]) * x[static_cast<size_t>(row * k + j)];
              sum += product;
              norm += std::fabs(product);
            }
            ASSERT_NEAR(got[static_cast<size_t>(row * n + i)], sum, norm * static_cast<double>(k) * 0x1p-24 + 1e-30)
                << n << " x " << k << ", row " << row << ", output " << i;
          }
      }
      ASSERT_TRUE(std::equal(got.begin(), got.end(), all.begin())) << rows << " rows have other bits than " << kMost;
    }
  }
}

TEST_P(Gemm, JobsOfALaunchAreIndependent) {
  const test::RandomMatrix a = test::random_matrix(random_, GetParam().kind, 48, 64, 2),
                           b = test::random_matrix(random_, GetParam().kind, 80, 64, 2);
  const std::vector<float> x = rounded(3 * 64);
  bf16* const device_x = up(test::to_bf16(x));
  float* const ya = zeros<float>(3 * 48);
  float* const yb = zeros<float>(3 * 100);  // a stride of its own, and only row groups 1 and 2
  gpu::GemmArgs args;
  args.num_jobs = 2;
  args.jobs[0] = {matrix(a.matrix), device_x, 64, ya, 48, 3, 0, 3, true};
  args.jobs[1] = {matrix(b.matrix), device_x, 64, yb, 100, 3, 1, 2, false};
  kernels().gemm(*stream_, args);
  const std::vector<float> got_a = down(ya, 3 * 48), got_b = down(yb, 3 * 100);
  std::vector<float> expected(80);
  for (int64_t row = 0; row < 3; ++row) {
    ref::linear(a.matrix, &x[static_cast<size_t>(row * 64)], expected.data());
    for (int64_t i = 0; i < 48; ++i) {
      EXPECT_NEAR(got_a[static_cast<size_t>(row * 48 + i)], expected[static_cast<size_t>(i)],
                  0.01 * std::fabs(expected[static_cast<size_t>(i)]) + 0.02);
      EXPECT_EQ(got_a[static_cast<size_t>(row * 48 + i)], round_bf16(got_a[static_cast<size_t>(row * 48 + i)]));
    }
    ref::linear(b.matrix, &x[static_cast<size_t>(row * 64)], expected.data());
    for (int64_t i = 0; i < 32; ++i)
      EXPECT_NEAR(got_b[static_cast<size_t>(row * 100 + i)], expected[static_cast<size_t>(16 + i)],
                  2e-4 * (1 + std::fabs(expected[static_cast<size_t>(16 + i)])));
    EXPECT_EQ(got_b[static_cast<size_t>(row * 100 + 32)], 0) << "beyond the job's columns";
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, Gemm,
                         ::testing::Values(GemmCase{"mxfp4", cpu::GemmKind::mxfp4_e8m0},
                                           GemmCase{"mxfp4_f32", cpu::GemmKind::mxfp4_f32},
                                           GemmCase{"fp8", cpu::GemmKind::fp8_f32},
                                           GemmCase{"bf16", cpu::GemmKind::bf16}),
                         [](const auto& test) { return std::string(test.param.name); });

// --- experts ---

TEST_F(Kernels, ExpertsMatchTheReferenceInAnySlotAndCompany) {
#if defined(__SANITIZE_THREAD__)
  constexpr int64_t kDim = 32, kInter = 96, kExperts = 3, kTokens = 18;
#elif defined(TC_SANITIZED)
  constexpr int64_t kDim = 64, kInter = 160, kExperts = 3, kTokens = 18;  // the reference decodes element by element
#else
  constexpr int64_t kDim = 128, kInter = 160, kExperts = 3, kTokens = 40;
#endif
  struct Expert {
    test::RandomMatrix w1, w3, w2;
  };
  std::vector<Expert> experts;
  for (int64_t e = 0; e < kExperts; ++e)
    experts.push_back({test::random_matrix(random_, cpu::GemmKind::mxfp4_e8m0, kInter, kDim),
                       test::random_matrix(random_, cpu::GemmKind::mxfp4_e8m0, kInter, kDim),
                       test::random_matrix(random_, cpu::GemmKind::mxfp4_e8m0, kDim, kInter)});
  // Slots of w1 tiles, w1 scales, w3 .., w2 ..
  const auto planes = [](const Expert& e) {
    std::vector<uint8_t> slot;
    for (const test::RandomMatrix* m : {&e.w1, &e.w3, &e.w2}) {
      slot.insert(slot.end(), m->tiles.begin(), m->tiles.end());
      slot.insert(slot.end(), m->scales.begin(), m->scales.end() - 1);
      slot.resize((slot.size() + 255) / 256 * 256);
    }
    return slot;
  };
  const int64_t slot_bytes = static_cast<int64_t>(planes(experts[0]).size());
  std::vector<uint8_t> pool;
  for (const Expert& e : experts) {
    const std::vector<uint8_t> slot = planes(e);
    pool.insert(pool.end(), slot.begin(), slot.end());
  }
  const uint8_t* const base = up(pool);
  int64_t at = 0;
  const auto device_matrix = [&](const cpu::PackedMatrix& m) {
    gpu::DeviceMatrix out;
    static_cast<cpu::PackedShape&>(out) = m;
    out.tiles = {base + at, {m.tile_plane_bytes()}};
    out.scales = {base + at + m.tile_plane_bytes(), {m.scale_plane_bytes()}};
    at += (m.bytes() + 255) / 256 * 256;
    return out;
  };
  const gpu::DeviceMatrix w1 = device_matrix(experts[0].w1.matrix), w3 = device_matrix(experts[0].w3.matrix),
                          w2 = device_matrix(experts[0].w2.matrix);
  const std::vector<float> x = rounded(kTokens * kDim, 0.3f);
  const DeviceView<const bf16, 2> device_x{up(test::to_bf16(x)), {kTokens, kDim}};
  // Pairs: expert 0 has all tokens, expert 2 the first three, expert 1 none.
  std::vector<int32_t> pair_token(kTokens + 3);
  std::iota(pair_token.begin(), pair_token.begin() + kTokens, 0);
  std::iota(pair_token.begin() + kTokens, pair_token.end(), 0);
  const int64_t pairs = static_cast<int64_t>(pair_token.size());
  std::vector<float> weights;
  for (int64_t i = 0; i < pairs; ++i) weights.push_back(0.25f + 0.01f * static_cast<float>(i));
  for (const bool round : {false, true}) {
    std::vector<bf16> first;
    for (const int32_t item_pairs : {64, 16, 8}) {
      std::vector<gpu::ExpertItem> items;
      for (int32_t begin = 0; begin < kTokens; begin += item_pairs)
        items.push_back({0, begin, std::min<int32_t>(item_pairs, kTokens - begin)});
      items.push_back({2, kTokens, 3});
      const int32_t count = static_cast<int32_t>(items.size());
      items.push_back({77, 77, 77});  // beyond the count: not read
      gpu::GateUpArgs up_args;
      up_args.w1 = w1;
      up_args.w3 = w3;
      up_args.slot_bytes = slot_bytes;
      up_args.items = {up(items), {static_cast<int64_t>(items.size())}};
      up_args.counts = {up(std::vector<int32_t>{count, 0}), {2}};
      up_args.pair_token = {up(pair_token), {pairs}};
      up_args.pair_weight = {up(weights), {pairs}};
      up_args.x = device_x;
      up_args.h = {zeros<bf16>(pairs * kInter), {pairs, kInter}};
      up_args.item_pairs = item_pairs;
      up_args.swiglu_limit = 7;
      up_args.round_linear = round;
      kernels().gate_up(*stream_, up_args);
      gpu::DownArgs down_args;
      down_args.w2 = w2;
      down_args.slot_bytes = slot_bytes;
      down_args.items = up_args.items;
      down_args.counts = up_args.counts;
      down_args.h = {up_args.h.pointer, {pairs, kInter}};
      down_args.y = {zeros<bf16>(pairs * kDim), {pairs, kDim}};
      down_args.item_pairs = item_pairs;
      kernels().down(*stream_, down_args);
      const std::vector<bf16> got = down(down_args.y.pointer, pairs * kDim);
      if (first.empty()) first = got;
      EXPECT_EQ(got, first) << "items of " << item_pairs;
      std::vector<float> gate(kInter), up_row(kInter), y(kDim);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const Expert& e = experts[pair < kTokens ? 0 : 2];
        const float* const row = &x[static_cast<size_t>(pair_token[static_cast<size_t>(pair)] * kDim)];
        ref::linear(e.w1.matrix, row, gate.data());
        ref::linear(e.w3.matrix, row, up_row.data());
        for (int64_t i = 0; i < kInter; ++i)
          gate[static_cast<size_t>(i)] = round_bf16(
              weights[static_cast<size_t>(pair)] *
              ref::swiglu(round_bf16(gate[static_cast<size_t>(i)]), round_bf16(up_row[static_cast<size_t>(i)]), 7));
        if (round) ref::fake_fp8(gate.data(), kInter, 128);
        ref::linear(e.w2.matrix, gate.data(), y.data());
        double norm = 0;
        for (const float v : y) norm += v * v;
        norm = std::sqrt(norm / kDim);
        for (int64_t i = 0; i < kDim; ++i)
          ASSERT_NEAR(bf16_to_float(got[static_cast<size_t>(pair * kDim + i)]), y[static_cast<size_t>(i)], 0.02 * norm)
              << "pair " << pair << " output " << i;
      }
    }
  }
}

// --- routing ---

TEST_F(Kernels, RouteMatchesTheReferenceWithTies) {
  for (const int64_t experts : {1, 7, 32, 33, 256, 384}) {
    const int64_t k = std::min<int64_t>(6, experts), tokens = 5;
    std::vector<float> scores = test::random_floats(random_, tokens * experts),
                       bias = test::random_floats(random_, experts, 0.1f);
    std::fill_n(scores.begin(), experts, 0.5f);  // token 0: only the bias decides
    for (float& b : bias) b = std::round(b * 8) / 8;
    const gpu::StepTables tables = step(std::vector<gpu::TokenInfo>(static_cast<size_t>(tokens)), {{}}, {0});
    int32_t* const ids = zeros<int32_t>(tokens * k);
    float* const weights = zeros<float>(tokens * k);
    kernels().route(*stream_, {tables,
                               {up(scores), {tokens, experts}},
                               {up(bias), {experts}},
                               {},
                               {ids, {tokens, k}},
                               {weights, {tokens, k}},
                               1.5f});
    const std::vector<int32_t> got = down(ids, tokens * k);
    const std::vector<float> got_weights = down(weights, tokens * k);
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<float> transformed(static_cast<size_t>(experts));
      for (int64_t e = 0; e < experts; ++e)
        transformed[static_cast<size_t>(e)] = ref::sqrt_softplus(scores[static_cast<size_t>(t * experts + e)]);
      std::vector<int32_t> expected(static_cast<size_t>(k));
      std::vector<float> expected_weights(static_cast<size_t>(k));
      ref::route(transformed.data(), bias.data(), static_cast<int>(experts), static_cast<int>(k), 1.5f, expected.data(),
                 expected_weights.data());
      for (int64_t j = 0; j < k; ++j) {
        EXPECT_EQ(got[static_cast<size_t>(t * k + j)], expected[static_cast<size_t>(j)]) << experts << ", token " << t;
        EXPECT_NEAR(got_weights[static_cast<size_t>(t * k + j)], expected_weights[static_cast<size_t>(j)], 1e-6);
      }
    }
  }
}

TEST_F(Kernels, RouteMatchesTheGoldenVectors) {
  const test::TensorFile golden(test::golden("ops") / "ops.safetensors");
  const std::vector<float> logits = golden.floats("route.logits"), bias = golden.floats("route.bias"),
                           weights = golden.floats("route.weights_scale_1.5");
  const std::vector<int32_t> ids = golden.ids("route.ids");
  const gpu::StepTables tables = step(std::vector<gpu::TokenInfo>(40), {{}}, {0});
  int32_t* const got_ids = zeros<int32_t>(40 * 6);
  float* const got_weights = zeros<float>(40 * 6);
  kernels().route(
      *stream_,
      {tables, {up(logits), {40, 24}}, {up(bias), {24}}, {}, {got_ids, {40, 6}}, {got_weights, {40, 6}}, 1.5f});
  EXPECT_EQ(down(got_ids, 240), ids);
  const std::vector<float> w = down(got_weights, 240);
  for (size_t i = 0; i < w.size(); ++i) EXPECT_NEAR(w[i], weights[i], 1e-5 * weights[i]);
}

TEST_F(Kernels, PartitionRunsEveryPairOnceOnTheSideThatHasIt) {
  for (const int64_t tokens : {1, 8, 33}) {
    constexpr int64_t kExperts = 40, kTopK = 6;
    std::vector<int32_t> ids, slots(kExperts, -1);
    std::vector<gpu::TokenInfo> infos(static_cast<size_t>(tokens));
    for (int64_t t = 0; t < tokens; ++t) {
      infos[static_cast<size_t>(t)].pos = t % 5 == 4 ? -1 : 3;  // some padding
      std::vector<int32_t> all(kExperts);
      std::iota(all.begin(), all.end(), 0);
      std::shuffle(all.begin(), all.end(), random_);
      ids.insert(ids.end(), all.begin(), all.begin() + kTopK);
      if (t == 0) ids[1] = ids[0];  // an expert named twice
    }
    for (int32_t e = 0; e < kExperts; e += 3) slots[static_cast<size_t>(e)] = 100 + e;
    const std::vector<float> weights = test::random_floats(random_, tokens * kTopK);
    const int64_t pairs = tokens * kTopK;
    gpu::PinnedBuffer misses = device_->allocate_pinned(static_cast<size_t>(pairs) * sizeof(gpu::MissPair)).value();
    gpu::PartitionArgs args;
    args.step = step(infos, {{}}, {0});
    args.ids = {up(ids), {tokens, kTopK}};
    args.weights = {up(weights), {tokens, kTopK}};
    args.slot_of = {up(slots), {kExperts}};
    args.pair_token = {zeros<int32_t>(pairs), {pairs}};
    args.pair_weight = {zeros<float>(pairs), {pairs}};
    args.pair_of = {zeros<int32_t>(pairs), {tokens, kTopK}};
    args.items = {up(std::vector<gpu::ExpertItem>(static_cast<size_t>(pairs))), {pairs}};
    args.counts = {zeros<int32_t>(2), {2}};
    args.misses = {reinterpret_cast<gpu::MissPair*>(misses.data()), {pairs}};
    args.item_pairs = 8;
    kernels().partition(*stream_, args);
    const std::vector<int32_t> counts = down(args.counts.pointer, 2), pair_token = down(args.pair_token.pointer, pairs),
                               pair_of = down(args.pair_of.pointer, pairs);
    const std::vector<float> pair_weight = down(args.pair_weight.pointer, pairs);
    const std::vector<gpu::ExpertItem> items = down(args.items.pointer, pairs);
    // What each pair is, by whoever computes it.
    std::vector<int32_t> expert_of(static_cast<size_t>(pairs), -1);
    for (int32_t i = 0; i < counts[0]; ++i) {
      const gpu::ExpertItem& item = items[static_cast<size_t>(i)];
      EXPECT_LE(item.count, 8);
      for (int32_t p = item.first_pair; p < item.first_pair + item.count; ++p) {
        EXPECT_EQ(expert_of[static_cast<size_t>(p)], -1) << "pair " << p << " twice";
        expert_of[static_cast<size_t>(p)] = item.slot - 100;
      }
    }
    const gpu::MissPair* const miss = reinterpret_cast<const gpu::MissPair*>(misses.data());
    for (int32_t i = 0; i < counts[1]; ++i) {
      EXPECT_EQ(expert_of[static_cast<size_t>(miss[i].pair)], -1);
      EXPECT_EQ(slots[static_cast<size_t>(miss[i].expert)], -1);
      EXPECT_EQ(pair_token[static_cast<size_t>(miss[i].pair)], miss[i].token);
      expert_of[static_cast<size_t>(miss[i].pair)] = miss[i].expert;
      if (i > 0) {
        EXPECT_LT(miss[i - 1].pair, miss[i].pair) << "misses come by rising expert and token";
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      if (infos[static_cast<size_t>(t)].pos < 0) continue;
      std::multiset<int32_t> wanted(ids.begin() + t * kTopK, ids.begin() + (t + 1) * kTopK), got;
      int32_t before = -1;
      for (int64_t j = 0; j < kTopK; ++j) {
        const size_t pair = static_cast<size_t>(pair_of[static_cast<size_t>(t * kTopK + j)]);
        EXPECT_EQ(pair_token[pair], t);
        EXPECT_GE(expert_of[pair], before) << "by rising expert";
        before = expert_of[pair];
        got.insert(before);
        bool weight_is_one_of_its = false;
        for (int64_t i = 0; i < kTopK; ++i)
          weight_is_one_of_its |= ids[static_cast<size_t>(t * kTopK + i)] == before &&
                                  weights[static_cast<size_t>(t * kTopK + i)] == pair_weight[pair];
        EXPECT_TRUE(weight_is_one_of_its);
      }
      EXPECT_EQ(got, wanted);
    }
  }
}

// --- hyper-connections ---

TEST_F(Kernels, HyperConnectionsReadAndWriteAsTheReference) {
  for (const int s : {1, 2, 3, 4, 5}) {
    const int64_t dim = 224, tokens = 3, width = s * dim, outputs = (2 + s) * s;
    std::vector<float> streams = rounded(tokens * width);
    const std::vector<float> fn = test::random_floats(random_, outputs * width, 0.02f),
                             base = test::random_floats(random_, outputs), scale = {0.7f, 1.1f, 0.9f},
                             norm = test::random_floats(random_, dim);
    const auto device_streams = up(streams);
    float* const mixes = zeros<float>(tokens * (outputs + 1));
    float *const post = zeros<float>(tokens * s), *const comb = zeros<float>(tokens * s * s);
    bf16 *const plain = zeros<bf16>(tokens * dim), *const linear = zeros<bf16>(tokens * dim);
    kernels().hc_mix(
        *stream_, {{device_streams, {tokens, width}}, {up(fn), {outputs, width}}, {}, {mixes, {tokens, outputs + 1}}});
    kernels().hc_read(*stream_, {{device_streams, {tokens, s, dim}},
                                 {mixes, {tokens, outputs + 1}},
                                 {up(scale), {3}},
                                 {up(base), {outputs}},
                                 {up(norm), {dim}},
                                 {post, {tokens, s}},
                                 {comb, {tokens, s * s}},
                                 {plain, {tokens, dim}},
                                 {linear, {tokens, dim}},
                                 1e-6f,
                                 1e-6f,
                                 20,
                                 true});
    const std::vector<float> got_post = down(post, tokens * s), got_comb = down(comb, tokens * s * s);
    const std::vector<float> got_plain = test::to_float(down(plain, tokens * dim)),
                             got_linear = test::to_float(down(linear, tokens * dim));
    const std::vector<float> y = rounded(tokens * dim);
    kernels().hc_write(*stream_, {{device_streams, {tokens, s, dim}},
                                  {post, {tokens, s}},
                                  {comb, {tokens, s * s}},
                                  {up(y), {tokens, dim}},
                                  {},
                                  {},
                                  {}});
    const std::vector<float> written = down(device_streams, tokens * width);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* const in = &streams[static_cast<size_t>(t * width)];
      std::vector<float> mix(static_cast<size_t>(outputs)), pre(static_cast<size_t>(s)),
          ref_post(static_cast<size_t>(s)), ref_comb(static_cast<size_t>(s * s)), x(static_cast<size_t>(dim));
      double squares = 0;
      for (int64_t d = 0; d < width; ++d) squares += in[d] * in[d];
      for (int64_t o = 0; o < outputs; ++o) {
        double sum = 0;
        for (int64_t d = 0; d < width; ++d) sum += static_cast<double>(fn[static_cast<size_t>(o * width + d)]) * in[d];
        mix[static_cast<size_t>(o)] = static_cast<float>(sum / std::sqrt(squares / static_cast<double>(width) + 1e-6));
      }
      ref::hc_split(mix.data(), scale.data(), base.data(), s, 20, 1e-6f, pre.data(), ref_post.data(), ref_comb.data());
      for (int j = 0; j < s; ++j)
        EXPECT_NEAR(got_post[static_cast<size_t>(t * s + j)], ref_post[static_cast<size_t>(j)], 2e-5);
      for (int j = 0; j < s * s; ++j)
        EXPECT_NEAR(got_comb[static_cast<size_t>(t * s * s + j)], ref_comb[static_cast<size_t>(j)], 2e-5);
      ref::hc_read(in, pre.data(), s, dim, true, x.data());
      ref::rms_norm(x.data(), norm.data(), dim, 1e-6f, true, x.data());
      std::vector<float> rounded_x(got_plain.begin() + t * dim, got_plain.begin() + (t + 1) * dim);
      for (int64_t d = 0; d < dim; ++d)
        EXPECT_NEAR(got_plain[static_cast<size_t>(t * dim + d)], x[static_cast<size_t>(d)],
                    0.02 * std::fabs(x[static_cast<size_t>(d)]) + 0.01);
      ref::fake_fp8(rounded_x.data(), dim, 128);  // of the device's own rows: bit for bit
      EXPECT_TRUE(std::equal(rounded_x.begin(), rounded_x.end(), got_linear.begin() + t * dim))
          << "e4m3 of " << s << " streams";
      std::vector<float> expected(in, in + width);
      ref::hc_write(expected.data(), &y[static_cast<size_t>(t * dim)], &got_post[static_cast<size_t>(t * s)],
                    &got_comb[static_cast<size_t>(t * s * s)], s, dim, true);
      EXPECT_TRUE(std::equal(expected.begin(), expected.end(), written.begin() + t * width)) << "written streams";
    }
  }
}

TEST_F(Kernels, LinearInputsAreTheGoldenE4m3Values) {
  const test::TensorFile golden(test::golden("ops") / "ops.safetensors");
  const std::vector<float> x = golden.floats("fake_fp8_128.x"), y = golden.floats("fake_fp8_128.y");
  const int64_t width = golden.info("fake_fp8_128.x").shape.back(), rows = static_cast<int64_t>(x.size()) / width;
  bf16* const out = zeros<bf16>(rows * width);
  kernels().linear_input(*stream_, {{up(x), {rows, width}}, {out, {rows, width}}, true});
  const std::vector<float> got = test::to_float(down(out, rows * width));
  for (size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i], y[i]) << i;
}

TEST_F(Kernels, HeadReadNormsTheWantedRows) {
  const int64_t s = 4, dim = 96, tokens = 5, width = s * dim;
  const std::vector<float> streams = rounded(tokens * width), fn = test::random_floats(random_, s * width, 0.05f),
                           base = test::random_floats(random_, s), scale = {1.3f},
                           norm = test::random_floats(random_, dim);
  const std::vector<int32_t> rows = {4, 1};
  float* const device_streams = up(streams);
  const DeviceView<const int32_t, 1> which{up(rows), {2}};
  float* const mixes = zeros<float>(2 * (s + 1));
  bf16* const hidden = zeros<bf16>(2 * dim);
  kernels().hc_mix(*stream_, {{device_streams, {tokens, width}}, {up(fn), {s, width}}, which, {mixes, {2, s + 1}}});
  kernels().head_read(*stream_, {{device_streams, {tokens, s, dim}},
                                 {mixes, {2, s + 1}},
                                 {up(scale), {1}},
                                 {up(base), {s}},
                                 {up(norm), {dim}},
                                 which,
                                 {hidden, {2, dim}},
                                 1e-6f,
                                 1e-6f});
  const std::vector<float> got = test::to_float(down(hidden, 2 * dim));
  for (size_t i = 0; i < 2; ++i) {
    const float* const in = &streams[static_cast<size_t>(rows[i] * width)];
    double squares = 0;
    for (int64_t d = 0; d < width; ++d) squares += in[d] * in[d];
    std::vector<float> pre, x(static_cast<size_t>(dim));
    for (int64_t j = 0; j < s; ++j) {
      double sum = 0;
      for (int64_t d = 0; d < width; ++d) sum += static_cast<double>(fn[static_cast<size_t>(j * width + d)]) * in[d];
      const double mix =
          sum / std::sqrt(squares / static_cast<double>(width) + 1e-6) * scale[0] + base[static_cast<size_t>(j)];
      pre.push_back(static_cast<float>(1 / (1 + std::exp(-mix)) + 1e-6));
    }
    ref::hc_read(in, pre.data(), static_cast<int>(s), dim, true, x.data());
    ref::rms_norm(x.data(), norm.data(), dim, 1e-6f, true, x.data());
    for (int64_t d = 0; d < dim; ++d)
      EXPECT_NEAR(got[i * static_cast<size_t>(dim) + static_cast<size_t>(d)], x[static_cast<size_t>(d)],
                  0.02 * std::fabs(x[static_cast<size_t>(d)]) + 0.01);
  }
}

TEST_F(Kernels, NoRowsStartNothing) {
  const test::RandomMatrix w = test::random_matrix(random_, cpu::GemmKind::bf16, 16, 32);
  float* const y = up(std::vector<float>(16, 7.0f));
  gpu::GemmArgs gemm;
  gemm.num_jobs = 1;
  gemm.jobs[0] = {matrix(w.matrix), zeros<bf16>(32), 32, y, 16, 0, 0, 1, false};
  kernels().gemm(*stream_, gemm);
  kernels().argmax(*stream_, {{y, {0, 16}}, {zeros<int32_t>(1), {0}}});
  kernels().linear_input(*stream_, {{y, {0, 16}}, {zeros<bf16>(16), {0, 16}}, true});
  EXPECT_EQ(down(y, 16), std::vector<float>(16, 7.0f));
}

TEST_F(Kernels, ArgmaxTakesTheLowerIdAmongEquals) {
  const int64_t vocab = 1000;
  std::vector<float> logits(static_cast<size_t>(3 * vocab), -1.0f);
  logits[700] = logits[123] = 5;
  logits[static_cast<size_t>(vocab) + 999] = 2;
  int32_t* const ids = zeros<int32_t>(3);
  kernels().argmax(*stream_, {{up(logits), {3, vocab}}, {ids, {3}}});
  EXPECT_EQ(down(ids, 3), (std::vector<int32_t>{123, 999, 0}));
}

TEST_F(Kernels, ArgmaxOfARowThatIsNotFiniteIsNone) {
  const int64_t vocab = 1000;
  const float bad[] = {NAN, INFINITY, -INFINITY};
  std::vector<float> logits(static_cast<size_t>(4 * vocab), 1.0f);
  for (size_t row = 0; row < 3; ++row) logits[row * static_cast<size_t>(vocab) + 77 + 300 * row] = bad[row];
  int32_t* const ids = zeros<int32_t>(4);
  kernels().argmax(*stream_, {{up(logits), {4, vocab}}, {ids, {4}}});
  EXPECT_EQ(down(ids, 4), (std::vector<int32_t>{-1, -1, -1, 0}));
}

// --- the indexer ---

TEST_F(Kernels, SelectionIsExact) {
  for (const int64_t visible : {1, 31, 64, 65, 255, 256, 257, 1000}) {
    constexpr int64_t kTopK = 64;
    std::vector<float> scores = rounded(visible);
    for (float& s : scores) s = std::round(s * 4) / 4;  // many ties, some at the threshold
    const gpu::StepTables tables = step({{0, static_cast<int32_t>(4 * visible - 1), 0, 0, 0, 1}}, {{}}, {0});
    int32_t* const selected = up(std::vector<int32_t>(kTopK, -1));
    kernels().select(*stream_, {tables, {up(scores), {1, visible}}, {selected, {1, kTopK}}, 4});
    const int64_t count = std::min(visible, kTopK);
    std::vector<int32_t> order(static_cast<size_t>(visible)), expected(static_cast<size_t>(count)),
        got = down(selected, kTopK);
    ref::select_topk(scores.data(), visible, count, order.data(), expected.data());
    got.resize(static_cast<size_t>(count));
    EXPECT_EQ(got, expected) << visible << " rows";

    // A later launch of the same step: the second token's scores alone, its rows in its own place.
    const gpu::TokenInfo info = {0, static_cast<int32_t>(4 * visible - 1), 0, 0, 0, 1};
    int32_t* const both = up(std::vector<int32_t>(2 * kTopK, -1));
    kernels().select(*stream_, {step({{}, info}, {{}}, {0}), {up(scores), {1, visible}}, {both, {2, kTopK}}, 4, 1});
    std::vector<int32_t> placed = down(both, 2 * kTopK);
    EXPECT_TRUE(std::all_of(placed.begin(), placed.begin() + kTopK, [](int32_t row) { return row == -1; }));
    placed.erase(placed.begin(), placed.begin() + kTopK);
    placed.resize(static_cast<size_t>(count));
    EXPECT_EQ(placed, expected) << visible << " rows";
  }
}

TEST_F(Kernels, IndexScoresHaveTheBitsOfTheScalarKernel) {
  for (const auto& [heads, width] : std::vector<std::pair<int, int64_t>>{{1, 32}, {8, 64}, {12, 128}, {64, 128}}) {
    constexpr int64_t kVisible = 75, kTopK = 4;
    const int64_t tiles = width / 32, groups = (kVisible + 15) / 16, group_bytes = cpu::key_group_bytes(tiles);
    std::vector<uint8_t> keys(static_cast<size_t>(16 * group_bytes), 0);
    for (int64_t r = 0; r < kVisible; ++r) {
      std::vector<float> key = test::random_floats(random_, width);
      ref::fake_fp4(key.data(), width);
      cpu::store_index_key(key.data(), width, r % 16, &keys[static_cast<size_t>(r / 16 * group_bytes)]);
    }
    std::vector<float> q = test::random_floats(random_, heads * width), gates = rounded(heads);
    for (int h = 0; h < heads; ++h) ref::fake_fp4(&q[static_cast<size_t>(h * width)], width);
    std::vector<cpu::Int8Chunk> packed(static_cast<size_t>(heads * tiles));
    for (int h = 0; h < heads; ++h)
      cpu::pack_index_query(&q[static_cast<size_t>(h * width)], width, &packed[static_cast<size_t>(h * tiles)]);
    std::vector<const uint8_t*> pointers;
    for (int64_t g = 0; g < groups; ++g) pointers.push_back(&keys[static_cast<size_t>(g * group_bytes)]);
    std::vector<float> expected(static_cast<size_t>(groups * 16));
    cpu::scalar::table().index_scores_fp4(packed.data(), gates.data(), heads, pointers.data(), groups, tiles,
                                          expected.data());

    gpu::IndexScoresArgs args;
    args.step = step({{0, 4 * kVisible - 1, 0, 0, 0, 1}}, {{0, 0, 0, 0}}, {0, 1});
    args.pages.keys = {up(keys), {static_cast<int64_t>(keys.size())}};
    args.pages.key_page_bytes = 4 * group_bytes;  // 64 rows a page, in two neighbouring pages
    args.pages.rows_per_page = 64;
    args.pages.index_group_bytes = group_bytes;
    args.q = {up(test::to_bf16(q)), {1, heads, width}};
    args.gates = {up(gates), {1, heads}};
    float* const scores = zeros<float>(kVisible + 5);
    args.scores = {scores, {1, kVisible + 5}};
    args.ratio = 4;
    args.topk = kTopK;
    kernels().index_scores(*stream_, args);
    const std::vector<float> got = down(scores, kVisible + 5);
    for (int64_t r = 0; r < kVisible; ++r)
      ASSERT_EQ(got[static_cast<size_t>(r)], expected[static_cast<size_t>(r)])
          << heads << " heads of " << width << ", row " << r;
    EXPECT_EQ(got[kVisible], 0) << "beyond what is visible";

    // A later launch of the same step has the scores of its own tokens.
    std::vector<float> two(q.size(), 0.0f), two_gates(gates.size(), 0.0f);
    two.insert(two.end(), q.begin(), q.end());
    two_gates.insert(two_gates.end(), gates.begin(), gates.end());
    const gpu::TokenInfo info = {0, 4 * kVisible - 1, 0, 0, 0, 1};
    args.step = step({info, info}, {{0, 0, 0, 0}}, {0, 1});
    args.q = {up(test::to_bf16(two)), {2, heads, width}};
    args.gates = {up(two_gates), {2, heads}};
    args.first_token = 1;
    float* const later = zeros<float>(kVisible + 5);
    args.scores = {later, {1, kVisible + 5}};
    kernels().index_scores(*stream_, args);
    EXPECT_EQ(down(later, kVisible + 5), got);
  }
}

// --- attention ---

TEST_F(Kernels, AttentionMatchesTheReferenceAndDoesNotDependOnItsCompany) {
  for (const auto& [heads, width] : std::vector<std::pair<int64_t, int64_t>>{{1, 32}, {5, 96}, {17, 128}, {16, 512}}) {
    constexpr int64_t kWindow = 40, kRows = 200, kTopK = 150, kRope = 16;
    const int64_t row_bytes = fp8_row_bytes(width, kRope);
    // Rows on the FP8 grid, and the bytes a device keeps of them.
    const auto rows_of = [&](int64_t count, std::vector<uint8_t>& bytes) {
      std::vector<float> values = rounded(count * width);
      bytes.assign(static_cast<size_t>(count * row_bytes), 0);
      for (int64_t row = 0; row < count; ++row) {
        float* const x = &values[static_cast<size_t>(row * width)];
        uint8_t* const out = &bytes[static_cast<size_t>(row * row_bytes)];
        const int64_t nope = width - kRope;
        for (int64_t d = 0; d < kRope; ++d) {
          const bf16 value = float_to_bf16(x[nope + d]);
          std::memcpy(out + 2 * d, &value, 2);
        }
        for (int64_t begin = 0; begin < nope; begin += 64) {
          const int64_t end = std::min<int64_t>(nope, begin + 64);
          float amax = 1e-4f;
          for (int64_t d = begin; d < end; ++d) amax = std::max(amax, std::fabs(x[d]));
          const float scale = pow2_ceil(amax / 448);
          out[2 * kRope + nope + begin / 64] = static_cast<uint8_t>(std::bit_cast<uint32_t>(scale) >> 23);
          for (int64_t d = begin; d < end; ++d) out[2 * kRope + d] = float_to_e4m3(x[d] / scale);
        }
        ref::fake_fp8(x, nope, 64);
      }
      return values;
    };
    std::vector<uint8_t> window_pool, compressed_pool;
    const std::vector<float> raw = rows_of(256, window_pool), compressed = rows_of(kRows, compressed_pool);
    // Tokens: one row; a few; a window and no more; both kinds, more than a split.
    const std::vector<int32_t> positions = {0, 6, 39, 100, 250};
    std::vector<gpu::TokenInfo> infos;
    std::vector<int32_t> selected;
    for (const int32_t pos : positions) {
      infos.push_back({0, pos, 0, pos, static_cast<int32_t>(infos.size()), 1});
      std::vector<int32_t> rows(static_cast<size_t>(kRows));
      std::iota(rows.begin(), rows.end(), 0);
      std::shuffle(rows.begin(), rows.end(), random_);
      std::sort(rows.begin(), rows.begin() + kTopK);
      selected.insert(selected.end(), rows.begin(), rows.begin() + kTopK);
    }
    infos.push_back({});  // padding
    selected.resize(selected.size() + kTopK);
    const int64_t tokens = static_cast<int64_t>(infos.size());
    std::vector<float> cos(static_cast<size_t>(tokens * kRope / 2), 0.6f), sin(cos.size(), 0.8f);
    const std::vector<float> q = rounded(tokens * heads * width, 0.3f), sinks = test::random_floats(random_, heads);
    gpu::AttendMergeArgs args;
    gpu::AttendArgs& attend = args.attend;
    std::vector<int32_t> pages(256 / kWindowPageTokens + 1);  // of the window, in order, then of compressed rows
    std::iota(pages.begin(), pages.end() - 1, 0);
    attend.step = step(infos, {{0, 0, 0, static_cast<int32_t>(pages.size()) - 1}}, pages, 1, kRope / 2, cos, sin);
    attend.pages.window = {up(window_pool), {256 * row_bytes}};
    attend.pages.window_page_bytes = kWindowPageTokens * row_bytes;
    attend.pages.rows = {up(compressed_pool), {kRows * row_bytes}};
    attend.pages.row_bytes = row_bytes;
    attend.pages.rows_per_page = kRows;
    attend.q = {up(test::to_bf16(q)), {tokens, heads, width}};
    attend.selected = {up(selected), {tokens, kTopK}};
    attend.splits = (kWindow + kTopK + gpu::kAttentionSplit - 1) / gpu::kAttentionSplit;
    attend.partial = {zeros<float>(tokens * attend.splits * heads * (width + 2)),
                      {tokens * attend.splits, heads, width + 2}};
    attend.window = kWindow;
    attend.ratio = 1;
    attend.selects = true;
    attend.rope_dim = kRope;
    attend.scale = 1 / std::sqrt(static_cast<float>(width));
    args.sinks = {up(sinks), {heads}};
    args.out = {zeros<bf16>(tokens * heads * width), {tokens, heads, width}};
    args.rope_dim = kRope;
    attend.tokens = tokens;
    kernels().attend(*stream_, attend);
    kernels().attend_merge(*stream_, args);
    const std::vector<float> got = test::to_float(down(args.out.pointer, tokens * heads * width));
    for (int64_t t = 0; t + 1 < tokens; ++t) {
      const int64_t pos = positions[static_cast<size_t>(t)];
      std::vector<const float*> rows;
      for (int64_t p = std::max<int64_t>(0, pos - kWindow + 1); p <= pos; ++p)
        rows.push_back(&raw[static_cast<size_t>(p * width)]);
      for (int64_t i = 0; i < std::min<int64_t>(kTopK, pos + 1); ++i)
        rows.push_back(&compressed[static_cast<size_t>(selected[static_cast<size_t>(t * kTopK + i)] * width)]);
      std::vector<float> expected(static_cast<size_t>(width));
      for (int64_t h = 0; h < heads; ++h) {
        ref::attention(&q[static_cast<size_t>((t * heads + h) * width)], rows.data(), static_cast<int64_t>(rows.size()),
                       width, attend.scale, sinks[static_cast<size_t>(h)], true, expected.data());
        ref::rope(&expected[static_cast<size_t>(width - kRope)], cos.data(), sin.data(), kRope / 2, true, true);
        for (int64_t d = 0; d < width; ++d)
          ASSERT_NEAR(got[static_cast<size_t>((t * heads + h) * width + d)], expected[static_cast<size_t>(d)], 0.02)
              << "token " << t << ", head " << h << ", dim " << d;
      }
    }
    // The last real token alone, in a wave of its own.
    attend.first_token = tokens - 2;
    attend.tokens = 1;
    args.out.pointer = zeros<bf16>(tokens * heads * width);
    kernels().attend(*stream_, attend);
    kernels().attend_merge(*stream_, args);
    const std::vector<float> alone = test::to_float(down(args.out.pointer, tokens * heads * width));
    for (int64_t i = (tokens - 2) * heads * width; i < (tokens - 1) * heads * width; ++i)
      ASSERT_EQ(alone[static_cast<size_t>(i)], got[static_cast<size_t>(i)]);
    // Every third row has a copy, and is nothing where it is at home.
    std::vector<uint8_t> home = compressed_pool, hot(compressed_pool.size());
    std::vector<int32_t> slot_of(kRows + 3, gpu::kNoSlot);
    for (int64_t row = 0; row < kRows; row += 3) {
      const int64_t slot = kRows - 1 - row;
      slot_of[static_cast<size_t>(3 + row)] = static_cast<int32_t>(slot);
      std::copy_n(&compressed_pool[static_cast<size_t>(row * row_bytes)], row_bytes,
                  &hot[static_cast<size_t>(slot * row_bytes)]);
      std::fill_n(&home[static_cast<size_t>(row * row_bytes)], row_bytes, uint8_t{0});
    }
    attend.pages.rows = {up(home), {kRows * row_bytes}};
    attend.pages.hot = {up(hot), {kRows * row_bytes}};
    attend.pages.slot_of = {up(slot_of), {kRows + 3}};
    attend.pages.page_entries = kRows + 3;
    attend.pages.first_entry = 3;
    attend.first_token = 0;
    attend.tokens = tokens;
    kernels().attend(*stream_, attend);
    kernels().attend_merge(*stream_, args);
    EXPECT_EQ(test::to_float(down(args.out.pointer, tokens * heads * width)), got);
  }
}

}  // namespace
}  // namespace thermocline
