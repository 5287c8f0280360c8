// The weights of a DeepSeek-V4 checkpoint: published tensor names to packed tiles and float vectors, in one arena a
// NUMA node. Every matrix is sliced by its rows over the nodes: gate and up of an expert along its intermediate
// dimension, down along the model's, so each node reads a share of every expert and no partial sums cross. Float
// vectors lie on every node; the embedding table, of which a step reads a row a token, on the first. Nothing above this
// folder knows a tensor name. Source: spec section 2.
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels_cpu/moe.h"
#include "runtime/hw/numa_buffer.h"
#include "runtime/io/safetensors.h"
#include "runtime/model/model_geometry.h"

namespace thermocline::deepseek_v4 {

using cpu::ExpertWeights;
using cpu::PackedMatrix;

/// A hyper-connection site: fn [outputs, S D] f32, base [outputs], scale [3] (head: [S, S D], [S], [1]).
struct HcWeights {
  const float* fn = nullptr;
  const float* base = nullptr;
  const float* scale = nullptr;
  const ptrdiff_t* node_offsets = nullptr;  // every node's arena has a copy

  const float* fn_on(int node) const {
    return reinterpret_cast<const float*>(reinterpret_cast<const std::byte*>(fn) +
                                          (node_offsets ? node_offsets[node] : 0));
  }
};

struct CompressorWeights {
  PackedMatrix wkv, wgate;      // [m w, D]
  const float* ape = nullptr;   // [R, m w]
  const float* norm = nullptr;  // [w]
};

struct LayerWeights {
  HcWeights hc_attn, hc_ffn;
  const float* attn_norm = nullptr;  // [D]
  const float* ffn_norm = nullptr;   // [D]

  PackedMatrix wq_a, wq_b, wkv, wo_a, wo_b;
  const float* q_norm = nullptr;       // [Q]
  const float* kv_norm = nullptr;      // [c]
  const float* attn_sink = nullptr;    // [H]
  CompressorWeights compressor;        // ratio > 0
  CompressorWeights index_compressor;  // ratio 4
  PackedMatrix index_wq_b, index_weights_proj;

  PackedMatrix gate;                   // [E, D]
  const float* gate_bias = nullptr;    // [E], learned layers
  const int32_t* tid2eid = nullptr;    // [V, k], hash layers
  std::vector<ExpertWeights> experts;  // E
  ExpertWeights shared_expert;
};

/// The MTP block of preview checkpoints: a whole layer and what feeds it.
struct MtpWeights {
  LayerWeights layer;
  PackedMatrix e_proj, h_proj;
  const float* enorm = nullptr;
  const float* hnorm = nullptr;
  const float* norm = nullptr;
  HcWeights hc_head;
};

struct Weights {
  const uint16_t* embed = nullptr;  // [V, D] bf16, row-major: only rows are read
  PackedMatrix head;                // [V, D]
  const float* norm = nullptr;      // [D]
  HcWeights hc_head;
  std::vector<LayerWeights> layers;
  std::vector<MtpWeights> mtp;          // empty when the checkpoint has none, or a DSpark module instead
  std::vector<NumaBuffer> arenas;       // one a node: what every pointer above points into
  std::vector<ptrdiff_t> node_offsets;  // bytes from the first arena to each
  std::vector<std::string> placement;   // a line an arena: its size, pages, binding, and where move_pages finds it

  /// Bytes every step reads: all but the embedding table and the routed experts.
  uint64_t dense_bytes(const ModelGeometry& geometry) const;
  /// Bytes a decoded token reads at batch 1: the dense ones and k of E experts of every layer (spec 2.2).
  uint64_t bytes_per_token(const ModelGeometry& geometry) const;
  /// Multiplications of weights a token costs: every weight of bytes_per_token once.
  uint64_t macs_per_token(const ModelGeometry& geometry) const;
};

struct LoadOptions {
  ReadMode read_mode = ReadMode::buffered;
  bool mtp = false;            // load the MTP block too
  bool quiet = false;          // no progress on stderr
  int threads = 0;             // 0: as many as cores
  WorkerPool* pool = nullptr;  // whose nodes share the weights, and whose workers touch them first; null: one node

  /// Turned true by any thread: loading ends with ErrorCode::cancelled, at the latest a chunk of 8 MiB a thread later.
  const std::atomic<bool>* cancel = nullptr;
  /// Told the share that is loaded, 0..1 and never falling, after every chunk; by one loading thread at a time.
  std::function<void(double)> progress = {};
};

/// A checkpoint of which only the headers have been read: every tensor is found, its dtype and shape checked, its place
/// in the arenas known. What may refuse a model looks here, before its gigabytes are read.
class WeightLoader {
 public:
  /// Errors: what Checkpoint::open says; corrupt for a missing tensor, a wrong shape or dtype, naming file and tensor.
  static Result<WeightLoader> open(const std::filesystem::path& folder, const ModelGeometry& geometry,
                                   const LoadOptions& options);
  WeightLoader(WeightLoader&&) noexcept;
  WeightLoader& operator=(WeightLoader&&) noexcept;
  ~WeightLoader();

  /// Formats and shapes of what load() gives. Its pointers tell what there is and what is not; none may be read.
  const Weights& shapes() const;
  /// Bytes of all arenas, and of the source chunks that the loading threads hold at most.
  uint64_t arena_bytes() const;
  uint64_t buffer_bytes() const;

  /// Reads, checks and packs; once. Streams: at any time it holds the final weights and buffer_bytes() of source bytes.
  /// A page that lies on another node than it should is a warning, not an error.
  /// Errors: corrupt for an expert id out of range, a NaN scale or weight, each naming file, tensor and offset;
  /// out_of_memory, before anything is read; cancelled.
  Result<std::unique_ptr<Weights>> load();

 private:
  struct Plan;
  explicit WeightLoader(std::unique_ptr<Plan> plan);
  std::unique_ptr<Plan> plan_;
};

/// WeightLoader::open and load() in one.
Result<std::unique_ptr<Weights>> load_weights(const std::filesystem::path& folder, const ModelGeometry& geometry,
                                              const LoadOptions& options);

/// Every tensor of a checkpoint of this geometry in the published layout and dtypes (FP4 experts, FP8 linears), in the
/// order of the published table. For `synth`, and for tests of the count.
std::vector<TensorInfo> published_tensors(const ModelGeometry& geometry);

}  // namespace thermocline::deepseek_v4
