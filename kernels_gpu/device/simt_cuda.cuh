// simt.cuh as instructions of a GPU, sm_80 and newer.
#pragma once

#include <cuda_bf16.h>

#define TC_DEVICE __device__ __forceinline__
/// Threads a block, and blocks a multiprocessor should hold at least, where the registers allow.
#define TC_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
/// name: an array of n elements of T, the block's own, not initialised.
#define TC_SHARED(T, name, n) __shared__ alignas(128) T name[n]
/// The one array whose size the launch gives. n is for the host, and for scripts/gpu_report.sh, which reads the
/// comment.
#define TC_DYNAMIC_SHARED(T, name, n)                                \
  asm volatile("// dynamic shared bytes %0" ::"n"((n) * sizeof(T))); \
  extern __shared__ uint4 thermocline_dynamic_shared[];              \
  T* const name = reinterpret_cast<T*>(thermocline_dynamic_shared)
#define TC_UNROLL _Pragma("unroll")
#define TC_PRAGMA(text) _Pragma(#text)
#define TC_UNROLL_BY(n) TC_PRAGMA(unroll n)

namespace thermocline::gpu::dev {

TC_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
TC_DEVICE int lane() { return static_cast<int>(threadIdx.x & 31); }
TC_DEVICE int warp() { return static_cast<int>(threadIdx.x >> 5); }
TC_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
TC_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
TC_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
TC_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
TC_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
TC_DEVICE int grid_y() { return static_cast<int>(gridDim.y); }

TC_DEVICE void block_sync() { __syncthreads(); }
TC_DEVICE void warp_sync(uint32_t mask = 0xffffffffu) { __syncwarp(mask); }
template <class T>
TC_DEVICE T shuffle(uint32_t mask, T x, int source) {
  return __shfl_sync(mask, x, source);
}
template <class T>
TC_DEVICE T shuffle_xor(uint32_t mask, T x, int bits) {
  return __shfl_xor_sync(mask, x, bits);
}
TC_DEVICE uint32_t ballot(uint32_t mask, bool predicate) { return __ballot_sync(mask, predicate); }

template <class T>
TC_DEVICE T max_of(T a, T b) {
  return a > b ? a : b;
}
template <class T>
TC_DEVICE T min_of(T a, T b) {
  return a < b ? a : b;
}
TC_DEVICE float fma_of(float a, float b, float c) { return __fmaf_rn(a, b, c); }
/// A product or sum the compiler may not fuse: rounded where the host rounds.
TC_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
TC_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
TC_DEVICE int popcount(uint32_t x) { return __popc(x); }
template <class To, class From>
TC_DEVICE To bits_to(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

/// a[i] += x; the old value. Within shared memory, or within the device.
template <class A, class T>
TC_DEVICE T atomic_add(A& a, int64_t i, T x) {
  return atomicAdd(&a[i], x);
}

/// a[i] = x; the old value.
template <class A, class T>
TC_DEVICE T atomic_exchange(A& a, int64_t i, T x) {
  return atomicExch(&a[i], x);
}
/// a[i] = x if it was `expected`; the old value.
template <class A, class T>
TC_DEVICE T atomic_compare_exchange(A& a, int64_t i, T expected, T x) {
  return atomicCAS(&a[i], expected, x);
}

// Flags that host and device see, in pinned memory.
TC_DEVICE uint32_t load_acquire_system(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
TC_DEVICE void store_release_system(uint32_t* p, uint32_t x) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
TC_DEVICE void fence_system() { __threadfence_system(); }
TC_DEVICE void pause() { __nanosleep(100); }

struct alignas(16) Vec4 {
  uint32_t x[4];
};

/// 16 aligned bytes of a shared array, at element i.
template <class T>
TC_DEVICE Vec4 load_shared16(const T* array, int i) {
  return *reinterpret_cast<const Vec4*>(array + i);
}
/// Sizeof(U) aligned bytes of a shared array of smaller elements.
template <class U, class T>
TC_DEVICE U load_shared_as(const T* array, int i) {
  return *reinterpret_cast<const U*>(array + i);
}

/// The same the other way.
template <class U, class T>
TC_DEVICE void store_shared_as(T* array, int i, const U& value) {
  *reinterpret_cast<U*>(array + i) = value;
}

/// Starts copying 16 bytes to element i of a shared array; of these `valid` (0 or 16) are read, the rest zero.
template <class T>
TC_DEVICE void cp_async16(T* array, int i, const void* from, int valid = 16) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(array + i));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
}
TC_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `newest` of this thread's groups are under way. Others see the bytes after a barrier.
template <int newest>
TC_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

/// d += a b: a 16 x 16 and b 16 x 8 bf16 fragments, d f32. Lane 4g + c: a rows g, g + 8; b and d columns g / 2c, 2c
/// + 1.
TC_DEVICE void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// The same with e4m3 elements, 16 x 32 and 32 x 8; sm_89 and newer. Its accumulator keeps fewer bits on sm_90.
TC_DEVICE void mma_e4m3_16832(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
/// Four 8 x 8 matrices of 16-bit elements; lane i points at row i % 8 of matrix i / 8: 16 bytes of a shared array.
/// Register j of lane 4g + c gets elements 2c, 2c + 1 of row g of matrix j; transposed, of column g.
template <bool transposed = false, class T>
TC_DEVICE void ldmatrix_x4(uint32_t (&out)[4], const T* array, int i) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(array + i));
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from));
}
/// Two bf16 products at once.
TC_DEVICE uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  return bits_to<uint32_t>(__hmul2(bits_to<__nv_bfloat162>(a), bits_to<__nv_bfloat162>(b)));
}

}  // namespace thermocline::gpu::dev
