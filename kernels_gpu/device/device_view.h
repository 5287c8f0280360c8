// DeviceView: a borrowed, row-major, contiguous tensor in device (or pinned) memory. A plain value that goes to kernels
// as it is; only kernels read through it. Under TC_SIMT_CHECKS accesses are checked against the shape and the streams.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define TC_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TC_HOST_DEVICE
#include "kernels_gpu/device/simt_host.h"
#endif

namespace thermocline::gpu {

#ifdef TC_SIMT_CHECKS
inline namespace checked {
#else
inline namespace fast {
#endif

template <class T, int Rank>
struct DeviceView {
  T* pointer = nullptr;
  int64_t shape[Rank] = {};

  TC_HOST_DEVICE int64_t size() const {
    int64_t n = 1;
    for (int axis = 0; axis < Rank; ++axis) n *= shape[axis];
    return n;
  }
  TC_HOST_DEVICE int64_t offset(int64_t i) const { return i; }
  template <class... Rest>
  TC_HOST_DEVICE int64_t offset(int64_t i, int64_t j, Rest... rest) const {
    static_assert(1 + 1 + sizeof...(Rest) == Rank);
    int64_t at = i * shape[1] + j;
    int axis = 2;
    ((at = at * shape[axis++] + static_cast<int64_t>(rest)), ...);
    return at;
  }
  /// The i-th slice along the first axis.
  TC_HOST_DEVICE DeviceView<T, Rank == 1 ? 1 : Rank - 1> row(int64_t i) const {
    DeviceView<T, Rank == 1 ? 1 : Rank - 1> out;
    int64_t stride = 1;
    for (int axis = 1; axis < Rank; ++axis) {
      out.shape[axis - 1] = shape[axis];
      stride *= shape[axis];
    }
    out.pointer = pointer + i * stride;
    return out;
  }

#ifdef __CUDACC__
  template <class... Index>
  __device__ __forceinline__ T& operator()(Index... index) const {
    return pointer[offset(static_cast<int64_t>(index)...)];
  }
  __device__ __forceinline__ T& operator[](int64_t i) const { return pointer[i]; }
  /// The address of `count` elements from a flat index, about to be read (or written).
  __device__ __forceinline__ T* read(int64_t i, int64_t) const { return pointer + i; }
  __device__ __forceinline__ T* write(int64_t i, int64_t) const { return pointer + i; }
#else
  template <class... Index>
  decltype(auto) operator()(Index... index) const {
    return at(offset(static_cast<int64_t>(index)...));
  }
  decltype(auto) operator[](int64_t i) const { return at(i); }
  T* read(int64_t i, int64_t count) const {
    check(i, count, false);
    return pointer + i;
  }
  T* write(int64_t i, int64_t count) const {
    check(i, count, true);
    return pointer + i;
  }
  T* address(int64_t i) const { return write(i, 1); }
  T* data() const { return pointer; }
  void check(int64_t i, int64_t count, bool write) const {
    if constexpr (dev::kChecks) {
      if (i < 0 || i + count > size())
        dev::runner().fail("element " + std::to_string(i + count - 1) + " is outside a device view of " +
                           std::to_string(size()));
      dev::runner().check_device(pointer + i, static_cast<size_t>(count) * sizeof(T), write);
    }
  }

 private:
  class Ref {
   public:
    Ref(const DeviceView& view, int64_t i) : view_(view), i_(i) {}
    Ref(const Ref&) = default;
    using Value = std::remove_const_t<T>;
    operator Value() const {
      view_.check(i_, 1, false);
      return view_.pointer[i_];
    }
    Ref& operator=(Value x) {
      view_.check(i_, 1, true);
      view_.pointer[i_] = x;
      return *this;
    }
    Ref& operator=(const Ref& other) { return *this = static_cast<Value>(other); }
    Ref& operator+=(Value x) { return *this = static_cast<Value>(*this) + x; }

   private:
    DeviceView view_;
    int64_t i_;
  };
  decltype(auto) at(int64_t i) const {
    if constexpr (!dev::kChecks)
      return (pointer[i]);
    else if constexpr (std::is_const_v<T>)
      return static_cast<std::remove_const_t<T> >(Ref(*this, i));
    else
      return Ref(*this, i);
  }
#endif
};

}  // namespace checked or fast

}  // namespace thermocline::gpu
