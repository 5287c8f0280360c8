#include "runtime/model/deepseek_v4/weights.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cmath>
#include <cstring>
#include <mutex>
#include <set>

#include <fmt/format.h>

#include "runtime/base/log.h"
#include "runtime/base/number_formats.h"
#include "runtime/hw/topology.h"
#include "runtime/hw/uneven_work.h"
#include "runtime/io/progress.h"
#include "runtime/model/deepseek_v4/tensor_visitor.h"

namespace thermocline::deepseek_v4 {
namespace {

using cpu::kTileRows;
using cpu::PackedShape;
using cpu::ScaleFormat;
using cpu::WeightFormat;

constexpr int64_t kSourceChunkBytes = 8 << 20;  // source bytes a loading thread holds at a time

uint64_t align_up(uint64_t bytes) { return (bytes + 63) / 64 * 64; }

Error tensor_error(const Checkpoint& checkpoint, const TensorInfo& tensor, const std::string& text) {
  return corrupt(checkpoint.where(tensor) + ": " + text);
}

std::string position(const TensorInfo& tensor, uint64_t byte) {
  return " at byte " + std::to_string(tensor.begin + byte) + " of the file";
}

/// One tensor (with its scales) on its way into the arenas. Chunks of row groups can be loaded in any order.
struct PackJob {
  const TensorInfo* weight = nullptr;
  const TensorInfo* scale = nullptr;
  PackedMatrix* matrix = nullptr;
  uint64_t offset = 0;  // in every arena; the scales of a slice follow its tiles
};

// Bytes of a slice's tiles in an arena.
uint64_t slice_tile_bytes(const PackedMatrix& m) {
  return align_up(static_cast<uint64_t>(m.slice_groups() * m.group_tile_bytes()));
}

struct CopyJob {
  enum class Kind { floats, ids, bf16_rows } kind = Kind::floats;
  const TensorInfo* source = nullptr;
  const void** target = nullptr;
  uint64_t offset = 0;   // in every arena, or in the first one's tail
  int64_t id_limit = 0;  // ids: below this
};

/// First pass: finds every tensor, checks dtype and shape, gives it a place in the arenas. All arenas begin alike, with
/// slices and float vectors; what only the first one holds comes after.
class Binder {
 public:
  Binder(const Checkpoint& checkpoint, const ModelGeometry& geometry, int nodes)
      : checkpoint_(checkpoint), g_(geometry), nodes_(nodes) {}

  Status linear(const std::string& name, Stored, int64_t n, int64_t k, PackedMatrix& matrix) {
    TC_ASSIGN(const TensorInfo* weight, find(name + ".weight"));
    PackedShape shape;
    shape.n = n;
    shape.k = k;
    std::vector<int64_t> stored = {n, k};
    switch (weight->dtype) {
      case DType::bf16:
        shape.format = WeightFormat::bf16;
        break;
      case DType::f8_e4m3:
        shape.format = WeightFormat::fp8;
        break;
      case DType::i8:
        shape.format = WeightFormat::mxfp4;
        if (k % 32 != 0)
          return tensor_error(checkpoint_, *weight,
                              "FP4 weights need a multiple of 32 columns, not " + std::to_string(k));
        stored[1] = k / 2;
        break;
      default:
        return tensor_error(
            checkpoint_, *weight,
            "dtype " + std::string(dtype_name(weight->dtype)) + " is none of BF16, F8_E4M3, I8 (packed FP4)");
    }
    TC_RETURN_IF_ERROR(check_shape(*weight, stored));
    const TensorInfo* scale = nullptr;
    if (shape.format != WeightFormat::bf16) {
      TC_ASSIGN(scale, bind_scale(name + ".scale", shape));
    }
    static_cast<PackedShape&>(matrix) = shape;
    const int64_t unit = name.ends_with(".w1") || name.ends_with(".w3") ? cpu::kMoeUnit : 1;
    matrix.nodes = nodes_;
    matrix.groups_per_node = (shape.row_groups() + nodes_ * unit - 1) / (nodes_ * unit) * unit;
    packs_.push_back({weight, scale, &matrix, common_bytes_});
    common_bytes_ +=
        slice_tile_bytes(matrix) + align_up(static_cast<uint64_t>(matrix.slice_groups() * matrix.group_scale_bytes()));
    source_bytes_ += weight->bytes + (scale ? scale->bytes : 0);
    return {};
  }

