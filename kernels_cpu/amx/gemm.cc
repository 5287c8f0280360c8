// AMX GEMM micro-kernels, compiled three times: on the instructions, on their emulation (TC_AMX_EMULATED), and on the
// emulation with the decoders of the first, which is for tests.
//
// A weight tile, widened to bf16, is a B tile of TDPBF16PS: 16 column pairs x 16 rows; up to 16 tokens are an A tile as
// they lie, and up to four of those share a weight tile. Every number of tokens goes through tiles, so there is one
// order of additions: TDPBF16PS's over all of K. A tile that is loaded right after the stores that made it waits for
// them some 70 cycles, so weights are decoded into a ring and multiplied two tiles later. E8M0 scales are folded into
// the bf16 weights, exactly; other scales, and row groups whose scales leave bf16's exponents, take the sums out once a
// scale.
//
// Instructions per weight tile (objdump of the loops; a token tile adds 1 tileloadd, 1 tdp):
//   mxfp4  4 loads, 12 shifts, 16 vpermw, 16 vpsubsw, 16 stores, 5 for the scale; 1 tileloadd
//   fp8    8 loads, 16 vpermi2b, 8 vpternlogd, 16 vpunpck, 16 stores; 1 tileloadd, a tilestored every 128 columns
//   bf16   1 tileloadd
#include "kernels_cpu/amx/tile.h"
#include "kernels_cpu/kernel_table.h"
#ifdef __AVX512VBMI__
#include "kernels_cpu/avx512/decode.h"
#include "kernels_cpu/prefetch.h"
#endif

#if defined(TC_AMX_EMULATED) && defined(__AVX512VBMI__)
#define TC_AMX_NAMESPACE amx_emulated_avx512
#elif defined(TC_AMX_EMULATED)
#define TC_AMX_NAMESPACE amx_emulated
#else
#define TC_AMX_NAMESPACE amx
#endif

namespace thermocline::cpu::TC_AMX_NAMESPACE {
namespace {

constexpr int kBlock = 64;  // tokens of a call
constexpr int kBehind = 2;  // tiles that a product is behind the decoder
constexpr int kRing = 4;    // widened tiles, more than that

// Tiles: sums of full blocks of 16 tokens 0 .. 3, those of the rest in the one after; a full block's tokens 4, the
// rest's 5; weights 6.
struct Shape {
  int tokens = 0, token_bytes = 0, weight_rows = 0;
  bool operator==(const Shape&) const = default;
};
thread_local Shape configured;

void configure(const Shape& shape) {
  if (configured == shape) return;
  const int full = shape.tokens / 16, rest = shape.tokens % 16;
  tile::Config config;
  for (int i = 0; i < full; ++i) config.set(i, 16, 64);
  if (full > 0) config.set(4, 16, shape.token_bytes);
  if (rest > 0) {
    config.set(full, rest, 64);
    config.set(5, rest, shape.token_bytes);
  }
  config.set(6, shape.weight_rows, 64);
  tile::load_config(config);
  configured = shape;
}

void finish() {
  if (configured == Shape{}) return;
  tile::release();
  configured = {};
}

// --- weights to B tiles ---

#ifdef __AVX512VBMI__
// e2m1 codes as bf16 times 2^123, so that a row's scale 2^(e - 127) is one saturating subtraction of (250 - e) steps of
// the exponent: a zero is 0x8000 and stays so. Exact for e of 3 to 250.
__m512i nibbles_times_scale(const __m512i words, const __m512i down) {
  alignas(64) static constexpr uint16_t kHigh[16] = {0x8000, 0x7c80, 0x7d00, 0x7d40, 0x7d80, 0x7dc0, 0x7e00, 0x7e40,
                                                     0x8000, 0xfc80, 0xfd00, 0xfd40, 0xfd80, 0xfdc0, 0xfe00, 0xfe40};
  const __m512i values = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(kHigh)));
  return _mm512_subs_epi16(_mm512_permutexvar_epi16(words, values), down);
}

void widen_scaled(const uint8_t* tile, const uint8_t* exponents, uint8_t* lines) {
  const __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(exponents)));
  const __m512i steps = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(250), e), 7);
  const __m512i down = _mm512_or_si512(steps, _mm512_slli_epi32(steps, 16));
