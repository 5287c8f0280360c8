// AVX-512 GEMM micro-kernels. On bf16 activations a vector of weights is 16 rows x one column pair, the operand of
// vdpbf16ps against a broadcast pair of x; it treats subnormal inputs as zero, and e4m3 and e2m1 codes are normal in
// bf16. On int8 activations a vector is 16 rows x 4 columns of biased bytes, the unsigned operand of vpdpbusd.
//
// Instructions per tile of 16 x 32 (objdump of the M = 1 loop, and what each further token adds):
//   mxfp4  4 loads, 12 shifts, 16 vpermw, 6 for the scale; a token adds 16 vdpbf16ps, 1 add, 1 fma
//   fp8    8 loads, 16 vpermi2b, 8 vpternlogd, 16 vpunpck; a token adds 16 vdpbf16ps, 1 add, 1 fma
//   mxfp4 x int8  4 loads, 4 shifts, 8 vpand, 8 vpshufb, 6 for the scale; a token adds 8 vpdpbusd, cvt, mul, fma
#include <immintrin.h>

#include "kernels_cpu/kernel_table.h"

namespace thermocline::cpu::avx512 {
namespace {

constexpr int64_t kPrefetchBytes = 6144;  // 4-8 KiB ahead keeps one core's read stream full

// --- decoders to bf16: one 64-byte line into vectors of 32 bf16, 16 rows x a column pair, pairs in rising order ---

template <bool is_int4>
struct NibbleLines {
  static constexpr int kLines = 4, kVectors = 4;
  // The 16 values as bf16, twice: vpermw looks at five bits, so bit 4 of the index does not matter.
  __m512i values;
  NibbleLines() {
    alignas(64) constexpr uint16_t kE2m1[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
                                                0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
    alignas(64) constexpr uint16_t kInt4[16] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    values = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(is_int4 ? kInt4 : kE2m1)));
  }
  void decode(const uint8_t* line, __m512i* v) const {
    const __m512i words = _mm512_loadu_si512(line);
    v[0] = _mm512_permutexvar_epi16(words, values);
    v[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), values);
    v[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), values);
    v[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), values);
  }
};

// The 128 non-negative byte codes as bf16, upper and lower bytes apart.
struct ByteTables {
  alignas(64) uint8_t high[128] = {}, low[128] = {};
};
constexpr ByteTables make_byte_tables(bool is_int8) {
  // value x 2^exponent as bf16, value < 256.
  const auto bf16_word = [](int value, int exponent) {
    if (value == 0) return 0;
    int top = 0;
    while (value >> (top + 1)) ++top;
    return ((127 + exponent + top) << 7) | ((value << 7 >> top) & 0x7f);
  };
  ByteTables tables;
  for (int code = 0; code < 128; ++code) {
    const int exponent = code >> 3, mantissa = code & 7;
    const int word = is_int8         ? bf16_word(code, 0)
                     : exponent == 0 ? bf16_word(mantissa, -9)
                                     : bf16_word(8 + mantissa, exponent - 10);
    tables.high[code] = static_cast<uint8_t>(word >> 8);
    tables.low[code] = static_cast<uint8_t>(word);
  }
  return tables;
}
constexpr ByteTables kE4m3Tables = make_byte_tables(false), kInt8Tables = make_byte_tables(true);

template <bool is_int8>
struct ByteLines {
  static constexpr int kLines = 8, kVectors = 2;
  static constexpr const ByteTables& kTables = is_int8 ? kInt8Tables : kE4m3Tables;
  const __m512i high[2] = {_mm512_load_si512(kTables.high), _mm512_load_si512(kTables.high + 64)};
  const __m512i low[2] = {_mm512_load_si512(kTables.low), _mm512_load_si512(kTables.low + 64)};
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  void decode(const uint8_t* line, __m512i* v) const {
    __m512i codes = _mm512_loadu_si512(line);
    asm("" : "+v"(codes));  // else GCC loads the line again for each look-up
    const __m512i magnitude = _mm512_permutex2var_epi8(high[0], codes, high[1]);    // bit 7 of an index is ignored
    const __m512i upper = _mm512_ternarylogic_epi32(magnitude, codes, sign, 0xf8);  // magnitude | (codes & sign)
    const __m512i lower = _mm512_permutex2var_epi8(low[0], codes, low[1]);
    v[0] = _mm512_unpacklo_epi8(lower, upper);
    v[1] = _mm512_unpackhi_epi8(lower, upper);
  }
};

