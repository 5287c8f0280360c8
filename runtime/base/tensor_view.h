// TensorView: a borrowed, row-major, contiguous host tensor. Passed by value; the buffer that owns the bytes outlives
// it.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "runtime/base/check.h"

namespace thermocline {

template <class T, int Rank>
struct TensorView {
  T* data = nullptr;
  std::array<int64_t, Rank> shape{};

  TensorView() = default;
  TensorView(T* data_, std::array<int64_t, Rank> shape_) : data(data_), shape(shape_) {}
  /// A view of mutable elements is also a view of const ones.
  template <class U>
  requires(std::is_same_v<const U, T>) TensorView(const TensorView<U, Rank>& other)
      : data(other.data), shape(other.shape) {}

  int64_t size() const {
    int64_t n = 1;
    for (const int64_t extent : shape) n *= extent;
    return n;
  }
  /// The i-th slice along the first axis.
  T* row(int64_t i) const {
    int64_t stride = 1;
    for (int axis = 1; axis < Rank; ++axis) stride *= shape[axis];
    return data + i * stride;
  }
};

}  // namespace thermocline
