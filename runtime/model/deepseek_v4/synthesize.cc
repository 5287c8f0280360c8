#include "runtime/model/deepseek_v4/synthesize.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <future>
#include <tuple>

#include "runtime/base/number_formats.h"
#include "runtime/hw/uneven_work.h"
#include "runtime/io/json_document.h"
#include "runtime/io/progress.h"
#include "runtime/io/safetensors.h"
#include "runtime/model/deepseek_v4/config.h"
#include "runtime/model/deepseek_v4/weights.h"

namespace thermocline::deepseek_v4 {
namespace {

constexpr int64_t kBlockBytes = 1 << 20;    // bytes that one random stream fills
constexpr int64_t kBufferBytes = 64 << 20;  // one buffer is filled while the other is written

/// splitmix64: good enough for weights, and any block can start anywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  /// Uniform with mean 0 and variance 1.
  float unit() { return (static_cast<float>(next() >> 40) * 0x1p-23f - 1.0f) * 1.7320508f; }

 private:
  uint64_t state_;
};

/// How the elements of one tensor are drawn: mean + deviation * uniform, or raw codes.
struct Recipe {
  enum class Kind { values, fp4_codes, fp8_codes, scale_bytes, experts, streams_base } kind = Kind::values;
  float mean = 0, deviation = 1;
  uint8_t scale_byte = 127;
};

double fp8_rms() {
  double sum = 0;
  for (int code = 0; code < 0x7f; ++code) sum += std::pow(e4m3_to_float(static_cast<uint8_t>(code)), 2);
  return std::sqrt(sum / 0x7f);
}

// The power of two that brings random codes of root mean square `rms` nearest to 1 / sqrt(k).
uint8_t scale_byte_for(double rms, int64_t k) {
  return static_cast<uint8_t>(127 + std::lround(std::log2(1 / (rms * std::sqrt(static_cast<double>(k))))));
}

bool ends_with(const std::string& name, const char* tail) { return name.ends_with(tail); }

Recipe recipe_for(const ModelGeometry& g, const TensorInfo& tensor, const TensorInfo* weight_of_scale) {
  using Kind = Recipe::Kind;
  const std::string& name = tensor.name;
  const float fan_in = tensor.shape.size() == 2 ? 1.0f / std::sqrt(static_cast<float>(tensor.shape[1])) : 1.0f;
  if (tensor.dtype == DType::i8) return {Kind::fp4_codes};
  if (tensor.dtype == DType::f8_e4m3) return {Kind::fp8_codes};
  if (tensor.dtype == DType::f8_e8m0) {
    const bool fp4 = weight_of_scale->dtype == DType::i8;
    double squares = 0;
    for (int code = 0; code < 8; ++code) squares += kE2m1[code] * kE2m1[code] / 8;
    return {Kind::scale_bytes, 0, 1,
            scale_byte_for(fp4 ? std::sqrt(squares) : fp8_rms(), weight_of_scale->shape[1] * (fp4 ? 2 : 1))};
  }
  if (tensor.dtype == DType::i64) return {Kind::experts};
  if (ends_with(name, "norm.weight")) return {Kind::values, 1.0f, 0.2f};
  if (ends_with(name, "_scale")) return {Kind::values, 0.8f, 0.1f};
  if (ends_with(name, "head_base"))
    return {Kind::values, -std::log(std::max(1.0f, static_cast<float>(g.hc_mult - 1))), 0.5f};
  if (ends_with(name, "_base")) return {Kind::streams_base};
  if (ends_with(name, ".ape")) return {Kind::values, 0, 0.5f};
  if (ends_with(name, "gate.bias")) return {Kind::values, 0, 0.1f};
  if (name == "embed.weight" || ends_with(name, "attn_sink")) return {Kind::values, 0, 1};
  if (name == "head.weight") return {Kind::values, 0, 2.5f * fan_in};
  return {Kind::values, 0, fan_in};
}

// pre near 1/S, post near 1, comb near the identity: streams neither vanish nor grow.
float base_mean(const ModelGeometry& g, int64_t i) {
  const int64_t s = g.hc_mult;
  if (i < s) return -std::log(std::max(1.0f, static_cast<float>(s - 1)));
  if (i < 2 * s) return 0;
  return (i - 2 * s) / s == (i - 2 * s) % s ? 3.0f : 0.0f;
}

void fill_values(const ModelGeometry& g, const TensorInfo& tensor, const Recipe& recipe, Random& random, int64_t first,
                 int64_t count, std::byte* out) {
  for (int64_t i = 0; i < count; ++i) {
    const bool base = recipe.kind == Recipe::Kind::streams_base;
    const float value =
        base ? base_mean(g, first + i) + 0.5f * random.unit() : recipe.mean + recipe.deviation * random.unit();
    if (tensor.dtype == DType::bf16) {
      const bf16 word = float_to_bf16(value);
      std::memcpy(out + i * 2, &word, 2);
    } else {
      std::memcpy(out + i * 4, &value, 4);
    }
  }
}

// Distinct experts for each token, `first` and `count` in ids.
void fill_experts(const ModelGeometry& g, Random& random, int64_t first, int64_t count, std::byte* out) {
  int64_t* ids = reinterpret_cast<int64_t*>(out);
  const int64_t k = g.n_activated_experts;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t in_row = (first + i) % k, begin = std::max<int64_t>(0, i - in_row);
    do ids[i] = static_cast<int64_t>(random.next() % static_cast<uint64_t>(g.n_routed_experts));
    while (std::find(ids + begin, ids + i, ids[i]) != ids + i);
  }
}

