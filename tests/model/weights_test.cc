// Loading weights: what is packed is what was stored, and every lie of a checkpoint is an error with file, tensor,
// offset.
#include "runtime/model/deepseek_v4/weights.h"

#include <functional>

#include "runtime/model/deepseek_v4/config.h"
#include "runtime/model/deepseek_v4/synthesize.h"
#include "tests/support/models.h"

namespace thermocline::deepseek_v4 {
namespace {

const LoadOptions kQuiet = {ReadMode::buffered, true, true, 2};

/// A checkpoint of one shard, with tensors that a test may change before it is written.
class Rewritten {
 public:
  struct Tensor {
    TensorInfo info;
    std::vector<std::byte> bytes;
  };
  explicit Rewritten(const std::filesystem::path& from) {
    test::copy_model(from, dir_.path());
    const Checkpoint checkpoint = Checkpoint::open(from).value();
    for (const auto& [name, info] : checkpoint.tensors()) {
      Tensor tensor{info, std::vector<std::byte>(info.bytes)};
      EXPECT_TRUE(checkpoint.read(info, 0, tensor.bytes).ok());
      tensors[name] = std::move(tensor);
    }
  }
  const std::filesystem::path& write() {
    std::vector<TensorInfo> infos;
    for (const auto& [name, tensor] : tensors) {
      infos.push_back(tensor.info);
      infos.back().name = name;
    }
    for (const char* old :
         {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"})
      std::filesystem::remove(dir_.path() / old);
    SafetensorsWriter writer = SafetensorsWriter::create(dir_.path() / "model.safetensors", infos).value();
    for (const auto& [name, tensor] : tensors) EXPECT_TRUE(writer.write(tensor.bytes).ok());
    EXPECT_TRUE(writer.close().ok());
    return dir_.path();
  }
  std::string error() {
    const std::filesystem::path& folder = write();
    const ModelGeometry geometry = read_config(folder).value();
    const auto weights = load_weights(folder, geometry, kQuiet);
    return weights ? "" : weights.error().message;
  }
  std::map<std::string, Tensor> tensors;

 private:
  test::TempDir dir_;
};

TEST(Weights, LoadingTellsHowFarItIsAndStopsWhenAsked) {
  const std::filesystem::path folder = test::golden("tiny-csa");
  const ModelGeometry g = read_config(folder).value();
  LoadOptions options = kQuiet;
  std::vector<double> shares;
  options.progress = [&](double share) { shares.push_back(share); };
  ASSERT_TRUE(load_weights(folder, g, options));
  ASSERT_GE(shares.size(), 3u);
  EXPECT_TRUE(std::is_sorted(shares.begin(), shares.end()));
  EXPECT_GT(shares.front(), 0);
  EXPECT_LT(shares.front(), 0.5);
  EXPECT_EQ(shares.back(), 1);

  // Cancelled in its middle: what is told afterwards was under way, a chunk a thread.
  std::atomic<bool> cancel{false};
  size_t told_after = 0;
  options.threads = 1;  // two loading threads
  options.cancel = &cancel;
  options.progress = [&](double share) {
    told_after += cancel;
    if (share > 0.3) cancel = true;
  };
  const auto stopped = load_weights(folder, g, options);
  ASSERT_FALSE(stopped);
  EXPECT_EQ(stopped.error().code, ErrorCode::cancelled);
  EXPECT_LE(told_after, 4u) << "a tensor and its scales, of each thread";

  size_t told = 0;  // cancel is true already: nothing is read
  options.progress = [&](double) { ++told; };
  EXPECT_EQ(load_weights(folder, g, options).error().code, ErrorCode::cancelled);
  EXPECT_EQ(told, 0u);
}

// What a loader says before it reads is what it allocates, on any number of nodes.
TEST(Weights, ThePlanIsWhatIsAllocated) {
  const std::filesystem::path folder = test::golden("tiny-csa");
  const ModelGeometry g = read_config(folder).value();
  for (const char* machine : {"node:1 core:2 pu:1", "node:2 core:2 pu:1"}) {
    WorkerPool pool(read_topology(machine).value(), 2);
    LoadOptions options = kQuiet;
    options.pool = &pool;
    WeightLoader loader = WeightLoader::open(folder, g, options).value();
    const uint64_t planned = loader.arena_bytes();
    EXPECT_EQ(loader.shapes().layers[1].experts[3].w2.format, cpu::WeightFormat::mxfp4);
    EXPECT_EQ(loader.shapes().layers[1].tid2eid == nullptr, !g.is_hash_layer(1));
    const auto weights = loader.load().value();
    uint64_t allocated = 0;
    for (const NumaBuffer& arena : weights->arenas) allocated += arena.size();
    EXPECT_EQ(allocated, planned) << machine;
  }
}

TEST(Weights, PackedValuesAreTheStoredOnes) {
  const std::filesystem::path folder = test::golden("tiny-csa");
  const ModelGeometry g = read_config(folder).value();
  for (const ReadMode mode : {ReadMode::buffered, ReadMode::direct}) {
    const auto weights = load_weights(folder, g, {mode, true, true, 3}).value();
    const Checkpoint checkpoint = Checkpoint::open(folder).value();
    const auto bytes = [&](const std::string& name) {
      std::vector<std::byte> out(checkpoint.find(name)->bytes);
      EXPECT_TRUE(checkpoint.read(*checkpoint.find(name), 0, out).ok());
      return out;
    };
    const auto w2 = bytes("layers.1.ffn.experts.3.w2.weight"), w2_scale = bytes("layers.1.ffn.experts.3.w2.scale");
    const cpu::PackedMatrix& m = weights->layers[1].experts[3].w2;
    for (int64_t n = 0; n < m.n; n += 7)
      for (int64_t k = 0; k < m.k; ++k) {
        const float value =
            kE2m1[(static_cast<int>(w2[static_cast<size_t>(n * m.k / 2 + k / 2)]) >> (4 * (k % 2))) & 15];
        ASSERT_EQ(packed_element(m, n, k),
                  value * e8m0_to_float(static_cast<uint8_t>(w2_scale[static_cast<size_t>(n * m.k / 32 + k / 32)])));
      }
    const auto wq = bytes("layers.1.attn.wq_b.weight"), wq_scale = bytes("layers.1.attn.wq_b.scale");
    const cpu::PackedMatrix& q = weights->layers[1].wq_b;
    for (int64_t n = 0; n < q.n; n += 37)
      for (int64_t k = 0; k < q.k; ++k)
        ASSERT_EQ(packed_element(q, n, k),
                  e4m3_to_float(static_cast<uint8_t>(wq[static_cast<size_t>(n * q.k + k)])) *
                      e8m0_to_float(static_cast<uint8_t>(
                          wq_scale[static_cast<size_t>(n / 128 * ((q.k + 127) / 128) + k / 128)])));
    EXPECT_EQ(weights->mtp.size(), 1u);
    EXPECT_GT(weights->bytes_per_token(g), weights->dense_bytes(g));
  }
}

using Change = std::function<void(std::map<std::string, Rewritten::Tensor>&)>;

TEST(Weights, EveryLieIsNamed) {
  const std::string w1 = "layers.0.ffn.experts.2.w1";
  const std::pair<Change, std::vector<const char*>> cases[] = {
      {[&](auto& t) { t.erase("norm.weight"); }, {"norm.weight", "missing"}},
      {[&](auto& t) { t.erase(w1 + ".scale"); }, {"layers.0.ffn.experts.2.w1.scale", "missing"}},
      {[&](auto& t) {
         t["norm.weight"].info.dtype = DType::i32;
         t["norm.weight"].info.shape[0] /= 2;
       },
       {"norm.weight", "offset", "I32"}},
      {[&](auto& t) { t[w1 + ".weight"].info.dtype = DType::f8_e4m3; }, {w1.c_str(), "offset", "shape"}},
      {[&](auto& t) {
         t[w1 + ".weight"].info.shape = {64, 256};
       },
       {w1.c_str(), "offset", "[64, 256]"}},
      {[&](auto& t) { t[w1 + ".scale"].bytes[5] = std::byte{255}; }, {"w1.scale", "not finite", "byte"}},
      {[&](auto& t) { t["layers.1.attn.wq_a.weight"].bytes[77] = std::byte{0x7f}; },
       {"wq_a.weight", "not finite", "byte"}},
      {[&](auto& t) {
         t["head.weight"].bytes[1] = std::byte{0x7f};
         t["head.weight"].bytes[0] = std::byte{0xc0};
       },
       {"head.weight", "not finite"}},
      {[&](auto& t) {
         t["embed.weight"].bytes[3] = std::byte{0xff};
         t["embed.weight"].bytes[2] = std::byte{0x80};
       },
       {"embed.weight", "not finite"}},
      {[&](auto& t) { t["layers.0.ffn.gate.tid2eid"].bytes[8] = std::byte{16}; }, {"tid2eid", "expert id 16", "byte"}},
      {[&](auto& t) { t["layers.0.ffn.gate.tid2eid"].bytes[15] = std::byte{0x80}; }, {"tid2eid", "expert id -"}},
      {[&](auto& t) {
         t["layers.0.hc_attn_fn"].bytes[3] = std::byte{0x7f};
         t["layers.0.hc_attn_fn"].bytes[2] = std::byte{0xc0};
       },
       {"hc_attn_fn", "not finite"}},
      {[&](auto& t) {
         t["layers.0.attn.attn_sink"].info.shape = {2, 2};
       },
       {"attn_sink", "[2, 2]", "[4]"}},
      {[&](auto& t) {
         t["mtp.0.enorm.weight"].info.dtype = DType::i8;
         t["mtp.0.enorm.weight"].info.shape = {512};
       },
       {"mtp.0.enorm.weight"}},
      {[&](auto& t) { t["layers.99.attn.wq_a.weight"] = t["norm.weight"]; }, {"layers.99.", "num_hidden_layers"}},
      {[&](auto& t) { t["layers.0.attn.compressor.extra"] = t["norm.weight"]; }, {"layers.0.attn.compressor.extra"}},
      {[&](auto& t) { t["layers.0.attn.wq_b.bias"] = t["norm.weight"]; }, {"layers.0.attn.wq_b.bias", "no such part"}},
      {[&](auto& t) { t["layers.0.ffn.experts.99.w1.weight"] = t["norm.weight"]; },
       {"layers.0.ffn.experts.99.w1.weight", "no such part"}},
      {[&](auto& t) { t["head.bias"] = t["norm.weight"]; }, {"head.bias", "no such part"}},
  };
  for (const auto& [change, expected] : cases) {
    Rewritten checkpoint(test::golden("tiny-csa"));
    change(checkpoint.tensors);
    const std::string error = checkpoint.error();
    for (const char* part : expected)
      EXPECT_NE(error.find(part), std::string::npos) << "'" << part << "' is not in: " << error;
  }
}

TEST(Weights, TensorsOfNobodysLayersAreLeftAlone) {
  Rewritten checkpoint(test::golden("tiny-csa"));
  for (const char* name : {"layers.-99999999999.attn.compressor.evil", "layers.-1.attn.compressor.evil",
                           "layers..attn.indexer.x", "layers.1x.attn.indexer.x", "layers.1", "layers."})
    checkpoint.tensors[name] = checkpoint.tensors["norm.weight"];
  EXPECT_EQ(checkpoint.error(), "");
}

// -Base checkpoints: FP8 experts with 128 x 128 blocks, every scale F32. The same weights must give the same logits.
TEST(Weights, BaseDtypesAreRead) {
  Rewritten checkpoint(test::golden("tiny-csa"));
  for (auto& [name, tensor] : checkpoint.tensors) {
    if (tensor.info.dtype != DType::f8_e8m0) continue;
    std::vector<std::byte> wide(tensor.bytes.size() * 4);
    for (size_t i = 0; i < tensor.bytes.size(); ++i) {
      const float value = e8m0_to_float(static_cast<uint8_t>(tensor.bytes[i]));
      std::memcpy(&wide[4 * i], &value, 4);
    }
    tensor.bytes = wide;
    tensor.info.dtype = DType::f32;
  }
  const test::TensorFile golden(test::golden("tiny-csa") / "golden.safetensors");
  std::vector<int32_t> ids = golden.ids("ids");
  ids.resize(100);
  for (const Isa isa : test::isas()) {
    const Numerics numerics = Numerics::bf16;
    const auto original = test::open_engine({.folder = test::golden("tiny-csa"), .numerics = numerics, .isa = isa});
    const auto wide = test::open_engine({.folder = checkpoint.write(), .numerics = numerics, .isa = isa});
    EXPECT_EQ(test::run_logits(*wide, ids, 64).logits, test::run_logits(*original, ids, 64).logits) << isa_name(isa);
  }
}

// Experts in FP8 blocks: the codes of the same numbers, under one scale, must give what the FP4 ones give.
TEST(Weights, Fp8ExpertsAreRead) {
  Rewritten fp4(test::golden("tiny-csa")), fp8(test::golden("tiny-csa"));
  for (auto& [name, tensor] : fp4.tensors) {
    if (tensor.info.dtype != DType::i8) continue;
    const std::string scale_name = name.substr(0, name.size() - 6) + "scale";
    std::fill(fp4.tensors[scale_name].bytes.begin(), fp4.tensors[scale_name].bytes.end(), std::byte{127 - 4});
    Rewritten::Tensor &weight = fp8.tensors[name], &scale = fp8.tensors[scale_name];
    weight.bytes.clear();
    for (const std::byte b : tensor.bytes)
      for (const int nibble : {static_cast<int>(b) & 15, static_cast<int>(b) >> 4})
        weight.bytes.push_back(std::byte{float_to_e4m3(kE2m1[nibble])});
    weight.info.dtype = DType::f8_e4m3;
    weight.info.shape[1] *= 2;
    scale.info.shape = {(weight.info.shape[0] + 127) / 128, (weight.info.shape[1] + 127) / 128};
    scale.info.dtype = DType::f32;
    scale.bytes.resize(static_cast<size_t>(scale.info.elements()) * 4);
    const float value = 0x1p-4f;
    for (int64_t i = 0; i < scale.info.elements(); ++i)
      std::memcpy(&scale.bytes[static_cast<size_t>(4 * i)], &value, 4);
  }
  std::vector<int32_t> ids = test::TensorFile(test::golden("tiny-csa") / "golden.safetensors").ids("ids");
  ids.resize(60);
  const auto logits = [&](Rewritten& checkpoint) {
    const auto engine = test::open_engine({.folder = checkpoint.write(), .numerics = Numerics::fp32});
    return test::run_logits(*engine, ids, 64).logits;
  };
  const std::vector<float> expected = logits(fp4), actual = logits(fp8);
  EXPECT_LT(test::max_difference(actual, expected, expected.size()), 2e-3);
}

TEST(Synthesize, SameSeedSameBytesAndFiniteActivations) {
  const test::TempDir dir;
  const ModelGeometry g = published_geometry("demo", 4).value();
  for (const char* name : {"a", "b"})
    ASSERT_TRUE(synthesize(g, dir.path() / name, {.seed = 5, .shard_bytes = 3 << 20, .quiet = true}).ok());
  ASSERT_TRUE(synthesize(g, dir.path() / "c", {.seed = 6, .shard_bytes = 3 << 20, .quiet = true}).ok());
  const auto first_shard = [&](const char* name) {
    for (const auto& entry : std::filesystem::directory_iterator(dir.path() / name))
      if (entry.path().filename().string().starts_with("model-00001")) return read_text_file(entry.path()).value();
    return std::string();
  };
  EXPECT_EQ(first_shard("a"), first_shard("b"));
  EXPECT_NE(first_shard("a"), first_shard("c"));
  EXPECT_FALSE(synthesize(g, dir.path() / "a", {.quiet = true}).ok()) << "an existing checkpoint was overwritten";
  const auto engine = test::open_engine({.folder = dir.path() / "a"});
  std::vector<int32_t> ids;
  for (int i = 0; i < 150; ++i) ids.push_back(i * 7 % 4096);
  const std::vector<float> logits = test::run_logits(*engine, ids, 64).logits;
  double squares = 0;
  for (const float x : logits) {
    ASSERT_TRUE(std::isfinite(x));
    squares += x * x;
  }
  const double spread = std::sqrt(squares / static_cast<double>(logits.size()));
  EXPECT_GT(spread, 0.5);
  EXPECT_LT(spread, 10);
}

}  // namespace
}  // namespace thermocline::deepseek_v4