  Status floats(const std::string& name, DType, const std::vector<int64_t>& shape, const float*& out) {
    TC_ASSIGN(const TensorInfo* tensor, find(name));
    if (tensor->dtype != DType::f32 && tensor->dtype != DType::bf16 && tensor->dtype != DType::f16)
      return tensor_error(checkpoint_, *tensor,
                          "dtype " + std::string(dtype_name(tensor->dtype)) + " is none of F32, BF16, F16");
    return copy(CopyJob::Kind::floats, *tensor, shape, reinterpret_cast<const void**>(&out), 4, 0);
  }

  Status ids(const std::string& name, const std::vector<int64_t>& shape, const int32_t*& out) {
    TC_ASSIGN(const TensorInfo* tensor, find(name));
    if (tensor->dtype != DType::i64 && tensor->dtype != DType::i32)
      return tensor_error(checkpoint_, *tensor,
                          "dtype " + std::string(dtype_name(tensor->dtype)) + " is neither I64 nor I32");
    return copy(CopyJob::Kind::ids, *tensor, shape, reinterpret_cast<const void**>(&out), 4, g_.n_routed_experts);
  }

  Status rows(const std::string& name, const std::vector<int64_t>& shape, const uint16_t*& out) {
    TC_ASSIGN(const TensorInfo* tensor, find(name));
    if (tensor->dtype != DType::bf16)
      return tensor_error(checkpoint_, *tensor, "dtype " + std::string(dtype_name(tensor->dtype)) + " is not BF16");
    return copy(CopyJob::Kind::bf16_rows, *tensor, shape, reinterpret_cast<const void**>(&out), 2, 0);
  }

  /// Whether what is left over says that config.json is another model's: whole layers, or parts of one that change what
  /// it computes. Others, of MTP blocks or of later releases, are none of ours.
  static constexpr const char* kNoSuchPart =
      "a model of this config.json has no such part: its answers would be another's";
  Status check_left_over() const {
    for (const auto& [name, tensor] : checkpoint_.tensors()) {
      if (used_.contains(&tensor)) continue;
      for (const std::string_view part : {"embed.", "head.", "norm."})
        if (name.starts_with(part)) return tensor_error(checkpoint_, tensor, kNoSuchPart);
      if (!name.starts_with("layers.")) continue;
      int layer = -1;
      const char* const end = name.data() + name.size();
      const auto [dot, error] = std::from_chars(name.data() + 7, end, layer);
      if (error != std::errc() || dot == end || *dot != '.' || layer < 0) continue;  // nobody's
      if (layer >= g_.n_layers)
        return tensor_error(checkpoint_, tensor,
                            "config.json has " + std::to_string(g_.n_layers) + " layers (num_hidden_layers)");
      if (name.find(".compressor.") != std::string::npos || name.find(".indexer.") != std::string::npos)
        return tensor_error(checkpoint_, tensor,
                            "config.json says that this layer has no such part (compress_ratios[" +
                                std::to_string(layer) + "] is " +
                                std::to_string(g_.compress_ratios[static_cast<size_t>(layer)]) + ")");
      return tensor_error(checkpoint_, tensor, kNoSuchPart);
    }
    return {};
  }

  const std::vector<PackJob>& packs() const { return packs_; }
  const std::vector<CopyJob>& copies() const { return copies_; }
  /// Of the part all arenas share, and of the first arena's tail.
  uint64_t common_bytes() const { return common_bytes_; }
  uint64_t tail_bytes() const { return tail_bytes_; }
  uint64_t arena_bytes(int node) const { return common_bytes_ + (node == 0 ? tail_bytes_ : 0); }
  uint64_t source_bytes() const { return source_bytes_; }
  int nodes() const { return nodes_; }

 private:
  Result<const TensorInfo*> find(const std::string& name) {
    if (const TensorInfo* tensor = checkpoint_.find(name)) return *used_.insert(tensor).first;
    return corrupt(checkpoint_.folder().string() + ": tensor '" + name + "' is missing");
  }

  Status check_shape(const TensorInfo& tensor, const std::vector<int64_t>& expected) {
    if (tensor.shape == expected) return {};
    TensorInfo wanted;
    wanted.shape = expected;
    return tensor_error(checkpoint_, tensor,
                        "shape " + tensor.shape_text() + " should be " + wanted.shape_text() + " by config.json");
  }

