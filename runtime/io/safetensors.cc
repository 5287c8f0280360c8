#include "runtime/io/safetensors.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "runtime/io/json_document.h"

namespace thermocline {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100 << 20;  // the limit of the reference implementation
constexpr const char* kIndexName = "model.safetensors.index.json";

bool multiply(uint64_t a, uint64_t b, uint64_t& out) { return !__builtin_mul_overflow(a, b, &out); }

Result<uint64_t> unsigned_of(const SortedJson& value, const std::string& what) {
  if (!value.is_number_unsigned())
    return corrupt(what + " should be a whole number of at most 64 bits, not " + dump_json(value));
  return value.get<uint64_t>();
}

Result<TensorInfo> parse_entry(const std::string& name, const SortedJson& entry, uint64_t data_begin,
                               uint64_t data_bytes) {
  const std::string what = "tensor '" + name + "': ";
  TensorInfo tensor;
  tensor.name = name;
  Result<std::string> dtype = get_string(entry, "dtype");
  if (!dtype) return std::move(dtype).error().with("tensor '" + name + "'");
  const auto known = dtype_of_name(*dtype);
  if (!known) return unsupported(what + "dtype " + *dtype + " is not one of F32 BF16 F16 F8_E4M3 F8_E8M0 I8 I32 I64");
  tensor.dtype = *known;
  if (!entry.contains("shape") || !entry["shape"].is_array()) return corrupt(what + "shape is missing or no array");
  uint64_t bytes = static_cast<uint64_t>(dtype_bytes(tensor.dtype));
  for (const SortedJson& extent : entry["shape"]) {
    TC_ASSIGN(const uint64_t n, unsigned_of(extent, what + "an extent of the shape"));
    if (n > INT64_MAX || !multiply(bytes, n, bytes)) return corrupt(what + "its size overflows 64 bits");
    tensor.shape.push_back(static_cast<int64_t>(n));
  }
  if (!entry.contains("data_offsets") || !entry["data_offsets"].is_array() || entry["data_offsets"].size() != 2)
    return corrupt(what + "data_offsets is missing or no pair");
  TC_ASSIGN(const uint64_t begin, unsigned_of(entry["data_offsets"][0], what + "data_offsets[0]"));
  TC_ASSIGN(const uint64_t end, unsigned_of(entry["data_offsets"][1], what + "data_offsets[1]"));
  if (end < begin)
    return corrupt(what + "data_offsets end at " + std::to_string(end) + ", before their begin " +
                   std::to_string(begin));
  if (end > data_bytes)
    return corrupt(what + "its bytes end at offset " + std::to_string(data_begin + end) +
                   ", past the end of the file at " + std::to_string(data_begin + data_bytes) + " (truncated file?)");
  if (end - begin != bytes)
    return corrupt(what + "data_offsets span " + std::to_string(end - begin) + " bytes at offset " +
                   std::to_string(data_begin + begin) + " but dtype and shape need " + std::to_string(bytes));
  tensor.begin = data_begin + begin;
  tensor.bytes = bytes;
  return tensor;
}

Status check_layout(std::vector<TensorInfo> tensors, uint64_t data_begin, uint64_t file_bytes) {
  std::stable_sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::pair(a.begin, a.bytes) < std::pair(b.begin, b.bytes);
  });
  uint64_t position = data_begin;
  std::string previous;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.begin < position)
      return corrupt("tensor '" + tensor.name + "' at offset " + std::to_string(tensor.begin) + " overlaps tensor '" +
                     previous + "', which ends at " + std::to_string(position));
    if (tensor.begin > position)
      return corrupt("a hole of " + std::to_string(tensor.begin - position) + " bytes at offset " +
                     std::to_string(position) + ", before tensor '" + tensor.name + "'");
    position += tensor.bytes;
    previous = tensor.name;
  }
  if (position != file_bytes)
    return corrupt("the tensors end at offset " + std::to_string(position) + " but the file has " +
                   std::to_string(file_bytes) + " bytes");
  return {};
}

std::string list_folder(const std::filesystem::path& folder) {
  std::error_code ignored;
  std::string names;
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    if (++count > 12) return names + ", ...";
    names += (names.empty() ? "" : ", ") + entry.path().filename().string();
  }
  return names.empty() ? "nothing" : names;
}

// Shard name -> the tensor names the index promises in it. An empty set promises nothing (no index).
Result<std::map<std::string, std::set<std::string>>> read_index(const std::filesystem::path& folder) {
  std::map<std::string, std::set<std::string>> shards;
  const std::filesystem::path index_path = folder / kIndexName;
  std::error_code ignored;
  if (!std::filesystem::exists(index_path, ignored)) {
    if (std::filesystem::exists(folder / "model.safetensors", ignored)) return shards["model.safetensors"], shards;
    return Error{ErrorCode::not_found, folder.string() + " is no checkpoint: neither " + kIndexName +
                                           " nor model.safetensors is there (it holds: " + list_folder(folder) + ")"};
  }
  TC_ASSIGN(const std::string text, read_text_file(index_path));
  Result<SortedJson> json = parse_sorted_json(text, true);
  if (!json) return std::move(json).error().with(index_path.string());
  if (!json->is_object() || !json->contains("weight_map") || !(*json)["weight_map"].is_object())
    return corrupt(index_path.string() + ": weight_map is missing or no object");
  for (const auto& [name, shard] : (*json)["weight_map"].items()) {
    if (!shard.is_string()) return corrupt(index_path.string() + ": weight_map['" + name + "'] should be a file name");
    const std::string file = shard.get<std::string>();
    if (file.empty() || file.find('/') != std::string::npos || file.find('\0') != std::string::npos || file == "." ||
        file == "..")
      return corrupt(index_path.string() + ": weight_map['" + name + "'] = '" + file + "' is no plain file name");
    shards[file].insert(name);
  }
  if (shards.empty()) return corrupt(index_path.string() + ": weight_map is empty");
  return shards;
}

}  // namespace

