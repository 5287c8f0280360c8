#include "kernels_cpu/packed_matrix.h"

#include <algorithm>
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
void pack_mxfp4_row(const std::byte* row, int64_t bytes, int64_t r, int64_t k_tiles, uint8_t* tiles) {
  for (int64_t word = 0; word < k_tiles * 4; ++word) {  // word = tile * 4 + line: eight columns
    const uint32_t x = load_u32(row + word * 4, bytes - word * 4);
    const uint32_t packed = even_nibbles(x) | even_nibbles(x >> 4) << 16;
    std::memcpy(tiles + word * 64 + r * 4, &packed, 4);
  }
}

void pack_fp8_row(const std::byte* row, int64_t bytes, int64_t r, int64_t k_tiles, uint8_t* tiles) {
  for (int64_t word = 0; word < k_tiles * 8; ++word) {  // word = tile * 8 + line: four columns
    const uint32_t x = load_u32(row + word * 4, bytes - word * 4);
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

}  // namespace

void pack_row_group(const PackedShape& shape, const std::byte* rows, int64_t row_bytes, int64_t valid_rows,
                    uint8_t* tiles) {
  if (valid_rows < kTileRows) std::memset(tiles, 0, static_cast<size_t>(shape.group_tile_bytes()));
  const auto pack = shape.format == WeightFormat::mxfp4 ? pack_mxfp4_row
                    : shape.format == WeightFormat::fp8 ? pack_fp8_row
                                                        : pack_bf16_row;
  for (int64_t r = 0; r < valid_rows; ++r) pack(rows + r * row_bytes, row_bytes, r, shape.k_tiles(), tiles);
}

void decode_tile(WeightFormat format, const uint8_t* tile, float* out) {
  for (int64_t col = 0; col < kTileCols; ++col) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      float& value = out[col * kTileRows + r];
      const int64_t p = col % 2;
      if (format == WeightFormat::mxfp4) {
        const uint8_t* word = tile + col / 8 * 64 + 2 * (2 * r + p);
        const int64_t s = col % 8 / 2;
        value = kE2m1[(word[s / 2] >> (4 * (s % 2))) & 15];
      } else if (format == WeightFormat::fp8) {
        value = e4m3_to_float(tile[col / 4 * 64 + 16 * (r / 4) + 8 * (col % 4 / 2) + 2 * (r % 4) + p]);
      } else {
        bf16 word;
        std::memcpy(&word, tile + col / 2 * 64 + 2 * (2 * r + p), 2);
        value = bf16_to_float(word);
      }
    }
  }
}

float tile_scale(ScaleFormat format, const RowGroup& group, int64_t tile, int64_t row) {
  switch (format) {
    case ScaleFormat::none:
      return 1.0f;
    case ScaleFormat::e8m0_rows:
      return e8m0_to_float(static_cast<const uint8_t*>(group.scales)[tile * 16 + row]);
    case ScaleFormat::f32_rows:
      return static_cast<const float*>(group.scales)[tile * 16 + row];
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