  // Branches on what is stored: E8M0 or F32, per row and 32 columns (FP4) or per block (FP8).
  Result<const TensorInfo*> bind_scale(const std::string& name, PackedShape& shape) {
    TC_ASSIGN(const TensorInfo* scale, find(name));
    if (scale->dtype != DType::f8_e8m0 && scale->dtype != DType::f32)
      return tensor_error(checkpoint_, *scale,
                          "dtype " + std::string(dtype_name(scale->dtype)) + " is neither F8_E8M0 nor F32");
    if (shape.format == WeightFormat::mxfp4) {
      shape.scale = scale->dtype == DType::f32 ? ScaleFormat::f32_rows : ScaleFormat::e8m0_rows;
      TC_RETURN_IF_ERROR(check_shape(*scale, {shape.n, shape.k / 32}));
    } else {
      shape.scale = ScaleFormat::f32_blocks;
      shape.scale_tiles = g_.weight_block_cols / 32;
      TC_RETURN_IF_ERROR(check_shape(*scale, {(shape.n + g_.weight_block_rows - 1) / g_.weight_block_rows,
                                              (shape.k + g_.weight_block_cols - 1) / g_.weight_block_cols}));
    }
    return scale;
  }

  Status copy(CopyJob::Kind kind, const TensorInfo& tensor, const std::vector<int64_t>& shape, const void** target,
              int64_t element, int64_t id_limit) {
    TC_RETURN_IF_ERROR(check_shape(tensor, shape));
    uint64_t& end = kind == CopyJob::Kind::floats ? common_bytes_ : tail_bytes_;
    copies_.push_back({kind, &tensor, target, end, id_limit});
    end += align_up(static_cast<uint64_t>(tensor.elements() * element));
    source_bytes_ += tensor.bytes;
    return {};
  }

  const Checkpoint& checkpoint_;
  const ModelGeometry& g_;
  std::vector<PackJob> packs_;
  std::vector<CopyJob> copies_;
  const int nodes_;
  std::set<const TensorInfo*> used_;
  uint64_t common_bytes_ = 0, tail_bytes_ = 0, source_bytes_ = 0;
};

// The byte of the first code that stands for NaN or infinity, or -1. One pass without branches tells whether there is
// one.
int64_t first_not_finite(WeightFormat format, const std::byte* bytes, int64_t count) {
  if (format == WeightFormat::mxfp4) return -1;
  bool found = false;
  if (format == WeightFormat::fp8) {
    for (int64_t i = 0; i < count; ++i) found |= (static_cast<uint8_t>(bytes[i]) & 0x7f) == 0x7f;
    if (!found) return -1;
    for (int64_t i = 0; i < count; ++i)
      if ((static_cast<uint8_t>(bytes[i]) & 0x7f) == 0x7f) return i;
  }
  const auto word = [&](int64_t i) {
    uint16_t w;
    std::memcpy(&w, bytes + 2 * i, 2);
    return w;
  };
  for (int64_t i = 0; i < count / 2; ++i) found |= (word(i) & 0x7f80) == 0x7f80;
  if (!found) return -1;
  for (int64_t i = 0; i < count / 2; ++i)
    if ((word(i) & 0x7f80) == 0x7f80) return 2 * i;
  return -1;
}

/// What the user and the caller see of the loading, and whether they still want it.
class LoadWatch {
 public:
  LoadWatch(const std::string& label, uint64_t total_bytes, const LoadOptions& options)
      : options_(options), total_(total_bytes), progress_(label, total_bytes, options.quiet) {}

  bool cancelled() const { return options_.cancel && options_.cancel->load(std::memory_order_relaxed); }
  /// Adds finished bytes; any thread.
  void add(uint64_t bytes) {
    progress_.add(bytes);
    if (!options_.progress) return;
    const std::unique_lock lock(mutex_, std::try_to_lock);  // who finds it taken is spoken for by the next chunk
    if (lock) tell(static_cast<double>(progress_.done()) / static_cast<double>(std::max<uint64_t>(total_, 1)));
  }
  void finish() {
    if (options_.progress) tell(1);
  }

 private:
  void tell(double share) { options_.progress(told_ = std::clamp(share, told_, 1.0)); }

  const LoadOptions& options_;
  const uint64_t total_;
  Progress progress_;
  std::mutex mutex_;
  double told_ = 0;
};

Error loading_cancelled() { return {ErrorCode::cancelled, "loading was cancelled"}; }

/// Source bytes of one loading thread, kept from chunk to chunk: fresh pages would cost as much as the read.
class SourceBuffer {
 public:
  std::span<std::byte> take(int64_t bytes) {
    if (static_cast<size_t>(bytes) > size_)
      bytes_ = std::make_unique_for_overwrite<std::byte[]>(size_ = static_cast<size_t>(bytes));
    return {bytes_.get(), static_cast<size_t>(bytes)};
  }