void fill_block(const ModelGeometry& g, const TensorInfo& tensor, const Recipe& recipe, uint64_t seed, int64_t offset,
                std::byte* out, int64_t bytes) {
  Random random(seed + static_cast<uint64_t>(offset) * 0x2545f4914f6cdd1du);
  switch (recipe.kind) {
    case Recipe::Kind::values:
    case Recipe::Kind::streams_base:
      return fill_values(g, tensor, recipe, random, offset / dtype_bytes(tensor.dtype),
                         bytes / dtype_bytes(tensor.dtype), out);
    case Recipe::Kind::experts:
      return fill_experts(g, random, offset / 8, bytes / 8, out);
    case Recipe::Kind::scale_bytes:
      for (int64_t i = 0; i < bytes; ++i)
        out[i] = std::byte(recipe.scale_byte - static_cast<uint8_t>(random.next() >> 63));
      return;
    default:
      break;
  }
  for (int64_t i = 0; i < bytes; i += 8) {
    uint64_t word = random.next();
    if (recipe.kind == Recipe::Kind::fp8_codes) {  // 0x7f and 0xff are NaN: there bit 0 is cleared
      const uint64_t ones = (word & 0x7f7f7f7f7f7f7f7fu) + 0x0101010101010101u;
      word &= ~((ones & 0x8080808080808080u) >> 7);
    }
    std::memcpy(out + i, &word, static_cast<size_t>(std::min<int64_t>(8, bytes - i)));
  }
}

ModelGeometry flash_geometry() {
  ModelGeometry g;
  g.vocab_size = 129280;
  g.dim = 4096;
  g.n_layers = 43;
  g.n_heads = 64;
  g.head_dim = 512;
  g.rope_head_dim = 64;
  g.q_lora_rank = 1024;
  g.o_lora_rank = 1024;
  g.o_groups = 8;
  g.window_size = 128;
  g.index_n_heads = 64;
  g.index_head_dim = 128;
  g.index_topk = 512;
  g.n_routed_experts = 256;
  g.n_activated_experts = 6;
  g.moe_inter_dim = 2048;
  g.n_hash_layers = 3;
  g.route_scale = 1.5f;
  g.swiglu_limit = 10.0f;
  g.hc_mult = 4;
  g.hc_sinkhorn_iters = 20;
  g.hc_eps = 1e-6f;
  g.norm_eps = 1e-6f;
  g.rope_theta = 10000;
  g.compress_rope_theta = 160000;
  g.rope_factor = 16;
  g.original_seq_len = 65536;
  g.beta_fast = 32;
  g.beta_slow = 1;
  g.max_position_embeddings = 1048576;
  g.bos_token_id = 0;
  g.eos_token_id = 1;
  g.compress_ratios = {0, 0};
  for (int i = 2; i < g.n_layers; ++i) g.compress_ratios.push_back(i % 2 == 0 ? 4 : 128);
  return g;
}

