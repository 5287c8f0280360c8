// What tests share: where the data lies, a temporary folder, safetensors as float vectors, seeded random values.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "runtime/base/number_formats.h"
#include "runtime/io/file.h"
#include "runtime/io/json_document.h"
#include "runtime/io/safetensors.h"

namespace thermocline::test {

inline std::filesystem::path source_dir() { return TC_SOURCE_DIR; }
inline std::filesystem::path demo_model() { return source_dir() / "models" / "demo"; }
inline std::filesystem::path golden(const std::string& name) { return source_dir() / "tests" / "golden" / name; }

/// A folder that is gone after the test.
class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "thermocline-test-XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// A copy of a model folder to break.
inline void copy_model(const std::filesystem::path& from, const std::filesystem::path& to) {
  std::filesystem::copy(from, to,
                        std::filesystem::copy_options::recursive | std::filesystem::copy_options::overwrite_existing);
}

/// One safetensors file in memory, values widened to double.
class TensorFile {
 public:
  explicit TensorFile(const std::filesystem::path& path) : file_(InputFile::open(path).value()) {
    const std::vector<TensorInfo> tensors = read_safetensors_header(file_).value();
    for (const TensorInfo& tensor : tensors) tensors_[tensor.name] = tensor;
  }
  const TensorInfo& info(const std::string& name) const { return tensors_.at(name); }

  std::vector<float> floats(const std::string& name) const {
    const TensorInfo& tensor = info(name);
    const std::vector<std::byte> raw = bytes(name);
    std::vector<float> out;
    for (size_t i = 0; i < raw.size(); i += static_cast<size_t>(dtype_bytes(tensor.dtype))) {
      const std::byte* p = raw.data() + i;
      int64_t wide = 0;
      std::memcpy(&wide, p, static_cast<size_t>(dtype_bytes(tensor.dtype)));
      switch (tensor.dtype) {
        case DType::f32:
          out.push_back(std::bit_cast<float>(static_cast<uint32_t>(wide)));
          break;
        case DType::bf16:
          out.push_back(bf16_to_float(static_cast<bf16>(wide)));
          break;
        case DType::i32:
          out.push_back(static_cast<float>(static_cast<int32_t>(wide)));
          break;
        case DType::i64:
          out.push_back(static_cast<float>(wide));
          break;
        default:
          out.push_back(static_cast<float>(static_cast<uint8_t>(wide)));
      }
    }
    return out;
  }
  std::vector<int32_t> ids(const std::string& name) const {
    std::vector<int32_t> out;
    for (const float value : floats(name)) out.push_back(static_cast<int32_t>(value));
    return out;
  }
  std::vector<std::byte> bytes(const std::string& name) const {
    std::vector<std::byte> raw(info(name).bytes);
    EXPECT_TRUE(file_.read_at(info(name).begin, raw).ok());
    return raw;
  }

 private:
  InputFile file_;
  std::map<std::string, TensorInfo> tensors_;
};

inline std::vector<Json> read_jsonl(const std::filesystem::path& path) {
  std::vector<Json> lines;
  const std::string text = read_text_file(path).value();
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    if (end > at) lines.push_back(parse_json(std::string_view(text).substr(at, end - at)).value());
    at = end + 1;
  }
  return lines;
}

inline std::vector<float> random_floats(std::mt19937& random, int64_t n, float deviation = 1) {
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = normal(random);
  return values;
}

}  // namespace thermocline::test