#pragma GCC unroll 4
  for (int line = 0; line < 4; ++line) {
    IntelAhead::ask(tile + line * 64);
    const __m512i words = _mm512_loadu_si512(tile + line * 64);
    uint8_t* out = lines + line * 256;
    _mm512_store_si512(out, nibbles_times_scale(words, down));
    _mm512_store_si512(out + 64, nibbles_times_scale(_mm512_srli_epi16(words, 4), down));
    _mm512_store_si512(out + 128, nibbles_times_scale(_mm512_srli_epi16(words, 8), down));
    _mm512_store_si512(out + 192, nibbles_times_scale(_mm512_srli_epi16(words, 12), down));
  }
}
#endif

// 16 lines of 32 bf16: column pair x row.
template <WeightFormat format>
void widen(const uint8_t* tile, uint8_t* lines) {
#ifdef __AVX512VBMI__
  const auto decode = [&](const auto& decoder) {
    using Lines = std::remove_cvref_t<decltype(decoder)>;
#pragma GCC unroll 16
    for (int line = 0; line < Lines::kLines; ++line) {
      IntelAhead::ask(tile + line * 64);
      __m512i v[Lines::kVectors];
      decoder.decode(tile + line * 64, v);
      for (int i = 0; i < Lines::kVectors; ++i) _mm512_store_si512(lines + (line * Lines::kVectors + i) * 64, v[i]);
    }
  };
  if constexpr (format == WeightFormat::mxfp4)
    decode(NibbleLines<false>());
  else if constexpr (format == WeightFormat::int4)
    decode(NibbleLines<true>());
  else if constexpr (format == WeightFormat::fp8)
    decode(ByteLines<false>());
  else
    decode(ByteLines<true>());
#else
  float values[kTileRows * kTileCols];
  decode_tile(format, tile, values);
  for (int64_t k = 0; k < kTileCols; ++k)
    for (int64_t r = 0; r < kTileRows; ++r) {  // a weight code is exact in bf16
      const uint16_t word = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, values[k * kTileRows + r]) >> 16);
      std::memcpy(lines + k / 2 * 64 + r * 4 + k % 2 * 2, &word, 2);
    }
#endif
}

#ifndef __AVX512VBMI__
// Multiplies every row of a widened tile by its power of two: adds to the exponent of what is not zero.
void widen_scaled(const uint8_t* tile, const uint8_t* exponents, uint8_t* lines) {
  widen<WeightFormat::mxfp4>(tile, lines);
  uint16_t steps[32];
  for (int r = 0; r < 16; ++r) steps[2 * r] = steps[2 * r + 1] = static_cast<uint16_t>((exponents[r] - 127) << 7);
  for (int line = 0; line < 16; ++line) {
    uint16_t words[32];
    std::memcpy(words, lines + line * 64, 64);
    for (int i = 0; i < 32; ++i) words[i] = static_cast<uint16_t>(words[i] + ((words[i] & 0x7fff) != 0 ? steps[i] : 0));
    std::memcpy(lines + line * 64, words, 64);
  }
}
#endif

// 8 lines of 16 rows x 4 columns, in the column order of Int8Chunk; e2m1 as twice its value.
template <WeightFormat format>
void widen_int8(const uint8_t* tile, uint8_t* lines) {
  constexpr int kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  constexpr float kUnit = format == WeightFormat::mxfp4 ? 2.0f : 1.0f;
#ifdef __AVX512VBMI__
  if constexpr (format != WeightFormat::int8) {
    const NibbleBytes<format == WeightFormat::int4> decoder;
    const __m512i bias = _mm512_set1_epi8(static_cast<char>(decoder.kBias));
    for (int block = 0; block < 4; ++block) {
      for (int line = 0; line < decoder.kLines / 4; ++line)
        IntelAhead::ask(tile + (block * decoder.kLines / 4 + line) * 64);
      __m512i v[2];
      decoder.decode(tile, block, v);
      for (int half = 0; half < 2; ++half)
        _mm512_store_si512(lines + (2 * block + half) * 64, _mm512_sub_epi8(v[half], bias));
    }
    return;
  } else {
    const Int8Bytes decoder;
    for (int block = 0; block < 4; ++block) {
      for (int line = 0; line < decoder.kLines / 4; ++line)
        IntelAhead::ask(tile + (block * decoder.kLines / 4 + line) * 64);
      __m512i v[2];
      decoder.decode(tile, block, v);
      for (int half = 0; half < 2; ++half)
        _mm512_store_si512(lines + (2 * block + half) * 64,
                           _mm512_xor_si512(v[half], _mm512_set1_epi8(static_cast<char>(0x80))));
    }
    return;
  }
#endif
  float values[kTileRows * kTileCols];
  decode_tile(format, tile, values);
  for (int64_t i = 0; i < kTileCols; ++i)
    for (int64_t r = 0; r < kTileRows; ++r)
      lines[i / 4 * 64 + r * 4 + i % 4] =
          static_cast<uint8_t>(static_cast<int8_t>(kUnit * values[(i / 8 * 8 + kOrder[i % 8]) * kTileRows + r]));
}