 private:
  std::unique_ptr<std::byte[]> bytes_;
  size_t size_ = 0;
};

/// Second pass: reads, checks and packs one chunk.
class ChunkLoader {
 public:
  ChunkLoader(const Checkpoint& checkpoint, const ModelGeometry& geometry, const Weights& weights, LoadWatch& watch)
      : checkpoint_(checkpoint), g_(geometry), weights_(weights), watch_(watch) {}

  static int64_t groups_per_chunk(const PackJob& job) {
    const int64_t row_bytes = static_cast<int64_t>(job.weight->bytes) / job.matrix->n;
    return std::max<int64_t>(1, kSourceChunkBytes / std::max<int64_t>(1, row_bytes * kTileRows));
  }

  Status pack(const PackJob& job, int64_t first_group, SourceBuffer& buffer) const {
    const PackedMatrix& m = *job.matrix;
    const int64_t row_bytes = static_cast<int64_t>(job.weight->bytes) / m.n;
    const int64_t last_group = std::min(m.row_groups(), first_group + groups_per_chunk(job));
    const int64_t first_row = first_group * kTileRows, rows = std::min(m.n, last_group * kTileRows) - first_row;
    const std::span<std::byte> source = buffer.take(rows * row_bytes);
    TC_RETURN_IF_ERROR(checkpoint_.read(*job.weight, static_cast<uint64_t>(first_row * row_bytes), source));
    if (const int64_t at = first_not_finite(m.format, source.data(), rows * row_bytes); at >= 0)
      return tensor_error(
          checkpoint_, *job.weight,
          "a weight is not finite" + position(*job.weight, static_cast<uint64_t>(first_row * row_bytes + at)));
    for (int64_t group = first_group; group < last_group; ++group) {
      const int64_t row = group * kTileRows;
      cpu::pack_row_group(m, source.data() + (row - first_row) * row_bytes, row_bytes, std::min(kTileRows, m.n - row),
                          const_cast<uint8_t*>(m.row_group(group).tiles));
    }
    watch_.add(source.size());
    return job.scale ? load_scales(job, first_group, last_group, buffer) : Status();
  }

  Status copy(const CopyJob& job, SourceBuffer& buffer) const {
    const TensorInfo& tensor = *job.source;
    const int64_t element = dtype_bytes(tensor.dtype), count = tensor.elements(),
                  per_chunk = kSourceChunkBytes / element;
    for (int64_t begin = 0; begin < count; begin += per_chunk) {
      if (watch_.cancelled()) return loading_cancelled();
      const int64_t n = std::min(per_chunk, count - begin);
      const std::span<std::byte> source = buffer.take(n * element);
      TC_RETURN_IF_ERROR(checkpoint_.read(tensor, static_cast<uint64_t>(begin * element), source));
      TC_RETURN_IF_ERROR(convert(job, source.data(), begin, n));
      watch_.add(source.size());
    }
    if (job.kind == CopyJob::Kind::floats)
      for (size_t node = 1; node < weights_.arenas.size(); ++node)
        std::memcpy(weights_.arenas[node].data() + job.offset, *job.target, static_cast<size_t>(count) * 4);
    return {};
  }

 private:
  Status load_scales(const PackJob& job, int64_t first_group, int64_t last_group, SourceBuffer& buffer) const {
    const PackedMatrix& m = *job.matrix;
    const TensorInfo& scale = *job.scale;
    const int64_t element = dtype_bytes(scale.dtype), cols = scale.shape[1];
    const int64_t rows_per_scale = m.scale == ScaleFormat::f32_blocks ? g_.weight_block_rows : 1;
    const int64_t first = first_group * kTileRows / rows_per_scale;
    const int64_t last =
        std::min<int64_t>(scale.shape[0], (last_group * kTileRows + rows_per_scale - 1) / rows_per_scale);
    const std::span<std::byte> source = buffer.take((last - first) * cols * element);
    TC_RETURN_IF_ERROR(checkpoint_.read(scale, static_cast<uint64_t>(first * cols * element), source));
    const bool e8m0 = scale.dtype == DType::f8_e8m0;
    if (!e8m0 || std::memchr(source.data(), 0xff, source.size()))  // 255 is NaN
      for (int64_t i = 0; i < (last - first) * cols; ++i)
        if (!std::isfinite(scale_value(scale, source.data(), i)))
          return tensor_error(
              checkpoint_, scale,
              "a scale is not finite" + position(scale, static_cast<uint64_t>((first * cols + i) * element)));
    for (int64_t group = first_group; group < last_group; ++group) {
      uint8_t* plane = static_cast<uint8_t*>(const_cast<void*>(m.row_group(group).scales));
      for (int64_t r = 0; r < (m.scale == ScaleFormat::f32_blocks ? 1 : std::min(kTileRows, m.n - group * kTileRows));
           ++r) {
        const int64_t row = (group * kTileRows + r) / rows_per_scale - first;
        for (int64_t col = 0; col < cols; ++col) {
          const int64_t i = row * cols + col;
          if (m.scale == ScaleFormat::e8m0_rows)
            plane[col * 16 + r] = static_cast<uint8_t>(source[static_cast<size_t>(i)]);
          else if (m.scale == ScaleFormat::f32_rows)
            reinterpret_cast<float*>(plane)[col * 16 + r] = scale_value(scale, source.data(), i);
          else
            reinterpret_cast<float*>(plane)[col] = scale_value(scale, source.data(), i);
        }
      }
    }
    watch_.add(static_cast<uint64_t>((last_group - first_group) * kTileRows / rows_per_scale * cols * element));
    return {};
  }

