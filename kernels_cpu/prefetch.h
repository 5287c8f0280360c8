// How far ahead of its use a kernel asks for a line of what it streams. That is a property of the core and changes no
// bit; measured by `bench kernels` on each (docs/performance.md). Internal linkage, as in avx512/decode.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace thermocline::cpu {
namespace {

/// AMD's Zen: one hint, 4 to 8 KiB ahead. Into L2 where x is read from L1 over and over, which the lines would push
/// out.
template <_mm_hint hint>
struct ZenAhead {
  static constexpr const char* kText = "6 KiB";
  static constexpr int64_t kScales = 0;
  static inline __attribute__((always_inline)) void ask(const uint8_t* line) {
    _mm_prefetch(reinterpret_cast<const char*>(line + 6144), hint);
  }
};

/// Intel's cores (Emerald Rapids): into L2 early and into L1 late. A decode step takes 6 % less time than with the
/// first alone; of 3 to 16 KiB and 0.5 to 3 KiB these two were the best, the second near where Granite Rapids had its
/// own best.
struct IntelAhead {
  static constexpr const char* kText = "6 KiB into L2 and 1 KiB into L1";
  static constexpr int64_t kScales = 512;  // of the plane of scales
  static inline __attribute__((always_inline)) void ask(const uint8_t* line) {
    _mm_prefetch(reinterpret_cast<const char*>(line + 6144), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(line + 1024), _MM_HINT_T0);
  }
};

}  // namespace
}  // namespace thermocline::cpu