ModelGeometry pro_geometry() {
  ModelGeometry g = flash_geometry();
  g.dim = 7168;
  g.n_layers = 61;
  g.n_heads = 128;
  g.q_lora_rank = 1536;
  g.o_groups = 16;
  g.index_topk = 1024;
  g.n_routed_experts = 384;
  g.moe_inter_dim = 3072;
  g.route_scale = 2.5f;
  g.compress_ratios = {128, 128};
  for (int i = 2; i < g.n_layers; ++i) g.compress_ratios.push_back(i % 2 == 0 ? 4 : 128);
  return g;
}

ModelGeometry demo_geometry() {
  ModelGeometry g = flash_geometry();
  g.vocab_size = 4096;
  g.dim = 256;
  g.n_layers = 6;
  g.n_heads = 8;
  g.head_dim = 128;
  g.q_lora_rank = 128;
  g.o_lora_rank = 128;
  g.o_groups = 2;
  g.window_size = 64;
  g.index_n_heads = 8;
  g.index_head_dim = 64;
  g.index_topk = 32;
  g.n_routed_experts = 32;
  g.n_activated_experts = 4;
  g.moe_inter_dim = 128;
  g.n_hash_layers = 2;
  g.max_position_embeddings = 4096;
  g.compress_ratios = {0, 0, 4, 128, 4, 128};
  return g;
}

// What a layer's weights and the head's come from, but for the number of routed experts.
auto shapes_of(const ModelGeometry& g) {
  return std::tie(g.vocab_size, g.dim, g.n_heads, g.head_dim, g.rope_head_dim, g.q_lora_rank, g.o_lora_rank, g.o_groups,
                  g.window_size, g.index_n_heads, g.index_head_dim, g.index_topk, g.n_activated_experts,
                  g.moe_inter_dim, g.hc_mult);
}

bool begins_with(const ModelGeometry& whole, const ModelGeometry& slice) {
  const auto ratios = slice.compress_ratios.begin();
  return slice.n_layers < whole.n_layers && slice.n_routed_experts <= whole.n_routed_experts &&
         shapes_of(slice) == shapes_of(whole) &&
         std::equal(ratios, ratios + slice.n_layers, whole.compress_ratios.begin());
}

/// Writes one tensor after another: a buffer is filled by all cores while the one before goes to the disk.
class ShardStream {
 public:
  ShardStream(const ModelGeometry& geometry, SafetensorsWriter& writer, Progress& progress)
      : g_(geometry), writer_(writer), progress_(progress) {}

  Status write(const TensorInfo& tensor, const Recipe& recipe, uint64_t seed) {
    const int64_t total = static_cast<int64_t>(tensor.bytes);
    // Blocks of an expert table hold whole rows, so that a row's experts can be told apart.
    const int64_t row = recipe.kind == Recipe::Kind::experts ? 8 * g_.n_activated_experts : 8;
    const int64_t block = kBlockBytes / row * row, buffer_bytes = kBufferBytes / block * block;
    for (int64_t begin = 0; begin < total; begin += buffer_bytes) {
      const int64_t bytes = std::min(buffer_bytes, total - begin);
      std::vector<std::byte>& buffer = buffers_[next_ ^= 1];
      buffer.resize(static_cast<size_t>(bytes));
      for_each_uneven((bytes + block - 1) / block, 0, [&](int64_t i, int) {
        fill_block(g_, tensor, recipe, seed, begin + i * block, buffer.data() + i * block,
                   std::min(block, bytes - i * block));
      });
      TC_RETURN_IF_ERROR(finish());
      writing_ = std::async(std::launch::async, [this, &buffer] { return writer_.write(buffer); });
      progress_.add(static_cast<uint64_t>(bytes));
    }
    return {};
  }
  Status finish() { return writing_.valid() ? writing_.get() : Status(); }

 private:
  const ModelGeometry& g_;
  SafetensorsWriter& writer_;
  Progress& progress_;
  std::vector<std::byte> buffers_[2];
  std::future<Status> writing_;
  int next_ = 0;
};

}  // namespace