  static float scale_value(const TensorInfo& scale, const std::byte* source, int64_t i) {
    if (scale.dtype == DType::f8_e8m0) return e8m0_to_float(static_cast<uint8_t>(source[i]));
    float value;
    std::memcpy(&value, source + i * 4, 4);
    return value;
  }

  Status convert(const CopyJob& job, const std::byte* source, int64_t begin, int64_t n) const {
    const TensorInfo& tensor = *job.source;
    std::byte* target = static_cast<std::byte*>(const_cast<void*>(*job.target));
    const int64_t element = dtype_bytes(tensor.dtype);
    if (job.kind == CopyJob::Kind::bf16_rows) {  // the embedding table: a GiB, copied as it is
      std::memcpy(target + begin * 2, source, static_cast<size_t>(n) * 2);
      const int64_t at = first_not_finite(WeightFormat::bf16, source, n * 2);
      return at < 0 ? Status()
                    : tensor_error(checkpoint_, tensor,
                                   "a value is not finite" + position(tensor, static_cast<uint64_t>(begin * 2 + at)));
    }
    for (int64_t i = 0; i < n; ++i) {
      const std::byte* in = source + i * element;
      bool good = true;
      if (job.kind == CopyJob::Kind::ids) {
        int64_t id = 0;
        if (tensor.dtype == DType::i64)
          std::memcpy(&id, in, 8);
        else {
          int32_t narrow;
          std::memcpy(&narrow, in, 4);
          id = narrow;
        }
        good = id >= 0 && id < job.id_limit;
        reinterpret_cast<int32_t*>(target)[begin + i] = static_cast<int32_t>(id);
        if (!good)
          return tensor_error(checkpoint_, tensor,
                              "expert id " + std::to_string(id) + " is outside 0.." + std::to_string(job.id_limit - 1) +
                                  position(tensor, static_cast<uint64_t>((begin + i) * element)));
        continue;
      }
      uint32_t bits = 0;
      std::memcpy(&bits, in, static_cast<size_t>(element));
      const float value = tensor.dtype == DType::f32    ? std::bit_cast<float>(bits)
                          : tensor.dtype == DType::bf16 ? bf16_to_float(static_cast<bf16>(bits))
                                                        : f16_to_float(static_cast<uint16_t>(bits));
      if (!std::isfinite(value))
        return tensor_error(checkpoint_, tensor,
                            "a value is not finite" + position(tensor, static_cast<uint64_t>((begin + i) * element)));
      reinterpret_cast<float*>(target)[begin + i] = value;
    }
    return {};
  }