// Asks for the lines of a bf16 tile some way ahead of it.
inline void ask_ahead([[maybe_unused]] const uint8_t* tile) {
#ifdef __AVX512VBMI__
  for (int line = 0; line < 16; ++line) IntelAhead::ask(tile + line * 64);
#endif
}

template <ScaleFormat scale>
inline void load_scales(const RowGroup& w, int64_t t, float* values) {
#ifdef __AVX512VBMI__
  _mm512_store_ps(values, load_scale<scale>(w, t / w.scale_tiles));
#else
  for (int64_t r = 0; r < 16; ++r) values[r] = tile_scale(scale, w, t, r);
#endif
}

// y[r] += sums[r] * (scales[r] * factor), 16 of them. By hand, as GCC 12 turns rows of 16 inside out.
template <class Sum>
inline __attribute__((always_inline)) void add_scaled(const Sum* sums, const float* scales, float factor, float* y) {
#ifdef __AVX512VBMI__
  __m512 sum;
  if constexpr (std::is_same_v<Sum, float>)
    sum = _mm512_load_ps(sums);
  else
    sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums));
  const __m512 scale = _mm512_mul_ps(_mm512_load_ps(scales), _mm512_set1_ps(factor));
  _mm512_storeu_ps(y, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(y)));
#else
  for (int r = 0; r < 16; ++r) y[r] = __builtin_fmaf(static_cast<float>(sums[r]), scales[r] * factor, y[r]);
#endif
}

// --- products ---

// Calls fn with the numbers of full and partial blocks of 16 tokens as constants.
template <int N, bool r>
struct Blocks {
  static constexpr int full = N;
  static constexpr bool rest = r;
};
template <class Fn>
void with_blocks(int m, const Fn& fn) {
  const bool rest = m % 16 != 0;
  switch (m / 16) {
    case 0:
      return fn(Blocks<0, true>());
    case 1:
      return rest ? fn(Blocks<1, true>()) : fn(Blocks<1, false>());
    case 2:
      return rest ? fn(Blocks<2, true>()) : fn(Blocks<2, false>());
    case 3:
      return rest ? fn(Blocks<3, true>()) : fn(Blocks<3, false>());
    default:
      return fn(Blocks<4, false>());
  }
}

// fn(block, its tokens' tile): every block of 16 tokens, the last of them perhaps fewer.
template <class B, class Fn>
inline __attribute__((always_inline)) void for_blocks(const Fn& fn) {
  using std::integral_constant;
  if constexpr (B::full > 0) fn(integral_constant<int, 0>(), integral_constant<int, 4>());
  if constexpr (B::full > 1) fn(integral_constant<int, 1>(), integral_constant<int, 4>());
  if constexpr (B::full > 2) fn(integral_constant<int, 2>(), integral_constant<int, 4>());
  if constexpr (B::full > 3) fn(integral_constant<int, 3>(), integral_constant<int, 4>());
  if constexpr (B::rest) fn(integral_constant<int, B::full>(), integral_constant<int, 5>());
}

// sums [m, 16] of the tiles to memory, at out.
template <class B>
void store_sums(void* out) {
  for_blocks<B>([&](auto c, auto) { tile::store<c.value>(static_cast<std::byte*>(out) + c.value * 1024, 64); });
}

// --- bf16 activations ---