Result<ModelGeometry> published_geometry(const std::string& name, int layers, int experts) {
  const bool folder = name.find('/') != std::string::npos || std::filesystem::is_directory(name);
  if (!folder && name != "v4-flash" && name != "v4-pro" && name != "demo")
    return invalid("--like '" + name + "' is none of v4-flash, v4-pro, demo, nor a folder");
  ModelGeometry g = name == "v4-flash" ? flash_geometry() : name == "v4-pro" ? pro_geometry() : demo_geometry();
  if (folder) {
    TC_ASSIGN(g, read_config(name));
    g.n_mtp_layers = 0;
  }
  if (layers < 0 || layers > g.n_layers)
    return invalid("--layers " + std::to_string(layers) + " is outside 0.." + std::to_string(g.n_layers) +
                   ", the layers of " + name);
  if (layers > 0) {
    g.n_layers = layers;
    g.compress_ratios.resize(static_cast<size_t>(layers));
    g.n_hash_layers = std::min(g.n_hash_layers, layers);
  }
  if (experts != 0 && (experts < g.n_activated_experts || experts > g.n_routed_experts))
    return invalid("--experts " + std::to_string(experts) + " is outside " + std::to_string(g.n_activated_experts) +
                   ".." + std::to_string(g.n_routed_experts) + ", from those of a token to all of a layer of " + name);
  if (experts > 0) g.n_routed_experts = experts;
  return g;
}

std::optional<ModelGeometry> published_whole(const ModelGeometry& slice) {
  for (const auto& geometry : {flash_geometry, pro_geometry, demo_geometry})
    if (ModelGeometry whole = geometry(); begins_with(whole, slice)) return whole;
  return std::nullopt;
}

Status synthesize(const ModelGeometry& geometry, const std::filesystem::path& folder,
                  const SynthesizeOptions& options) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) return Error{ErrorCode::io, "creating " + folder.string() + ": " + error.message()};
  const std::filesystem::path index_path = folder / "model.safetensors.index.json";
  if (std::filesystem::exists(index_path, error))
    return invalid(folder.string() + " already holds a checkpoint: choose another folder or remove it");

  const std::vector<TensorInfo> tensors = published_tensors(geometry);
  uint64_t total = 0;
  for (const TensorInfo& tensor : tensors) total += tensor.bytes;
  const size_t shards = static_cast<size_t>((total + options.shard_bytes - 1) / options.shard_bytes);
  std::vector<std::vector<TensorInfo>> by_shard(shards);
  uint64_t seen = 0;
  for (const TensorInfo& tensor : tensors) {
    by_shard[std::min<size_t>(shards - 1, static_cast<size_t>(seen / options.shard_bytes))].push_back(tensor);
    seen += tensor.bytes;
  }

  SortedJson weight_map;
  Progress progress("writing " + folder.string(), total, options.quiet);
  uint64_t tensor_number = 0;
  for (size_t shard = 0; shard < shards; ++shard) {
    const std::string name = fmt::format("model-{:05}-of-{:05}.safetensors", shard + 1, shards);
    TC_ASSIGN(SafetensorsWriter writer, SafetensorsWriter::create(folder / name, by_shard[shard]));
    ShardStream stream(geometry, writer, progress);
    const TensorInfo* previous = nullptr;  // a scale follows its weight
    Status status;
    for (const TensorInfo& tensor : by_shard[shard]) {
      if (tensor.dtype == DType::f8_e8m0 && !previous) previous = &tensors[static_cast<size_t>(tensor_number) - 1];
      status = stream.write(tensor, recipe_for(geometry, tensor, previous), options.seed * 1000003 + tensor_number++);
      if (!status.ok()) break;
      weight_map[tensor.name] = name;
      previous = &tensor;
    }
    Status written = stream.finish();
    TC_RETURN_IF_ERROR(std::move(status));
    TC_RETURN_IF_ERROR(std::move(written));
    TC_RETURN_IF_ERROR(writer.close());
  }
  TC_RETURN_IF_ERROR(write_text_file(folder / "config.json", config_json(geometry)));
  TC_RETURN_IF_ERROR(write_text_file(folder / "generation_config.json",
                                     "{\"do_sample\": true, \"temperature\": 1.0, \"top_p\": 1.0}\n"));
  const SortedJson index = {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
  return write_text_file(index_path, dump_json(index, 1) + "\n");
}

}  // namespace thermocline::deepseek_v4
