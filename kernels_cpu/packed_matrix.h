// PackedMatrix: a weight [N, K] in the 16 x 32 tiles that every consumer reads: scalar, AVX2, AVX-512, AMX and CUDA.
// Tiles run along K first, then along N; a ragged edge is padded with zeros. Scales live in a plane of their own.
//
// Inside a tile (rows r = 0..15, columns k = 0..31):
//   mxfp4   4 lines of 64 bytes; line b is 32 little-endian 16-bit words, word 2r+p holds columns 8b + 2s + p in its
//           nibbles s = 0..3, low to high.                      256 bytes
//   fp8     8 lines of 64 bytes; line b holds columns 4b + 2q + p at byte 16 (r/4) + 8q + 2 (r%4) + p, so that
//           interleaving two looked-up byte vectors gives rows x column pairs.   512 bytes
//   bf16    16 lines of 64 bytes; line b is 32 words, word 2r+p is column 2b + p.  1024 bytes
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/base/check.h"

namespace thermocline::cpu {

inline constexpr int64_t kTileRows = 16, kTileCols = 32;

enum class WeightFormat : uint8_t { mxfp4, fp8, bf16 };

enum class ScaleFormat : uint8_t {
  none,        // bf16
  e8m0_rows,   // one byte per row and tile: [k_tiles][16] u8 in a row group (mxfp4)
  f32_rows,    // the same in float32: [k_tiles][16] f32 (mxfp4 of checkpoints with F32 scales)
  f32_blocks,  // one float per `scale_tiles` tiles of a row group: [ceil(k_tiles / scale_tiles)] f32 (fp8)
};

constexpr int64_t tile_bytes(WeightFormat format) {
  return format == WeightFormat::mxfp4 ? 256 : format == WeightFormat::fp8 ? 512 : 1024;
}

/// Shape and format of a packed weight; what its two planes weigh.
struct PackedShape {
  WeightFormat format = WeightFormat::bf16;
  ScaleFormat scale = ScaleFormat::none;
  int64_t n = 0, k = 0;
  int64_t scale_tiles = 1;  // f32_blocks: tiles along K that share a scale

  int64_t row_groups() const { return (n + kTileRows - 1) / kTileRows; }
  int64_t k_tiles() const { return (k + kTileCols - 1) / kTileCols; }
  int64_t padded_k() const { return k_tiles() * kTileCols; }
  int64_t group_tile_bytes() const { return k_tiles() * tile_bytes(format); }
  int64_t group_scale_bytes() const {
    switch (scale) {
      case ScaleFormat::none:
        return 0;
      case ScaleFormat::e8m0_rows:
        return k_tiles() * 16;
      case ScaleFormat::f32_rows:
        return k_tiles() * 64;
      case ScaleFormat::f32_blocks:
        return (k_tiles() + scale_tiles - 1) / scale_tiles * 4;
    }
    return 0;
  }
  int64_t tile_plane_bytes() const { return row_groups() * group_tile_bytes(); }
  int64_t scale_plane_bytes() const { return row_groups() * group_scale_bytes(); }
  int64_t bytes() const { return tile_plane_bytes() + scale_plane_bytes(); }
};

/// One row group: 16 outputs, all of K. What a micro-kernel gets.
struct RowGroup {
  const uint8_t* tiles = nullptr;
  const void* scales = nullptr;
  int64_t k_tiles = 0;
  int64_t scale_tiles = 1;
};

/// A borrowed packed weight.
struct PackedMatrix : PackedShape {
  const uint8_t* tiles = nullptr;
  const uint8_t* scales = nullptr;

  RowGroup row_group(int64_t group) const {
    return {tiles + group * group_tile_bytes(), scales + group * group_scale_bytes(), k_tiles(), scale_tiles};
  }
  /// Row groups [first, first + count) as a matrix of their own (wo_a: one matrix per output group).
  PackedMatrix slice(int64_t first_row, int64_t rows) const {
    TC_CHECK_EQ(first_row % kTileRows, 0);
    PackedMatrix part = *this;
    part.n = rows;
    part.tiles += first_row / kTileRows * group_tile_bytes();
    part.scales += first_row / kTileRows * group_scale_bytes();
    return part;
  }
};

/// Packs up to 16 rows of published bytes into one row group's tiles.
///   rows        `valid_rows` rows, `row_bytes` apart: mxfp4 k/2 bytes (element 2j in the low nibble of byte j), fp8 k
///               bytes, bf16 2k bytes
///   tiles       group_tile_bytes() bytes  out, padding zeroed
void pack_row_group(const PackedShape& shape, const std::byte* rows, int64_t row_bytes, int64_t valid_rows,
                    uint8_t* tiles);

/// Element [n, k] as the float it stands for, scale included. Slow: for tests and the reference path.
float packed_element(const PackedMatrix& matrix, int64_t n, int64_t k);

/// The 16-row x 32-column code values of tile `t` of a row group, without scales. out [32][16], column-major.
void decode_tile(WeightFormat format, const uint8_t* tile, float* out);

/// The scale of (row, tile) in a row group, for any scale format.
float tile_scale(ScaleFormat format, const RowGroup& group, int64_t tile, int64_t row);

}  // namespace thermocline::cpu
