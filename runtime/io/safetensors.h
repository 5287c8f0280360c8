// safetensors: reading one shard's header with every promise of the format checked, a sharded checkpoint by its index,
// and writing. Format: 8 bytes of little-endian header length, that many bytes of JSON (name -> dtype, shape,
// data_offsets; an optional __metadata__ of strings), then the tensors' bytes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "runtime/base/dtype.h"
#include "runtime/base/result.h"
#include "runtime/io/file.h"

namespace thermocline {

struct TensorInfo {
  std::string name;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // absolute byte offset in the shard
  uint64_t bytes = 0;
  int shard = 0;

  int64_t elements() const;
  std::string shape_text() const;  // "[256, 4096]"
};

/// Reads and checks the header of one shard: its length, the JSON, dtypes, shapes without overflow, offsets that match
/// the shape, lie inside the file and neither overlap nor leave holes, names that appear once.
/// Errors: corrupt, naming file, tensor and byte offset; io, not_found.
Result<std::vector<TensorInfo>> read_safetensors_header(const InputFile& file);

/// The same checks on bytes in memory: `header` is the JSON, `file_bytes` the size of the whole file.
Result<std::vector<TensorInfo>> parse_safetensors_header(std::string_view header, uint64_t file_bytes);

/// A checkpoint folder: model.safetensors.index.json with its shards, or a single model.safetensors. Thread-safe.
class Checkpoint {
 public:
  /// Errors: not_found when neither is there (what the folder does hold is listed), corrupt when index and shards
  /// disagree: a shard missing, a name in the index but not its shard, in two shards, or in none of the index.
  static Result<Checkpoint> open(const std::filesystem::path& folder, ReadMode mode = ReadMode::buffered);

  const std::filesystem::path& folder() const { return folder_; }
  /// The tensor of this name, or nullptr.
  const TensorInfo* find(const std::string& name) const;
  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }
  /// "model-00001-of-00002.safetensors, tensor 'embed.weight'", for messages about a tensor.
  std::string where(const TensorInfo& tensor) const;
  /// Bytes [offset, offset + out.size()) of a tensor.
  Status read(const TensorInfo& tensor, uint64_t offset, std::span<std::byte> out) const;

 private:
  std::filesystem::path folder_;
  std::vector<InputFile> shards_;
  std::map<std::string, TensorInfo> tensors_;
};

/// Writes one safetensors file, tensor bytes streamed in the order they were declared.
class SafetensorsWriter {
 public:
  /// Writes the header. `tensors` need name, dtype and shape only.
  static Result<SafetensorsWriter> create(const std::filesystem::path& path, const std::vector<TensorInfo>& tensors);
  Status write(std::span<const std::byte> bytes) { return file_.write(bytes); }
  Status close() { return file_.close(); }

 private:
  explicit SafetensorsWriter(OutputFile file) : file_(std::move(file)) {}
  OutputFile file_;
};

}  // namespace thermocline