struct Bf16Lines {
  static constexpr int kLines = 16, kVectors = 1;
  void decode(const uint8_t* line, __m512i* v) const { v[0] = _mm512_loadu_si512(line); }
};

// --- scales ---

// Scales of `group`, which covers `scale_tiles` tiles: a vector of 16 rows.
template <ScaleFormat format>
__m512 load_scale(const RowGroup& w, int64_t group) {
  if constexpr (format == ScaleFormat::e8m0_rows) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(w.scales) + group);
    const __m512i exponents = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
    // Byte 0 is 2^-127, a subnormal float.
    return _mm512_castsi512_ps(
        _mm512_mask_mov_epi32(exponents, _mm512_testn_epi32_mask(exponents, exponents), _mm512_set1_epi32(0x00400000)));
  } else if constexpr (format == ScaleFormat::f32_rows) {
    return _mm512_loadu_ps(static_cast<const float*>(w.scales) + group * 16);
  } else {
    return _mm512_set1_ps(static_cast<const float*>(w.scales)[group]);
  }
}

// Calls tile_fn(tile, scale) for every tile, with the scale of the group it lies in.
template <ScaleFormat format, class TileFn>
inline __attribute__((always_inline)) void for_scaled_tiles(const RowGroup& w, const TileFn& tile_fn) {
  if constexpr (format == ScaleFormat::none) {
    for (int64_t tile = 0; tile < w.k_tiles; ++tile) tile_fn(tile, _mm512_setzero_ps());
  } else if constexpr (format == ScaleFormat::e8m0_rows) {
    for (int64_t tile = 0; tile < w.k_tiles; ++tile) tile_fn(tile, load_scale<format>(w, tile));
  } else {
    for (int64_t tile = 0, group = 0; tile < w.k_tiles; ++group) {
      const __m512 s = load_scale<format>(w, group);
      const int64_t last = tile + w.scale_tiles < w.k_tiles ? tile + w.scale_tiles : w.k_tiles;
      for (; tile < last; ++tile) tile_fn(tile, s);
    }
  }
}

template <ScaleFormat format>
__m512 add_scaled(__m512 sum, __m512 scale, __m512 acc) {
  if constexpr (format == ScaleFormat::none)
    return _mm512_add_ps(acc, sum);
  else
    return _mm512_fmadd_ps(sum, scale, acc);
}

inline __attribute__((always_inline)) __m512i pair_of(const uint32_t* x, int i) {
  return _mm512_set1_epi32(static_cast<int>(x[i]));
}

// --- bf16 activations: within a tile, even column pairs add to one chain and odd pairs to another; they join, are
// scaled and added to the row's sum ---

template <class Lines, ScaleFormat scale, int M>
void gemm_m(const RowGroup& w, const uint32_t* x, float* y) {
  const Lines lines;
  __m512 acc[M];
  for (__m512& a : acc) a = _mm512_setzero_ps();
  for_scaled_tiles<scale>(
      w, [&](int64_t tile, __m512 s) __attribute__((always_inline)) {
        const uint8_t* bytes = w.tiles + tile * Lines::kLines * 64;
        const uint32_t* xt = x + tile * M * 16;
        __m512 even[M], odd[M];
        for (int token = 0; token < M; ++token) even[token] = odd[token] = _mm512_setzero_ps();
#pragma GCC unroll 16
        for (int line = 0; line < Lines::kLines; ++line) {
          _mm_prefetch(reinterpret_cast<const char*>(bytes + line * 64 + kPrefetchBytes), _MM_HINT_T0);
          __m512i v[Lines::kVectors];
          lines.decode(bytes + line * 64, v);
#pragma GCC unroll 4
          for (int i = 0; i < Lines::kVectors; ++i) {
            const int pair = line * Lines::kVectors + i;
#pragma GCC unroll 8
            for (int token = 0; token < M; ++token) {
              __m512& chain = pair % 2 ? odd[token] : even[token];
              chain = _mm512_dpbf16_ps(chain, reinterpret_cast<__m512bh>(v[i]),
                                       reinterpret_cast<__m512bh>(pair_of(xt + token * 16, pair)));
            }
          }
        }
#pragma GCC unroll 8
        for (int token = 0; token < M; ++token)
          acc[token] = add_scaled<scale>(_mm512_add_ps(even[token], odd[token]), s, acc[token]);
      });
  for (int token = 0; token < M; ++token) _mm512_storeu_ps(y + token * 16, acc[token]);
}

