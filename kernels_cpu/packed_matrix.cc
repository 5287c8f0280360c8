#include "kernels_cpu/packed_matrix.h"

#include <emmintrin.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "runtime/base/number_formats.h"

namespace thermocline::cpu {
namespace {

uint32_t load_u32(const std::byte* bytes, int64_t available) {
  uint32_t word = 0;
  if (available > 0) std::memcpy(&word, bytes, static_cast<size_t>(std::min<int64_t>(available, 4)));
  return word;
}

// Nibbles 0, 2, 4, 6 of x, gathered into 16 bits.
uint32_t even_nibbles(uint32_t x) {
  x &= 0x0f0f0f0fu;
  x = (x | x >> 4) & 0x00ff00ffu;
  return (x | x >> 8) & 0xffffu;
}

// Four source bytes of row r become one 32-bit word of the tile, in every format; what differs is which and where.
void pack_nibble_row(const std::byte* row, int64_t bytes, int64_t r, int64_t k_tiles, uint8_t* tiles) {
  for (int64_t word = 0; word < k_tiles * 4; ++word) {  // word = tile * 4 + line: eight columns
    const uint32_t x = load_u32(row + word * 4, bytes - word * 4);
    const uint32_t packed = even_nibbles(x) | even_nibbles(x >> 4) << 16;
    std::memcpy(tiles + word * 64 + r * 4, &packed, 4);
  }
}

// Two's complement bytes to sign and magnitude; -128 becomes -127.
uint32_t sign_magnitude(uint32_t x) {
  uint32_t out = 0;
  for (int shift = 0; shift < 32; shift += 8) {
    const int value = std::max<int>(static_cast<int8_t>(x >> shift), -127);
    out |= static_cast<uint32_t>(value < 0 ? 128 - value : value) << shift;
  }
  return out;
}

template <bool is_int8>
void pack_byte_row(const std::byte* row, int64_t bytes, int64_t r, int64_t k_tiles, uint8_t* tiles) {
  for (int64_t word = 0; word < k_tiles * 8; ++word) {  // word = tile * 8 + line: four columns
    uint32_t x = load_u32(row + word * 4, bytes - word * 4);
    if constexpr (is_int8) x = sign_magnitude(x);
    const uint16_t pairs[2] = {static_cast<uint16_t>(x), static_cast<uint16_t>(x >> 16)};
    uint8_t* line = tiles + word * 64 + 16 * (r / 4) + 2 * (r % 4);
    std::memcpy(line, &pairs[0], 2);
    std::memcpy(line + 8, &pairs[1], 2);
  }
}

void pack_bf16_row(const std::byte* row, int64_t bytes, int64_t r, int64_t k_tiles, uint8_t* tiles) {
  for (int64_t word = 0; word < k_tiles * 16; ++word) {  // word = tile * 16 + line: two columns
    const uint32_t x = load_u32(row + word * 4, bytes - word * 4);
    std::memcpy(tiles + word * 64 + r * 4, &x, 4);
  }
}

// Whole tiles of 16 whole rows, four rows at a time: the words of four rows change places, so that those of one line
// lie together. SSE2 is on every x86-64. `arrange` puts the four rows' words of one line into the line's order.
template <class Arrange>
void pack_full_tiles(const std::byte* rows, int64_t row_bytes, int64_t tiles, int64_t lines, uint8_t* out,
                     const Arrange& arrange) {
  for (int64_t r = 0; r < kTileRows; r += 4) {
    const std::byte* row = rows + r * row_bytes;
    for (int64_t line = 0; line < tiles * lines; line += 4) {
      const auto load = [&](int64_t i) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i * row_bytes + line * 4));
      };
      const __m128i a = load(0), b = load(1), c = load(2), d = load(3);
      const __m128i ab_low = _mm_unpacklo_epi32(a, b), ab_high = _mm_unpackhi_epi32(a, b),
                    cd_low = _mm_unpacklo_epi32(c, d), cd_high = _mm_unpackhi_epi32(c, d);
      const __m128i words[4] = {_mm_unpacklo_epi64(ab_low, cd_low), _mm_unpackhi_epi64(ab_low, cd_low),
                                _mm_unpacklo_epi64(ab_high, cd_high), _mm_unpackhi_epi64(ab_high, cd_high)};
      for (int64_t i = 0; i < 4; ++i)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (line + i) * 64 + r * 4), arrange(words[i]));
    }
  }
}

// Nibbles 0, 2, 4, 6 of every 32-bit word to its lower half, 1, 3, 5, 7 to its upper.
__m128i arrange_nibbles(__m128i x) {
  const __m128i nibbles = _mm_set1_epi32(0x0f0f0f0f), bytes = _mm_set1_epi32(0x00ff00ff);
  const auto gather = [&](__m128i v) {
    v = _mm_and_si128(v, nibbles);
    v = _mm_and_si128(_mm_or_si128(v, _mm_srli_epi32(v, 4)), bytes);
    return _mm_or_si128(v, _mm_srli_epi32(v, 8));  // the lower half holds the four; above lie leftovers
  };
  const __m128i even = _mm_and_si128(gather(x), _mm_set1_epi32(0xffff));
  return _mm_or_si128(even, _mm_slli_epi32(gather(_mm_srli_epi32(x, 4)), 16));
}

// The lower halves of four words, then their upper halves.
__m128i arrange_bytes(__m128i x) {
  return _mm_shuffle_epi32(_mm_shufflehi_epi16(_mm_shufflelo_epi16(x, 0xd8), 0xd8), 0xd8);
}

}  // namespace