  const Checkpoint& checkpoint_;
  const ModelGeometry& g_;
  const Weights& weights_;
  LoadWatch& watch_;
};

// Twice the cores: while some threads wait for the disk, others pack.
int loading_threads(int threads) { return 2 * (threads > 0 ? threads : default_uneven_threads()); }

Status run_jobs(const Binder& binder, const ChunkLoader& loader, const LoadWatch& watch, int threads) {
  struct Task {
    const PackJob* pack;
    const CopyJob* copy;
    int64_t first_group;
  };
  std::vector<Task> tasks;
  for (const PackJob& job : binder.packs())
    for (int64_t group = 0; group < job.matrix->row_groups(); group += ChunkLoader::groups_per_chunk(job))
      tasks.push_back({&job, nullptr, group});
  for (const CopyJob& job : binder.copies()) tasks.push_back({nullptr, &job, 0});
  // In the order of the files, so that the disk reads forward; each shard's tensors are a range of bytes.
  const auto place = [](const Task& task) {
    const TensorInfo& tensor = task.pack ? *task.pack->weight : *task.copy->source;
    const uint64_t row = task.pack ? tensor.bytes / static_cast<uint64_t>(task.pack->matrix->n) : 0;
    return std::pair(tensor.shard, tensor.begin + static_cast<uint64_t>(task.first_group * kTileRows) * row);
  };
  std::sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) { return place(a) < place(b); });
  std::mutex mutex;
  std::atomic<bool> failed{false};
  Status first_error;
  const int workers = loading_threads(threads);
  std::vector<SourceBuffer> buffers(static_cast<size_t>(workers));
  for_each_uneven(static_cast<int64_t>(tasks.size()), workers, [&](int64_t i, int slot) {
    if (failed) return;
    const Task& task = tasks[static_cast<size_t>(i)];
    SourceBuffer& buffer = buffers[static_cast<size_t>(slot)];
    Status status = watch.cancelled() ? loading_cancelled()
                    : task.pack       ? loader.pack(*task.pack, task.first_group, buffer)
                                      : loader.copy(*task.copy, buffer);
    if (status.ok()) return;
    const std::lock_guard lock(mutex);
    if (!failed.exchange(true)) first_error = std::move(status);
  });
  return first_error;
}

/// Records what a writer has to write.
class TensorLister {
 public:
  explicit TensorLister(const ModelGeometry& geometry) : g_(geometry) {}
  std::vector<TensorInfo> tensors;

  Status linear(const std::string& name, Stored stored, int64_t n, int64_t k, PackedMatrix&) {
    const int64_t rows = g_.weight_block_rows, cols = g_.weight_block_cols;
    if (stored == Stored::bf16) return add(name + ".weight", DType::bf16, {n, k});
    if (stored == Stored::fp4) {
      TC_RETURN_IF_ERROR(add(name + ".weight", DType::i8, {n, k / 2}));
      return add(name + ".scale", DType::f8_e8m0, {n, k / 32});
    }
    TC_RETURN_IF_ERROR(add(name + ".weight", DType::f8_e4m3, {n, k}));
    return add(name + ".scale", DType::f8_e8m0, {(n + rows - 1) / rows, (k + cols - 1) / cols});
  }
  Status floats(const std::string& name, DType dtype, const std::vector<int64_t>& shape, const float*&) {
    return add(name, dtype, shape);
  }
  Status ids(const std::string& name, const std::vector<int64_t>& shape, const int32_t*&) {
    return add(name, DType::i64, shape);
  }
  Status rows(const std::string& name, const std::vector<int64_t>& shape, const uint16_t*&) {
    return add(name, DType::bf16, shape);
  }

 private:
  Status add(const std::string& name, DType dtype, const std::vector<int64_t>& shape) {
    TensorInfo tensor;
    tensor.name = name;
    tensor.dtype = dtype;
    tensor.shape = shape;
    tensor.bytes = static_cast<uint64_t>(tensor.elements() * dtype_bytes(dtype));
    tensors.push_back(std::move(tensor));
    return {};
  }
  const ModelGeometry& g_;
};

// One arena a node, bound to it and touched first by its own workers.
Status allocate_arenas(const Binder& binder, const LoadWatch& watch, WorkerPool* pool, Weights& weights) {
  uint64_t total = 0;
  for (int node = 0; node < binder.nodes(); ++node) total += binder.arena_bytes(node);
  if (total > usable_memory_bytes())
    return Error{ErrorCode::out_of_memory, "the weights need " + std::to_string(total >> 20) +
                                               " MiB of memory, this process may use " +
                                               std::to_string(usable_memory_bytes() >> 20) + " MiB"};
  for (int node = 0; node < binder.nodes(); ++node) {
    if (watch.cancelled()) return loading_cancelled();
    TC_ASSIGN(NumaBuffer arena, NumaBuffer::allocate(binder.arena_bytes(node), pool ? pool->os_node(node) : -1));
    weights.arenas.push_back(std::move(arena));
    weights.node_offsets.push_back(weights.arenas.back().data() - weights.arenas[0].data());
  }
  if (binder.nodes() > 1)
    pool->run([&](int worker) {
      const WorkerPool::Team& team = pool->team(worker);
      const NumaBuffer& arena = weights.arenas[static_cast<size_t>(team.node)];
      const uint64_t pages = (arena.size() + 4095) / 4096, size = static_cast<uint64_t>(team.size),
                     rank = static_cast<uint64_t>(team.rank);
      for (uint64_t page = pages * rank / size; page < pages * (rank + 1) / size && !watch.cancelled(); ++page)
        *reinterpret_cast<volatile std::byte*>(arena.data() + page * 4096) = std::byte{0};
    });
  return {};
}