template <class Lines, ScaleFormat scale>
void gemm(const RowGroup& w, const void* x_void, int m, float* y) {
  const uint32_t* x = static_cast<const uint32_t*>(x_void);
  switch (m) {
    case 1:
      return gemm_m<Lines, scale, 1>(w, x, y);
    case 2:
      return gemm_m<Lines, scale, 2>(w, x, y);
    case 3:
      return gemm_m<Lines, scale, 3>(w, x, y);
    case 4:
      return gemm_m<Lines, scale, 4>(w, x, y);
    case 5:
      return gemm_m<Lines, scale, 5>(w, x, y);
    case 6:
      return gemm_m<Lines, scale, 6>(w, x, y);
    case 7:
      return gemm_m<Lines, scale, 7>(w, x, y);
    default:
      return gemm_m<Lines, scale, 8>(w, x, y);
  }
}

// --- int8 activations: decoders to biased bytes, eight columns at a time, {0,4,1,5} then {2,6,3,7} ---

template <bool is_int4>
struct NibbleBytes {
  static constexpr int64_t kTileBytes = 256;
  static constexpr int kBias = is_int4 ? 8 : 12;
  static constexpr float kValue = is_int4 ? 1.0f : 0.5f;  // e2m1 in halves is an integer
  const __m512i low_nibbles = _mm512_set1_epi8(0x0f);
  const __m512i values =
      _mm512_broadcast_i32x4(is_int4 ? _mm_setr_epi8(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
                                     : _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  void decode(const uint8_t* tile, int block, __m512i* v) const {
    const uint8_t* line = tile + block * 64;
    _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes), _MM_HINT_T0);
    const __m512i codes = _mm512_loadu_si512(line);
    v[0] = _mm512_shuffle_epi8(values, _mm512_and_si512(codes, low_nibbles));
    v[1] = _mm512_shuffle_epi8(values, _mm512_and_si512(_mm512_srli_epi16(codes, 4), low_nibbles));
  }
};

struct Int8Bytes {
  static constexpr int64_t kTileBytes = 512;
  static constexpr int kBias = 128;
  static constexpr float kValue = 1.0f;
  // Sign and magnitude to value + 128.
  static __m512i biased(const uint8_t* line) {
    _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes), _MM_HINT_T0);
    const __m512i codes = _mm512_loadu_si512(line), bias = _mm512_set1_epi8(static_cast<char>(0x80));
    const __mmask64 negative = _mm512_movepi8_mask(codes);
    // A negative code is 128 + magnitude, its value + 128 is 128 - magnitude = 0 - code mod 256.
    return _mm512_mask_sub_epi8(_mm512_or_si512(codes, bias), negative, _mm512_setzero_si512(), codes);
  }
  void decode(const uint8_t* tile, int block, __m512i* v) const {
    const __m512i a = biased(tile + block * 128), b = biased(tile + block * 128 + 64);
    v[0] = _mm512_unpacklo_epi8(a, b);
    v[1] = _mm512_unpackhi_epi8(a, b);
  }
};

