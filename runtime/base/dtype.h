// DType: the element types of a published checkpoint, with their names in a safetensors header.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace thermocline {

enum class DType : uint8_t { f32, bf16, f16, f8_e4m3, f8_e8m0, i8, i32, i64 };

inline constexpr struct {
  DType dtype;
  std::string_view name;
  int bytes;
} kDTypes[] = {
    {DType::f32, "F32", 4},         {DType::bf16, "BF16", 2}, {DType::f16, "F16", 2}, {DType::f8_e4m3, "F8_E4M3", 1},
    {DType::f8_e8m0, "F8_E8M0", 1}, {DType::i8, "I8", 1},     {DType::i32, "I32", 4}, {DType::i64, "I64", 8},
};

constexpr int dtype_bytes(DType dtype) { return kDTypes[static_cast<int>(dtype)].bytes; }
constexpr std::string_view dtype_name(DType dtype) { return kDTypes[static_cast<int>(dtype)].name; }

constexpr std::optional<DType> dtype_of_name(std::string_view name) {
  for (const auto& entry : kDTypes)
    if (entry.name == name) return entry.dtype;
  return std::nullopt;
}

}  // namespace thermocline