// Every pointer of the weights, once the first arena's address is known.
void place(const Binder& binder, std::byte* arena, Weights& weights) {
  for (const PackJob& job : binder.packs()) {
    job.matrix->tiles = reinterpret_cast<const uint8_t*>(arena + job.offset);
    job.matrix->scales = job.matrix->tiles + slice_tile_bytes(*job.matrix);
    job.matrix->node_offsets = weights.node_offsets.data();
  }
  for (const CopyJob& job : binder.copies())
    *job.target = arena + job.offset + (job.kind == CopyJob::Kind::floats ? 0 : binder.common_bytes());
  weights.hc_head.node_offsets = weights.node_offsets.data();
  for (LayerWeights& layer : weights.layers)
    layer.hc_attn.node_offsets = layer.hc_ffn.node_offsets = weights.node_offsets.data();
  for (MtpWeights& block : weights.mtp)
    for (HcWeights* hc : {&block.layer.hc_attn, &block.layer.hc_ffn, &block.hc_head})
      hc->node_offsets = weights.node_offsets.data();
}

// A page elsewhere costs half its bandwidth for good, so what the kernel says is checked and not trusted.
void report_placement(Weights& weights, const WorkerPool* pool) {
  for (size_t node = 0; node < weights.arenas.size(); ++node) {
    const NumaBuffer& arena = weights.arenas[node];
    const int os_node = pool ? pool->os_node(static_cast<int>(node)) : -1;
    std::string where = "not bound";
    if (os_node >= 0) {
      const std::optional<double> share = arena.share_on_node(os_node);
      where = std::string(arena.bound() ? "bound" : "binding refused") + ", " +
              (share ? fmt::format("{:.1f} % of its pages on OS node {}", 100 * *share, os_node) : "placement unknown");
      if (share && *share < 0.999 && weights.arenas.size() > 1)
        log_warn(
            "weights of node {}: only {:.1f} % of their pages lie on OS node {}: its workers will read remote memory",
            node, 100 * *share, os_node);
    }
    weights.placement.push_back(fmt::format("node {}: {:.2f} GiB of weights on {}, {}", node,
                                            static_cast<double>(arena.size()) / (1 << 30),
                                            page_kind_name(arena.pages()), where));
    log_debug("{}", weights.placement.back());
  }
}

template <class Visitor>
Status walk(const ModelGeometry& geometry, Visitor& visitor, Weights& weights, bool mtp) {
  weights.layers.resize(static_cast<size_t>(geometry.n_layers));
  if (mtp) weights.mtp.resize(static_cast<size_t>(geometry.n_mtp_layers));
  TensorWalk<Visitor> tensors(geometry, visitor);
  TC_RETURN_IF_ERROR(tensors.main_model(weights));
  for (size_t i = 0; i < weights.mtp.size(); ++i)
    TC_RETURN_IF_ERROR(tensors.mtp_block(static_cast<int>(i), weights.mtp[i]));
  return {};
}

}  // namespace

struct WeightLoader::Plan {
  Plan(Checkpoint opened, const ModelGeometry& g, const LoadOptions& o)
      : checkpoint(std::move(opened)),
        geometry(g),
        options(o),
        binder(checkpoint, geometry, o.pool ? o.pool->nodes() : 1) {}

  const Checkpoint checkpoint;
  const ModelGeometry geometry;
  const LoadOptions options;
  Binder binder;  // its jobs point into the weights
  std::unique_ptr<Weights> weights = std::make_unique<Weights>();
};

WeightLoader::WeightLoader(std::unique_ptr<Plan> plan) : plan_(std::move(plan)) {}
WeightLoader::WeightLoader(WeightLoader&&) noexcept = default;
WeightLoader& WeightLoader::operator=(WeightLoader&&) noexcept = default;
WeightLoader::~WeightLoader() = default;

