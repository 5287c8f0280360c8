// AMX GEMM micro-kernels, compiled twice: on the instructions, and on their emulation (TC_AMX_EMULATED).
//
// A weight tile, widened to bf16, is a B tile of TDPBF16PS: 16 column pairs x 16 rows; up to 16 tokens are an A tile as
// they lie. Few tokens run on vector instructions in the same order of additions, so the switch-over, which is measured
// at start-up, changes no bit. E8M0 scales are folded into the bf16 weights, exactly, and the sums stay in the tile
// over all of K; other scales, and row groups whose scales leave bf16's exponents, take the sums out once a scale.
#include "kernels_cpu/amx/tile.h"
#include "kernels_cpu/kernel_table.h"
#ifdef __AVX512VBMI__
#include "kernels_cpu/avx512/decode.h"
#include "kernels_cpu/prefetch.h"
#endif

#include <atomic>
#include <chrono>

#ifdef TC_AMX_EMULATED
#define TC_AMX_NAMESPACE amx_emulated
#else
#define TC_AMX_NAMESPACE amx
#endif

namespace thermocline::cpu::TC_AMX_NAMESPACE {
namespace {

constexpr int kBlock = 16;  // tokens

// Below so many tokens the vector version is faster. Written at start-up; both versions give the same bits.
std::atomic<int> switch_over = 4;

// Sums in tile 0, m tokens in tile 1, weights in tile 2.
void configure(int m, int token_bytes, int weight_rows) {
  tile::Config config;
  config.set(0, m, 64);
  config.set(1, m, token_bytes);
  config.set(2, weight_rows, 64);
  tile::load_config(config);
}

// --- weights to B tiles ---

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
  else if constexpr (format == WeightFormat::int8)
    decode(ByteLines<true>());
  else
    decode(Bf16Lines());
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

// Multiplies every row of a widened tile by its power of two: adds to the exponent of what is not zero.
void fold(const uint8_t* exponents, uint8_t* lines) {
  uint16_t steps[32];
  for (int r = 0; r < 16; ++r) steps[2 * r] = steps[2 * r + 1] = static_cast<uint16_t>((exponents[r] - 127) << 7);
  for (int line = 0; line < 16; ++line) {
    uint16_t words[32];
    std::memcpy(words, lines + line * 64, 64);
    for (int i = 0; i < 32; ++i) words[i] = static_cast<uint16_t>(words[i] + ((words[i] & 0x7fff) != 0 ? steps[i] : 0));
    std::memcpy(lines + line * 64, words, 64);
  }
}

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

// --- bf16 activations ---

// Sums of tiles [first, last) without scales (with them where folded): c [m, 16].
template <WeightFormat format>
__attribute__((noinline)) void sum_tiles_amx(const RowGroup& w, const uint8_t* x, int m, int64_t first, int64_t last,
                                             bool folded, float* c) {
  alignas(64) uint8_t lines[1024];
  tile::zero<0>();
  for (int64_t t = first; t < last; ++t) {
    widen<format>(w.tiles + t * tile_bytes(format), lines);
    if (folded) fold(static_cast<const uint8_t*>(w.scales) + t * 16, lines);
    tile::load<1>(x + t * m * 64, 64);
    tile::load<2>(lines, 64);
    tile::dot_bf16<0, 1, 2>();
  }
  tile::store<0>(c, 64);
}

template <WeightFormat format>
__attribute__((noinline)) void sum_tiles_vector(const RowGroup& w, const uint8_t* x, int m, int64_t first, int64_t last,
                                                bool folded, float* c) {
  alignas(64) uint8_t lines[1024];
  for (int i = 0; i < m; ++i) tile::Row16::zero().store(c + i * 16);
  for (int64_t t = first; t < last; ++t) {
    widen<format>(w.tiles + t * tile_bytes(format), lines);
    if (folded) fold(static_cast<const uint8_t*>(w.scales) + t * 16, lines);
    for (int i = 0; i < m; ++i)
      tile::dot_bf16_row(reinterpret_cast<const uint16_t*>(x + (t * m + i) * 64), lines, 64, 16,
                         tile::Row16::load(c + i * 16))
          .store(c + i * 16);
  }
}

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

template <WeightFormat format, ScaleFormat scale>
void gemm(const RowGroup& w, const void* x_void, int m, float* y) {
  const uint8_t* x = static_cast<const uint8_t*>(x_void);
  const bool on_tiles = m >= switch_over;
  if (on_tiles) configure(m, 64, 16);
  const auto sum = [&](int64_t first, int64_t last, bool folded, float* c) {
    const tile::FlushDenormals flush;
    (on_tiles ? sum_tiles_amx<format> : sum_tiles_vector<format>)(w, x, m, first, last, folded, c);
  };
  if (scale == ScaleFormat::none || (scale == ScaleFormat::e8m0_rows && folds(w))) {
    sum(0, w.k_tiles, scale == ScaleFormat::e8m0_rows, y);
  } else {
    for (int i = 0; i < m * 16; ++i) y[i] = 0;
    const int64_t span = scale == ScaleFormat::e8m0_rows ? 1 : w.scale_tiles;
    alignas(64) float c[kBlock * 16];
    for (int64_t first = 0; first < w.k_tiles; first += span) {
      sum(first, first + span < w.k_tiles ? first + span : w.k_tiles, false, c);
      float scales[16];
      for (int64_t r = 0; r < 16; ++r) scales[r] = tile_scale(scale, w, first, r);
      for (int i = 0; i < m; ++i)
        for (int r = 0; r < 16; ++r) y[i * 16 + r] = __builtin_fmaf(c[i * 16 + r], scales[r], y[i * 16 + r]);
    }
  }
  if (on_tiles) tile::release();
}

// --- int8 activations: integer sums are exact in any order ---

template <WeightFormat format, ScaleFormat scale>
void gemm_int8(const RowGroup& w, const void* x_void, int m, float* y) {
  constexpr float kUnit = format == WeightFormat::mxfp4 ? 0.5f : 1.0f;
  const Int8Chunk* x = static_cast<const Int8Chunk*>(x_void);
  const bool on_tiles = m >= switch_over;
  if (on_tiles) configure(m, 32, 8);
  alignas(64) uint8_t lines[512];
  alignas(64) int32_t dots[kBlock * 16];
  for (int i = 0; i < m * 16; ++i) y[i] = 0;
  for (int64_t t = 0; t < w.k_tiles; ++t) {
    widen_int8<format>(w.tiles + t * tile_bytes(format), lines);
    if (on_tiles) {
      tile::zero<0>();
      tile::load<1>(x[t * m].codes, sizeof(Int8Chunk));
      tile::load<2>(lines, 64);
      tile::dot_int8<0, 1, 2>();
      tile::store<0>(dots, 64);
    } else {
      for (int i = 0; i < m; ++i) {
        int32_t sums[16] = {};
        for (int k = 0; k < 8; ++k)
          for (int r = 0; r < 16; ++r)
            for (int j = 0; j < 4; ++j)
              sums[r] += static_cast<int8_t>(lines[k * 64 + r * 4 + j]) * x[t * m + i].codes[k * 4 + j];
        std::memcpy(dots + i * 16, sums, sizeof sums);
      }
    }
    float values[16];
    for (int64_t r = 0; r < 16; ++r) values[r] = tile_scale(scale, w, t, r) * kUnit;
    for (int i = 0; i < m; ++i)
      for (int r = 0; r < 16; ++r)
        y[i * 16 + r] =
            __builtin_fmaf(static_cast<float>(dots[i * 16 + r]), values[r] * x[t * m + i].scale, y[i * 16 + r]);
  }
  if (on_tiles) tile::release();
}

// --- peaks and calibration ---

// Four independent sums; dot(): four tile products of 16 x 16 x (64 bytes).
template <class Dots>
int64_t run_peak(int64_t rounds, const Dots& dots) {
  alignas(64) uint8_t data[1024] = {};
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

void set_switch_over(int tokens) { switch_over = tokens; }

// Times both versions of the MXFP4 kernel on weights in cache, as the decoding before them is the same.
int calibrate() {
  constexpr int64_t kTiles = 64;
  static uint8_t tiles[kTiles * 256], scales[kTiles * 16];
  alignas(64) static uint8_t x[kTiles * kBlock * 64];
  std::memset(scales, 127, sizeof scales);
  const RowGroup w{tiles, scales, kTiles, 1};
  float y[kBlock * 16];
  const auto seconds = [&](int m, int threshold) {
    switch_over = threshold;
    double best = 1;
    for (int round = 0; round < 5; ++round) {
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < 8; ++i) gemm<WeightFormat::mxfp4, ScaleFormat::e8m0_rows>(w, x, m, y);
      const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      best = elapsed < best ? elapsed : best;
    }
    return best;
  };
  int tokens = 1;
  while (tokens <= kBlock && seconds(tokens, 1) > seconds(tokens, kBlock + 1)) ++tokens;
  switch_over = tokens;
  return tokens;
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
  table.set_switch_over = set_switch_over;
  table.calibrate_switch_over = calibrate;
#ifdef TC_AMX_EMULATED
  table.isa = Isa::amx_emulated;
#else
  table.isa = Isa::amx;
#endif
}

}  // namespace thermocline::cpu::TC_AMX_NAMESPACE
