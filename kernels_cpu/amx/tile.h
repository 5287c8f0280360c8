// The AMX tile instructions the kernels use, as intrinsics or, with TC_AMX_EMULATED, as an emulation on AVX2 + FMA that
// is faithful to the bit, so that the kernels run and are tested on any machine.
//
// Source of the emulation: Intel SDM, LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBF16PS, TDPBSSD. TDPBF16PS adds
// the products of even and of odd columns in two float32 chains from zero, by fused multiply-adds, then their sum to
// the destination; subnormal inputs and outputs of every operation are zero. FlushDenormals sets MXCSR to do just that
// with the hardware's own instructions.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace thermocline::cpu::tile {
namespace {

/// Palette 1: what LDTILECFG reads.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int tile_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(Config) == 64);

#ifdef TC_AMX_EMULATED

/// Denormals are zero, in and out, while it lives.
class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned before_;
};

/// 16 floats: the columns of a tile row.
struct Row16 {
  __m256 low, high;
  static Row16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Row16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }
};
inline Row16 add(Row16 a, Row16 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Row16 fma(Row16 a, __m256 x, Row16 b) {
  return {_mm256_fmadd_ps(a.low, x, b.low), _mm256_fmadd_ps(a.high, x, b.high)};
}

/// The two floats of 16 bf16 pairs at `pairs`: even words and odd words.
struct Pairs16 {
  Row16 even, odd;
  explicit Pairs16(const void* pairs) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const __m256i a = _mm256_loadu_si256(static_cast<const __m256i*>(pairs)),
                  b = _mm256_loadu_si256(static_cast<const __m256i*>(pairs) + 1);
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(a, upper)), _mm256_castsi256_ps(_mm256_and_si256(b, upper))};
  }
};

/// One row of C += A B in the order of TDPBF16PS: a [2 k_pairs] bf16, b [k_pairs] rows of 16 bf16 pairs. Denormals are
/// flushed by the caller.
inline Row16 dot_bf16_row(const uint16_t* a, const uint8_t* b, int64_t b_stride, int k_pairs, Row16 c) {
  Row16 even = Row16::zero(), odd = Row16::zero();
  for (int k = 0; k < k_pairs; ++k) {
    const Pairs16 w(b + k * b_stride);
    uint32_t pair;
    std::memcpy(&pair, a + 2 * k, 4);
    even = fma(w.even, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(pair << 16))), even);
    odd = fma(w.odd, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(pair & 0xffff0000u))), odd);
  }
  return add(c, add(even, odd));
}

struct State {
  Config config;
  alignas(64) uint8_t data[8][16][64] = {};
};
thread_local State state;

inline void load_config(const Config& config) {
  state.config = config;
  std::memset(state.data, 0, sizeof state.data);
}
inline void release() { load_config({}); }

template <int T>
inline void zero() {
  std::memset(state.data[T], 0, sizeof state.data[T]);
}
// Rows and bytes beyond the configured shape become zero.
template <int T>
inline void load(const void* base, int64_t stride) {
  zero<T>();
  for (int row = 0; row < state.config.rows[T]; ++row)
    std::memcpy(state.data[T][row], static_cast<const uint8_t*>(base) + row * stride, state.config.row_bytes[T]);
}
template <int T>
inline void store(void* base, int64_t stride) {
  for (int row = 0; row < state.config.rows[T]; ++row)
    std::memcpy(static_cast<uint8_t*>(base) + row * stride, state.data[T][row], state.config.row_bytes[T]);
}

template <int C, int A, int B>
__attribute__((noinline)) void dot_bf16_flushed() {
  for (int m = 0; m < state.config.rows[C]; ++m) {
    float* c = reinterpret_cast<float*>(state.data[C][m]);
    dot_bf16_row(reinterpret_cast<const uint16_t*>(state.data[A][m]), state.data[B][0], 64,
                 state.config.row_bytes[A] / 4, Row16::load(c))
        .store(c);
  }
}
// What the instruction is undefined for.
template <int C, int A, int B>
inline void check_shapes() {
  const Config& c = state.config;
  if (c.rows[C] != c.rows[A] || c.row_bytes[C] != c.row_bytes[B] || 4 * c.rows[B] != c.row_bytes[A]) __builtin_trap();
}

template <int C, int A, int B>
inline void dot_bf16() {
  check_shapes<C, A, B>();
  const FlushDenormals flush;
  dot_bf16_flushed<C, A, B>();  // a call, so that no operation moves out of the scope of MXCSR
}

template <int C, int A, int B>
inline void dot_int8() {
  check_shapes<C, A, B>();
  for (int m = 0; m < state.config.rows[C]; ++m) {
    int32_t* c = reinterpret_cast<int32_t*>(state.data[C][m]);
    for (int k = 0; k < state.config.row_bytes[A] / 4; ++k) {
      const int8_t* a = reinterpret_cast<const int8_t*>(state.data[A][m]) + 4 * k;
      const int8_t* b = reinterpret_cast<const int8_t*>(state.data[B][k]);
      for (int n = 0; n < state.config.row_bytes[C] / 4; ++n) {
        int32_t sum = 0;
        for (int i = 0; i < 4; ++i) sum += a[i] * b[4 * n + i];
        c[n] = static_cast<int32_t>(static_cast<uint32_t>(c[n]) + static_cast<uint32_t>(sum));
      }
    }
  }
}

#else

// The intrinsics of GCC 12 paste their tile number as text, so a template argument needs the instruction itself.
inline void load_config(const Config& config) { _tile_loadconfig(&config); }
inline void release() { _tile_release(); }
template <int T>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void load(const void* base, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void store(void* base, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(base), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void dot_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace
}  // namespace thermocline::cpu::tile