int64_t TensorInfo::elements() const {
  int64_t n = 1;
  for (const int64_t extent : shape) n *= extent;
  return n;
}

std::string TensorInfo::shape_text() const {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

Result<std::vector<TensorInfo>> parse_safetensors_header(std::string_view header, uint64_t file_bytes) {
  TC_ASSIGN(const SortedJson json, parse_sorted_json(header, true));
  if (!json.is_object()) return corrupt("the header is no JSON object");
  const uint64_t data_begin = 8 + header.size();
  if (data_begin > file_bytes)
    return corrupt("the header of " + std::to_string(header.size()) + " bytes does not fit the file");
  std::vector<TensorInfo> tensors;
  for (const auto& [name, entry] : json.items()) {
    if (name == "__metadata__") continue;
    TC_ASSIGN(TensorInfo tensor, parse_entry(name, entry, data_begin, file_bytes - data_begin));
    tensors.push_back(std::move(tensor));
  }
  TC_RETURN_IF_ERROR(check_layout(tensors, data_begin, file_bytes));
  return tensors;
}

Result<std::vector<TensorInfo>> read_safetensors_header(const InputFile& file) {
  const std::string where = file.path().string();
  uint8_t prefix[8];
  if (file.size() < 8)
    return corrupt(where + ": " + std::to_string(file.size()) + " bytes are too few for a safetensors header");
  TC_RETURN_IF_ERROR(file.read_at(0, std::as_writable_bytes(std::span(prefix))));
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | prefix[i];
  if (length > kMaxHeaderBytes || length > file.size() - 8)
    return corrupt(where + ": the header length at offset 0 says " + std::to_string(length) +
                   " bytes, but the file has " + std::to_string(file.size()) + " (and the limit is " +
                   std::to_string(kMaxHeaderBytes) + ")");
  std::string header(length, '\0');
  TC_RETURN_IF_ERROR(file.read_at(8, std::as_writable_bytes(std::span(header))));
  Result<std::vector<TensorInfo>> tensors = parse_safetensors_header(header, file.size());
  if (!tensors) return std::move(tensors).error().with(where);
  return tensors;
}

Result<Checkpoint> Checkpoint::open(const std::filesystem::path& folder, ReadMode mode) {
  Checkpoint checkpoint;
  checkpoint.folder_ = folder;
  std::error_code ignored;
  if (!std::filesystem::is_directory(folder, ignored))
    return Error{ErrorCode::not_found, folder.string() + " is not a folder"};
  TC_ASSIGN(const auto index, read_index(folder));
  for (const auto& [shard, promised] : index) {
    Result<InputFile> file = InputFile::open(folder / shard, mode);
    if (!file) return std::move(file).error().with("shard named by " + std::string(kIndexName));
    TC_ASSIGN(std::vector<TensorInfo> tensors, read_safetensors_header(*file));
    for (TensorInfo& tensor : tensors) {
      if (!promised.empty() && !promised.contains(tensor.name))
        return corrupt((folder / shard).string() + ": tensor '" + tensor.name + "' at offset " +
                       std::to_string(tensor.begin) + " is not where " + kIndexName + " puts it");
      tensor.shard = static_cast<int>(checkpoint.shards_.size());
      const std::string name = tensor.name;
      if (!checkpoint.tensors_.emplace(name, std::move(tensor)).second)
        return corrupt(folder.string() + ": tensor '" + name + "' is in two shards");
    }
    for (const std::string& name : promised)
      if (!checkpoint.tensors_.contains(name))
        return corrupt((folder / shard).string() + ": tensor '" + name + "' is missing, though " + kIndexName +
                       " puts it there");
    checkpoint.shards_.push_back(std::move(*file));
  }
  return checkpoint;
}

const TensorInfo* Checkpoint::find(const std::string& name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

std::string Checkpoint::where(const TensorInfo& tensor) const {
  return shards_[tensor.shard].path().string() + ", tensor '" + tensor.name + "' at offset " +
         std::to_string(tensor.begin);
}

Status Checkpoint::read(const TensorInfo& tensor, uint64_t offset, std::span<std::byte> out) const {
  TC_CHECK(offset + out.size() <= tensor.bytes);
  Status status = shards_[tensor.shard].read_at(tensor.begin + offset, out);
  if (!status.ok()) return std::move(status).error().with("tensor '" + tensor.name + "'");
  return status;
}

Result<SafetensorsWriter> SafetensorsWriter::create(const std::filesystem::path& path,
                                                    const std::vector<TensorInfo>& tensors) {
  Json header = Json::object();
  uint64_t position = 0;
  for (const TensorInfo& tensor : tensors) {
    const uint64_t bytes = static_cast<uint64_t>(tensor.elements() * dtype_bytes(tensor.dtype));
    header[tensor.name] = {
        {"dtype", dtype_name(tensor.dtype)}, {"shape", tensor.shape}, {"data_offsets", {position, position + bytes}}};
    position += bytes;
  }
  std::string text = dump_json(header);
  text.resize((text.size() + 7) / 8 * 8, ' ');  // tensors start on 8 bytes
  TC_ASSIGN(OutputFile file, OutputFile::create(path));
  const uint64_t length = text.size();
  TC_RETURN_IF_ERROR(file.write(std::as_bytes(std::span(&length, 1))));
  TC_RETURN_IF_ERROR(file.write(std::as_bytes(std::span(text))));
  return SafetensorsWriter(std::move(file));
}

}  // namespace thermocline