template <class Bytes, ScaleFormat scale, int M>
void gemm_int8_m(const RowGroup& w, const Int8Chunk* x, float* y) {
  const Bytes lines;
  __m512 acc[M];
  for (__m512& a : acc) a = _mm512_setzero_ps();
  for_scaled_tiles<scale>(
      w, [&](int64_t tile, __m512 s) __attribute__((always_inline)) {
        const Int8Chunk* xt = x + tile * M;
        const __m512 value = _mm512_mul_ps(s, _mm512_set1_ps(Bytes::kValue));
        __m512i dots[M];
#pragma GCC unroll 8
        for (int token = 0; token < M; ++token) dots[token] = _mm512_set1_epi32(-Bytes::kBias * xt[token].sum);
#pragma GCC unroll 4
        for (int block = 0; block < 4; ++block) {
          __m512i v[2];
          lines.decode(w.tiles + tile * Bytes::kTileBytes, block, v);
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half)
#pragma GCC unroll 8
            for (int token = 0; token < M; ++token)
              dots[token] = _mm512_dpbusd_epi32(
                  dots[token], v[half], pair_of(reinterpret_cast<const uint32_t*>(xt[token].codes), 2 * block + half));
        }
#pragma GCC unroll 8
        for (int token = 0; token < M; ++token) {
          const __m512 factor = _mm512_mul_ps(value, _mm512_set1_ps(xt[token].scale));
          acc[token] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[token]), factor, acc[token]);
        }
      });
  for (int token = 0; token < M; ++token) _mm512_storeu_ps(y + token * 16, acc[token]);
}

template <class Bytes, ScaleFormat scale>
void gemm_int8(const RowGroup& w, const void* x_void, int m, float* y) {
  const Int8Chunk* x = static_cast<const Int8Chunk*>(x_void);
  switch (m) {
    case 1:
      return gemm_int8_m<Bytes, scale, 1>(w, x, y);
    case 2:
      return gemm_int8_m<Bytes, scale, 2>(w, x, y);
    case 3:
      return gemm_int8_m<Bytes, scale, 3>(w, x, y);
    case 4:
      return gemm_int8_m<Bytes, scale, 4>(w, x, y);
    case 5:
      return gemm_int8_m<Bytes, scale, 5>(w, x, y);
    case 6:
      return gemm_int8_m<Bytes, scale, 6>(w, x, y);
    case 7:
      return gemm_int8_m<Bytes, scale, 7>(w, x, y);
    default:
      return gemm_int8_m<Bytes, scale, 8>(w, x, y);
  }
}

double peak_flops(int64_t rounds) {
  __m512 sums[16];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  volatile int seed = 0x3f803f80;
  const __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(seed));
  for (int64_t round = 0; round < rounds; ++round)
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, a, a);
  float total = 0;
  for (const __m512 sum : sums) total += _mm512_reduce_add_ps(sum);
  seed = static_cast<int>(total);
  return static_cast<double>(rounds) * 16 * 32 * 2;
}

double peak_int8_ops(int64_t rounds) {
  __m512i sums[16];
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  volatile int seed = 0x01010101;
  const __m512i a = _mm512_set1_epi32(seed);
  for (int64_t round = 0; round < rounds; ++round)
    for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, a);
  int total = 0;
  for (const __m512i sum : sums) total += _mm512_reduce_add_epi32(sum);
  seed = total;
  return static_cast<double>(rounds) * 16 * 64 * 2;
}

}  // namespace

void fill_gemm(KernelTable& table) {
  const auto set = [&](GemmKind kind, GemmTile exact, GemmTile int8) {
    table.gemm[static_cast<int>(kind)] = exact;
    table.gemm_int8[static_cast<int>(kind)] = int8;
  };
  table.activation = Activation::bf16;
  table.token_block = 8;
  set(GemmKind::mxfp4_e8m0, gemm<NibbleLines<false>, ScaleFormat::e8m0_rows>,
      gemm_int8<NibbleBytes<false>, ScaleFormat::e8m0_rows>);
  set(GemmKind::mxfp4_f32, gemm<NibbleLines<false>, ScaleFormat::f32_rows>,
      gemm_int8<NibbleBytes<false>, ScaleFormat::f32_rows>);
  set(GemmKind::fp8_f32, gemm<ByteLines<false>, ScaleFormat::f32_blocks>, nullptr);
  set(GemmKind::bf16, gemm<Bf16Lines, ScaleFormat::none>, nullptr);
  set(GemmKind::int8_f32, gemm<ByteLines<true>, ScaleFormat::f32_rows>, gemm_int8<Int8Bytes, ScaleFormat::f32_rows>);
  set(GemmKind::int4_f32, gemm<NibbleLines<true>, ScaleFormat::f32_rows>,
      gemm_int8<NibbleBytes<true>, ScaleFormat::f32_rows>);
  table.peak_flops = peak_flops;
  table.peak_int8_ops = peak_int8_ops;
}

}  // namespace thermocline::cpu::avx512