// Whether every scale of the row group, times a code's exponent, is a bf16 exponent: 126..129 - 127 and one to spare.
bool folds(const RowGroup& w) {
  const uint8_t* exponents = static_cast<const uint8_t*>(w.scales);
  uint8_t low = 255, high = 0;
  for (int64_t i = 0; i < w.k_tiles * 16; ++i) {
    low = exponents[i] < low ? exponents[i] : low;
    high = exponents[i] > high ? exponents[i] : high;
  }
  return low >= 3 && high <= 250;
}

template <WeightFormat format, ScaleFormat scale, class B>
void gemm_m(const RowGroup& w, const uint8_t* x, int m, float* y) {
  const bool folded = scale == ScaleFormat::e8m0_rows && folds(w);
  const int64_t span = scale == ScaleFormat::none || folded ? w.k_tiles
                       : scale == ScaleFormat::e8m0_rows    ? 1
                                                            : w.scale_tiles;  // tiles that share a scale
  configure({m, 64, 16});
  alignas(64) [[maybe_unused]] uint8_t ring[kRing][1024];
  alignas(64) float c[kBlock * 16];
  if (scale != ScaleFormat::none && !folded)
    for (int i = 0; i < m * 16; ++i) y[i] = 0;
  int64_t in_span = 0;
  const auto product = [&](int64_t t) __attribute__((always_inline)) {
    if (in_span == 0) for_blocks<B>([&](auto sum, auto) { tile::zero<sum.value>(); });
    const uint8_t* const weights = w.tiles + t * tile_bytes(format);
    if constexpr (format == WeightFormat::bf16)
      tile::load<6>(weights, 64);  // a packed tile is a B tile already
    else
      tile::load<6>(ring[t % kRing], 64);
    for_blocks<B>([&](auto sum, auto tokens) {
      tile::load<tokens.value>(x + (t * m + 16 * sum.value) * 64, 64);
      tile::dot_bf16<sum.value, tokens.value, 6>();
    });
    if (++in_span < span && t + 1 < w.k_tiles) return;
    in_span = 0;
    if (scale == ScaleFormat::none || folded) return store_sums<B>(y);
    store_sums<B>(c);
    alignas(64) float scales[16];
    load_scales<scale>(w, t, scales);
    for (int i = 0; i < m; ++i) add_scaled(c + i * 16, scales, 1.0f, y + i * 16);
  };
  if constexpr (format == WeightFormat::bf16) {
    for (int64_t t = 0; t < w.k_tiles; ++t) {
      ask_ahead(w.tiles + t * 1024);
      product(t);
    }
  } else {
    for (int64_t t = 0; t < w.k_tiles + kBehind; ++t) {
      const uint8_t* const tile = w.tiles + t * tile_bytes(format);
      if (t < w.k_tiles && folded)
        widen_scaled(tile, static_cast<const uint8_t*>(w.scales) + t * 16, ring[t % kRing]);
      else if (t < w.k_tiles)
        widen<format>(tile, ring[t % kRing]);
      if (t >= kBehind) product(t - kBehind);
    }
  }
}

template <WeightFormat format, ScaleFormat scale>
void gemm(const RowGroup& w, const void* x, int m, float* y) {
  with_blocks(m,
              [&](auto blocks) { gemm_m<format, scale, decltype(blocks)>(w, static_cast<const uint8_t*>(x), m, y); });
}

// --- int8 activations: integer sums are exact in any order ---