Result<WeightLoader> WeightLoader::open(const std::filesystem::path& folder, const ModelGeometry& geometry,
                                        const LoadOptions& options) {
  TC_ASSIGN(Checkpoint checkpoint, Checkpoint::open(folder, options.read_mode));
  auto plan = std::make_unique<Plan>(std::move(checkpoint), geometry, options);
  // DSpark checkpoints keep three draft blocks of another shape under mtp.*: those are not the MTP block.
  const bool mtp = options.mtp && plan->checkpoint.find("mtp.0.e_proj.weight") != nullptr;
  TC_RETURN_IF_ERROR(walk(plan->geometry, plan->binder, *plan->weights, mtp));
  TC_RETURN_IF_ERROR(plan->binder.check_left_over());
  // Places in an arena that begins at 64, as zero would be no tensor.
  place(plan->binder, reinterpret_cast<std::byte*>(64), *plan->weights);
  return WeightLoader(std::move(plan));
}

const Weights& WeightLoader::shapes() const { return *plan_->weights; }

uint64_t WeightLoader::arena_bytes() const {
  uint64_t total = 0;
  for (int node = 0; node < plan_->binder.nodes(); ++node) total += plan_->binder.arena_bytes(node);
  return total;
}

uint64_t WeightLoader::buffer_bytes() const {
  return std::min<uint64_t>(static_cast<uint64_t>(loading_threads(plan_->options.threads)) * kSourceChunkBytes,
                            plan_->binder.source_bytes());
}

Result<std::unique_ptr<Weights>> WeightLoader::load() {
  TC_CHECK(plan_ && plan_->weights, "weights are loaded once");
  const LoadOptions& options = plan_->options;
  const Binder& binder = plan_->binder;
  Weights& weights = *plan_->weights;
  LoadWatch watch("loading " + plan_->checkpoint.folder().string(), binder.source_bytes(), options);
  TC_RETURN_IF_ERROR(allocate_arenas(binder, watch, options.pool, weights));
  place(binder, weights.arenas[0].data(), weights);
  TC_RETURN_IF_ERROR(
      run_jobs(binder, ChunkLoader(plan_->checkpoint, plan_->geometry, weights, watch), watch, options.threads));
  watch.finish();
  report_placement(weights, options.pool);
  return std::move(plan_->weights);
}

Result<std::unique_ptr<Weights>> load_weights(const std::filesystem::path& folder, const ModelGeometry& geometry,
                                              const LoadOptions& options) {
  TC_ASSIGN(WeightLoader loader, WeightLoader::open(folder, geometry, options));
  return loader.load();
}

std::vector<TensorInfo> published_tensors(const ModelGeometry& geometry) {
  TensorLister lister(geometry);
  Weights unused;
  const Status status = walk(geometry, lister, unused, true);
  TC_CHECK(status.ok());
  return std::move(lister.tensors);
}

namespace {

template <class Fn>
void each_dense_matrix(const Weights& w, const Fn& fn) {
  fn(w.head);
  for (const LayerWeights& layer : w.layers)
    for (const PackedMatrix* m : {&layer.wq_a, &layer.wq_b, &layer.wkv, &layer.wo_a, &layer.wo_b, &layer.compressor.wkv,
                                  &layer.compressor.wgate, &layer.index_compressor.wkv, &layer.index_compressor.wgate,
                                  &layer.index_wq_b, &layer.index_weights_proj, &layer.gate, &layer.shared_expert.w1,
                                  &layer.shared_expert.w2, &layer.shared_expert.w3})
      fn(*m);
}

// Elements of the hyper-connections' float32 weights.
uint64_t hc_elements(const ModelGeometry& g) {
  return static_cast<uint64_t>((2 * g.hc_outputs() * g.n_layers + g.hc_mult) * g.hc_mult * g.dim);
}

}  // namespace

uint64_t Weights::dense_bytes(const ModelGeometry& g) const {
  uint64_t bytes = 4 * hc_elements(g);
  each_dense_matrix(*this, [&](const PackedMatrix& m) { bytes += static_cast<uint64_t>(m.bytes()); });
  return bytes;
}

uint64_t Weights::bytes_per_token(const ModelGeometry& g) const {
  uint64_t bytes = dense_bytes(g);
  for (const LayerWeights& layer : layers)
    bytes += static_cast<uint64_t>(g.n_activated_experts) * layer.experts[0].bytes();
  return bytes;
}

uint64_t Weights::macs_per_token(const ModelGeometry& g) const {
  uint64_t macs =
      hc_elements(g) + static_cast<uint64_t>(g.n_layers * g.n_activated_experts * 3 * g.dim * g.moe_inter_dim);
  each_dense_matrix(*this, [&](const PackedMatrix& m) { macs += static_cast<uint64_t>(m.n * m.k); });
  return macs;
}

}  // namespace thermocline::deepseek_v4