void pack_row_group(const PackedShape& shape, const std::byte* rows, int64_t row_bytes, int64_t valid_rows,
                    uint8_t* tiles) {
  if (valid_rows == kTileRows && shape.k % kTileCols == 0) {
    switch (shape.format) {
      case WeightFormat::mxfp4:
      case WeightFormat::int4:
        return pack_full_tiles(rows, row_bytes, shape.k_tiles(), 4, tiles, arrange_nibbles);
      case WeightFormat::fp8:
        return pack_full_tiles(rows, row_bytes, shape.k_tiles(), 8, tiles, arrange_bytes);
      case WeightFormat::bf16:
        return pack_full_tiles(rows, row_bytes, shape.k_tiles(), 16, tiles, [](__m128i x) { return x; });
      case WeightFormat::int8:
        break;
    }
  }
  if (valid_rows < kTileRows) std::memset(tiles, 0, static_cast<size_t>(shape.group_tile_bytes()));
  const auto pack = shape.format == WeightFormat::bf16   ? pack_bf16_row
                    : shape.format == WeightFormat::fp8  ? pack_byte_row<false>
                    : shape.format == WeightFormat::int8 ? pack_byte_row<true>
                                                         : pack_nibble_row;
  for (int64_t r = 0; r < valid_rows; ++r) pack(rows + r * row_bytes, row_bytes, r, shape.k_tiles(), tiles);
}

namespace {

// The float values of all e4m3 codes: looked up, as every element of a tile is decoded for every token.
const float* e4m3_table() {
  static const auto table = [] {
    std::array<float, 256> values;
    for (int code = 0; code < 256; ++code)
      values[static_cast<size_t>(code)] = e4m3_to_float(static_cast<uint8_t>(code));
    return values;
  }();
  return table.data();
}

const float* int8_table() {
  static const auto table = [] {
    std::array<float, 256> values;
    for (int code = 0; code < 256; ++code)
      values[static_cast<size_t>(code)] = static_cast<float>(code < 128 ? code : 128 - code);
    return values;
  }();
  return table.data();
}

constexpr float kInt4[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};

// One line of a tile: 16 rows, columns 8b.. (mxfp4), 4b.. (fp8) or 2b.. (bf16); out is the first of these columns.
void decode_nibble_line(const float* table, const uint8_t* line, float* out) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    uint32_t words;
    std::memcpy(&words, line + 4 * r, 4);
    for (int64_t s = 0; s < 4; ++s, words >>= 4) {
      out[2 * s * kTileRows + r] = table[words & 15];
      out[(2 * s + 1) * kTileRows + r] = table[words >> 16 & 15];
    }
  }
}

void decode_byte_line(const float* table, const uint8_t* line, float* out) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    const uint8_t* codes = line + 16 * (r / 4) + 2 * (r % 4);
    for (int64_t q = 0; q < 2; ++q)
      for (int64_t p = 0; p < 2; ++p) out[(2 * q + p) * kTileRows + r] = table[codes[8 * q + p]];
  }
}

void decode_bf16_line(const uint8_t* line, float* out) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    uint32_t words;
    std::memcpy(&words, line + 4 * r, 4);
    out[r] = std::bit_cast<float>(words << 16);
    out[kTileRows + r] = std::bit_cast<float>(words & 0xffff0000u);
  }
}

}  // namespace

void decode_tile(WeightFormat format, const uint8_t* tile, float* out) {
  if (format == WeightFormat::mxfp4 || format == WeightFormat::int4) {
    const float* const table = format == WeightFormat::mxfp4 ? kE2m1 : kInt4;
    for (int64_t line = 0; line < 4; ++line) decode_nibble_line(table, tile + line * 64, out + line * 8 * kTileRows);
  } else if (format == WeightFormat::fp8 || format == WeightFormat::int8) {
    const float* const table = format == WeightFormat::fp8 ? e4m3_table() : int8_table();
    for (int64_t line = 0; line < 8; ++line) decode_byte_line(table, tile + line * 64, out + line * 4 * kTileRows);
  } else {
    for (int64_t line = 0; line < 16; ++line) decode_bf16_line(tile + line * 64, out + line * 2 * kTileRows);
  }
}

float tile_scale(ScaleFormat format, const RowGroup& group, int64_t tile, int64_t row) {
  switch (format) {
    case ScaleFormat::none:
      return 1.0f;
    case ScaleFormat::e8m0_rows:
      return e8m0_to_float(static_cast<const uint8_t*>(group.scales)[tile * 16 + row]);
    case ScaleFormat::f32_rows:
      return static_cast<const float*>(group.scales)[tile / group.scale_tiles * 16 + row];
    case ScaleFormat::f32_blocks:
      return static_cast<const float*>(group.scales)[tile / group.scale_tiles];
  }
  return 1.0f;
}

float packed_element(const PackedMatrix& matrix, int64_t n, int64_t k) {
  const RowGroup group = matrix.row_group(n / kTileRows);
  const int64_t tile = k / kTileCols;
  float values[kTileRows * kTileCols];
  decode_tile(matrix.format, group.tiles + tile * tile_bytes(matrix.format), values);
  return values[k % kTileCols * kTileRows + n % kTileRows] * tile_scale(matrix.scale, group, tile, n % kTileRows);
}

}  // namespace thermocline::cpu
