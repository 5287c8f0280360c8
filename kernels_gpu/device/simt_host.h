// simt.cuh over the SIMT interpreter. With TC_SIMT_CHECKS every access is checked; both variants can live in one
// program, as they are in namespaces of their own.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <thread>

#include "kernels_gpu/simt/interpreter.h"
#include "runtime/base/number_formats.h"

#define TC_DEVICE inline
#define TC_KERNEL(...) static void
#define TC_SHARED(T, name, n) ::thermocline::gpu::dev::SharedArray<T> name(n, #name)
#define TC_DYNAMIC_SHARED(T, name, n) TC_SHARED(T, name, n)
#define TC_UNROLL
#define TC_UNROLL_BY(n)

namespace thermocline::gpu::dev {

#ifdef TC_SIMT_CHECKS
inline namespace checked {
inline constexpr bool kChecks = true;
#else
inline namespace fast {
inline constexpr bool kChecks = false;
#endif

inline simt::BlockRunner& runner() { return simt::BlockRunner::current(); }

inline int thread() { return runner().thread(); }
inline int lane() { return thread() % 32; }
inline int warp() { return thread() / 32; }
inline int block_threads() { return runner().shape().block; }
inline int block_x() { return runner().block().x; }
inline int block_y() { return runner().block().y; }
inline int block_z() { return runner().block().z; }
inline int grid_x() { return runner().shape().grid.x; }
inline int grid_y() { return runner().shape().grid.y; }

inline void block_sync() { runner().block_sync(); }
inline void warp_sync(uint32_t mask = 0xffffffffu) {
  simt::WarpOp op;
  op.name = "warp_sync";
  op.mask = mask;
  runner().collective(op);
}
template <class T>
T shuffle(uint32_t mask, T x, int source) {
  static_assert(sizeof(T) <= 8);
  simt::WarpOp op;
  op.kind = simt::WarpOp::Kind::shuffle;
  op.name = "shuffle";
  op.mask = mask;
  op.source = source & 31;
  if (!(mask >> op.source & 1)) runner().fail("shuffle from a lane that is not in its mask");
  std::memcpy(&op.value, &x, sizeof(T));
  runner().collective(op);
  std::memcpy(&x, &op.result, sizeof(T));
  return x;
}
template <class T>
T shuffle_xor(uint32_t mask, T x, int bits) {
  return shuffle(mask, x, lane() ^ bits);
}
inline uint32_t ballot(uint32_t mask, bool predicate) {
  simt::WarpOp op;
  op.kind = simt::WarpOp::Kind::ballot;
  op.name = "ballot";
  op.mask = mask;
  op.value = predicate;
  runner().collective(op);
  return static_cast<uint32_t>(op.result);
}

template <class T>
T max_of(T a, T b) {
  return a > b ? a : b;
}
template <class T>
T min_of(T a, T b) {
  return a < b ? a : b;
}
inline float fma_of(float a, float b, float c) { return std::fma(a, b, c); }
inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline int popcount(uint32_t x) { return std::popcount(x); }
template <class To, class From>
To bits_to(From x) {
  return std::bit_cast<To>(x);
}

/// What a[i] is under the checks: reads and writes are noted.
template <class Array, class T>
class Element {
 public:
  Element(const Array& array, int64_t i) : array_(array), i_(i) {}
  Element(const Element&) = default;
  operator T() const {
    array_.check(i_, 1, false);
    return array_.data()[i_];
  }
  Element& operator=(T x) {
    array_.check(i_, 1, true);
    array_.data()[i_] = x;
    return *this;
  }
  Element& operator=(const Element& other) { return *this = static_cast<T>(other); }
  Element& operator+=(T x) { return *this = static_cast<T>(*this) + x; }
  Element& operator*=(T x) { return *this = static_cast<T>(*this) * x; }

 private:
  const Array& array_;
  int64_t i_;
};

template <class T>
class SharedArray {
 public:
  SharedArray(int64_t n, const char* name) : block_(runner().shared(sizeof(T), n, name)), name_(name) {}

  decltype(auto) operator[](int64_t i) const {
    if constexpr (kChecks)
      return Element<SharedArray, T>(*this, i);
    else
      return (data()[i]);
  }
  T* data() const { return reinterpret_cast<T*>(block_.data); }
  void check(int64_t i, int64_t count, bool write) const {
    if constexpr (kChecks) runner().check_shared(block_, i, count, write, name_);
  }
  const simt::SharedBlock& block() const { return block_; }
  const char* name() const { return name_; }

 private:
  simt::SharedBlock block_;
  const char* name_;
};

// Lanes of a block run on one thread; device memory is shared by blocks on several.
template <class T>
T atomic_add(SharedArray<T>& a, int64_t i, T x) {
  if constexpr (kChecks)
    if (i < 0 || i >= a.block().elements) runner().fail(std::string("atomic_add outside ") + a.name());
  const T old = a.data()[i];
  a.data()[i] = old + x;
  return old;
}
template <class View, class T>
T atomic_add(View& a, int64_t i, T x) {
  return std::atomic_ref<T>(*a.address(i)).fetch_add(x);
}

template <class View, class T>
T atomic_exchange(View& a, int64_t i, T x) {
  return std::atomic_ref<T>(*a.address(i)).exchange(x);
}
template <class View, class T>
T atomic_compare_exchange(View& a, int64_t i, T expected, T x) {
  std::atomic_ref<T>(*a.address(i)).compare_exchange_strong(expected, x);
  return expected;
}

inline uint32_t load_acquire_system(const uint32_t* p) {
  return std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(p)).load(std::memory_order_acquire);
}
inline void store_release_system(uint32_t* p, uint32_t x) {
  std::atomic_ref<uint32_t>(*p).store(x, std::memory_order_release);
}
inline void fence_system() {}  // atomic_add and the flags order what they publish
inline void pause() { std::this_thread::yield(); }

struct alignas(16) Vec4 {
  uint32_t x[4];
};

template <class U, class T>
U load_shared_as(const SharedArray<T>& array, int i) {
  static_assert(sizeof(U) % sizeof(T) == 0);
  array.check(i, sizeof(U) / sizeof(T), false);
  U value;
  if (i % static_cast<int>(sizeof(U) / sizeof(T)) != 0) runner().fail("a misaligned load of shared memory");
  std::memcpy(&value, array.data() + i, sizeof(U));
  return value;
}
template <class U, class T>
void store_shared_as(const SharedArray<T>& array, int i, const U& value) {
  static_assert(sizeof(U) % sizeof(T) == 0);
  array.check(i, sizeof(U) / sizeof(T), true);
  if (i % static_cast<int>(sizeof(U) / sizeof(T)) != 0) runner().fail("a misaligned store to shared memory");
  std::memcpy(array.data() + i, &value, sizeof(U));
}
template <class T>
Vec4 load_shared16(const SharedArray<T>& array, int i) {
  return load_shared_as<Vec4>(array, i);
}

template <class T>
void cp_async16(SharedArray<T>& array, int i, const void* from, int valid = 16) {
  simt::AsyncCopy copy;
  copy.to = reinterpret_cast<std::byte*>(array.data() + i);
  copy.from = static_cast<const std::byte*>(from);
  copy.valid = valid;
  if constexpr (kChecks) {
    copy.block = array.block();
    copy.index = i;
    copy.count = 16 / sizeof(T);
    copy.name = array.name();
    if (valid > 0) runner().check_device(from, static_cast<size_t>(valid), false);
  }
  runner().async_copy(copy);
}
inline void cp_async_commit() { runner().async_commit(); }
template <int newest>
void cp_async_wait() {
  runner().async_wait(newest);
}

inline void mma(simt::WarpOp::Kind kind, const char* name, float* d, const uint32_t* a, const uint32_t* b) {
  simt::WarpOp op;
  op.kind = kind;
  op.name = name;
  op.mask = 0xffffffffu;
  op.d = d;
  op.a = a;
  op.b = b;
  runner().collective(op);
}
inline void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma(simt::WarpOp::Kind::mma_bf16, "mma_bf16_16816", d, a, b);
}
inline void mma_e4m3_16832(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma(simt::WarpOp::Kind::mma_e4m3, "mma_e4m3_16832", d, a, b);
}
template <bool transposed = false, class T>
void ldmatrix_x4(uint32_t (&out)[4], const SharedArray<T>& array, int i) {
  array.check(i, 16 / sizeof(T), false);
  simt::WarpOp op;
  op.kind = simt::WarpOp::Kind::ldmatrix;
  op.name = "ldmatrix_x4";
  op.mask = 0xffffffffu;
  op.row = array.data() + i;
  op.value = transposed;
  op.out = out;
  runner().collective(op);
}
inline uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t x, uint32_t y) {
    return static_cast<uint32_t>(
        float_to_bf16(bf16_to_float(static_cast<bf16>(x)) * bf16_to_float(static_cast<bf16>(y))));
  };
  return half(a, b) | half(a >> 16, b >> 16) << 16;
}

}  // namespace checked or fast
}  // namespace thermocline::gpu::dev