template <WeightFormat format, ScaleFormat scale, class B>
void gemm_int8_m(const RowGroup& w, const Int8Chunk* x, int m, float* y) {
  constexpr float kUnit = format == WeightFormat::mxfp4 ? 0.5f : 1.0f;
  configure({m, 32, 8});
  alignas(64) uint8_t ring[kRing][512];
  alignas(64) int32_t dots[2][kBlock * 16];
  for (int i = 0; i < m * 16; ++i) y[i] = 0;
  const auto product = [&](int64_t t) __attribute__((always_inline)) {
    tile::load<6>(ring[t % kRing], 64);
    for_blocks<B>([&](auto sum, auto tokens) {
      tile::zero<sum.value>();
      tile::load<tokens.value>(x[t * m + 16 * sum.value].codes, sizeof(Int8Chunk));
      tile::dot_int8<sum.value, tokens.value, 6>();
    });
    store_sums<B>(dots[t % 2]);
  };
  const auto read_out = [&](int64_t t) __attribute__((always_inline)) {
    alignas(64) float values[16];
    load_scales<scale>(w, t, values);
    for (int r = 0; r < 16; ++r) values[r] *= kUnit;
    for (int i = 0; i < m; ++i) add_scaled(dots[t % 2] + i * 16, values, x[t * m + i].scale, y + i * 16);
  };
  for (int64_t t = 0; t < w.k_tiles + kBehind + 1; ++t) {
    if (t < w.k_tiles) widen_int8<format>(w.tiles + t * tile_bytes(format), ring[t % kRing]);
    if (t > kBehind) read_out(t - kBehind - 1);
    if (t >= kBehind && t < w.k_tiles + kBehind) product(t - kBehind);
  }
}

template <WeightFormat format, ScaleFormat scale>
void gemm_int8(const RowGroup& w, const void* x, int m, float* y) {
  with_blocks(
      m, [&](auto blocks) { gemm_int8_m<format, scale, decltype(blocks)>(w, static_cast<const Int8Chunk*>(x), m, y); });
}

// --- peaks ---

// Four independent sums; dot(): four tile products of 16 x 16 x (64 bytes).
template <class Dots>
int64_t run_peak(int64_t rounds, const Dots& dots) {
  alignas(64) uint8_t data[1024] = {};
  finish();
  tile::Config config;
  for (int t = 0; t < 6; ++t) config.set(t, 16, 64);
  tile::load_config(config);
  tile::load<4>(data, 64);
  tile::load<5>(data, 64);
  const int64_t steps = rounds / 64 + 1;  // a step is 1024 vector multiply-adds
  for (int64_t i = 0; i < steps; ++i) dots();
  tile::release();
  return steps * 4 * 16 * 16;
}

double peak_flops(int64_t rounds) {
  const int64_t sums = run_peak(rounds, [] {
    tile::dot_bf16<0, 4, 5>();
    tile::dot_bf16<1, 4, 5>();
    tile::dot_bf16<2, 4, 5>();
    tile::dot_bf16<3, 4, 5>();
  });
  return static_cast<double>(sums) * 32 * 2;
}

double peak_int8_ops(int64_t rounds) {
  const int64_t sums = run_peak(rounds, [] {
    tile::dot_int8<0, 4, 5>();
    tile::dot_int8<1, 4, 5>();
    tile::dot_int8<2, 4, 5>();
    tile::dot_int8<3, 4, 5>();
  });
  return static_cast<double>(sums) * 64 * 2;
}

}  // namespace

void fill(KernelTable& table) {
  const auto set = [&](GemmKind kind, GemmTile exact, GemmTile int8) {
    table.gemm[static_cast<int>(kind)] = exact;
    table.gemm_int8[static_cast<int>(kind)] = int8;
  };
  using enum WeightFormat;
  using enum ScaleFormat;
  table.activation = Activation::bf16;
  table.token_block = kBlock;
  set(GemmKind::mxfp4_e8m0, gemm<mxfp4, e8m0_rows>, gemm_int8<mxfp4, e8m0_rows>);
  set(GemmKind::mxfp4_f32, gemm<mxfp4, f32_rows>, gemm_int8<mxfp4, f32_rows>);
  set(GemmKind::fp8_f32, gemm<fp8, f32_blocks>, nullptr);
  set(GemmKind::bf16, gemm<WeightFormat::bf16, none>, nullptr);
  set(GemmKind::int8_f32, gemm<int8, f32_rows>, gemm_int8<int8, f32_rows>);
  set(GemmKind::int4_f32, gemm<int4, f32_rows>, gemm_int8<int4, f32_rows>);
#ifdef __AVX512VBMI__
  table.prefetch = IntelAhead::kText;
#endif
  table.peak_flops = peak_flops;
  table.peak_int8_ops = peak_int8_ops;
  table.finish = finish;
#ifdef TC_AMX_EMULATED
  table.isa = Isa::amx_emulated;
#else
  table.isa = Isa::amx;
#endif
}

}  // namespace thermocline::cpu::TC_AMX_NAMESPACE
