// PackedMatrix: a weight [N, K] in the 16 x 32 tiles that every consumer reads: scalar, AVX2, AVX-512, AMX and CUDA.
// Tiles run along K first, then along N; a ragged edge is padded with zeros. Scales live in a plane of their own.
//
// Inside a tile (rows r = 0..15, columns k = 0..31):
//   mxfp4   4 lines of 64 bytes; line b is 32 little-endian 16-bit words, word 2r+p holds columns 8b + 2s + p in its
//           nibbles s = 0..3, low to high.                      256 bytes
//   int4    as mxfp4, the nibble a two's complement number.          256 bytes
//   fp8     8 lines of 64 bytes; line b holds columns 4b + 2q + p at byte 16 (r/4) + 8q + 2 (r%4) + p, so that
//           interleaving two looked-up byte vectors gives rows x column pairs.   512 bytes
//   int8    as fp8, the byte sign (bit 7) and magnitude: -127..127, and the same look-up serves.  512 bytes
//   bf16    16 lines of 64 bytes; line b is 32 words, word 2r+p is column 2b + p.  1024 bytes
//
// On a machine with several NUMA nodes a matrix is sliced by its rows: node i holds the row groups
// [i groups_per_node, (i + 1) groups_per_node) in an arena of its own, every arena laid out alike.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/base/check.h"

namespace thermocline::cpu {

inline constexpr int64_t kTileRows = 16, kTileCols = 32;

enum class WeightFormat : uint8_t { mxfp4, fp8, bf16, int8, int4 };

enum class ScaleFormat : uint8_t {
  none,       // bf16
  e8m0_rows,  // one byte per row and tile: [k_tiles][16] u8 in a row group (mxfp4)
  f32_rows,   // float32 per row and `scale_tiles` tiles: [ceil(k_tiles / scale_tiles)][16] f32 (int8, int4 in groups of
              // 32, 64 or 128 columns; mxfp4 of checkpoints with F32 scales)
  f32_blocks,  // one float per `scale_tiles` tiles of a row group: [ceil(k_tiles / scale_tiles)] f32 (fp8)
};

constexpr int64_t tile_bytes(WeightFormat format) {
  switch (format) {
    case WeightFormat::mxfp4:
    case WeightFormat::int4:
      return 256;
    case WeightFormat::fp8:
    case WeightFormat::int8:
      return 512;
    case WeightFormat::bf16:
      break;
  }
  return 1024;
}

/// Shape and format of a packed weight; what its two planes weigh.
struct PackedShape {
  WeightFormat format = WeightFormat::bf16;
  ScaleFormat scale = ScaleFormat::none;
  int64_t n = 0, k = 0;
  int64_t scale_tiles = 1;  // f32_rows, f32_blocks: tiles along K that share a scale

  constexpr int64_t row_groups() const { return (n + kTileRows - 1) / kTileRows; }
  constexpr int64_t k_tiles() const { return (k + kTileCols - 1) / kTileCols; }
  constexpr int64_t padded_k() const { return k_tiles() * kTileCols; }
  constexpr int64_t group_tile_bytes() const { return k_tiles() * tile_bytes(format); }
  constexpr int64_t scale_groups() const { return (k_tiles() + scale_tiles - 1) / scale_tiles; }
  constexpr int64_t group_scale_bytes() const {
    switch (scale) {
      case ScaleFormat::none:
        return 0;
      case ScaleFormat::e8m0_rows:
        return k_tiles() * 16;
      case ScaleFormat::f32_rows:
        return scale_groups() * 64;
      case ScaleFormat::f32_blocks:
        return scale_groups() * 4;
    }
    return 0;
  }
  constexpr int64_t group_bytes() const { return group_tile_bytes() + group_scale_bytes(); }
  constexpr int64_t tile_plane_bytes() const { return row_groups() * group_tile_bytes(); }
  constexpr int64_t scale_plane_bytes() const { return row_groups() * group_scale_bytes(); }
  constexpr int64_t bytes() const { return tile_plane_bytes() + scale_plane_bytes(); }
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
  const uint8_t* tiles = nullptr;  // of the slice on node 0
  const uint8_t* scales = nullptr;
  int nodes = 1;                            // slices
  int64_t groups_per_node = 0;              // row groups of a slice; the last slices may hold fewer; 0: one slice
  const ptrdiff_t* node_offsets = nullptr;  // [nodes] bytes from node 0's arena to node i's; null with one slice

  int64_t slice_groups() const { return nodes == 1 ? row_groups() : groups_per_node; }
  int node_of(int64_t group) const { return nodes == 1 ? 0 : static_cast<int>(group / groups_per_node); }
  /// The row groups of a node's slice: [first, last).
  int64_t first_group(int node) const {
    return node * slice_groups() < row_groups() ? node * slice_groups() : row_groups();
  }

  RowGroup row_group(int64_t group) const {
    const int node = node_of(group);
    const int64_t local = group - node * slice_groups();
    const ptrdiff_t offset = nodes == 1 ? 0 : node_offsets[node];
    return {tiles + offset + local * group_tile_bytes(), scales + offset + local * group_scale_bytes(), k_tiles(),
            scale_tiles};
  }
};

/// Packs up to 16 rows of published bytes into one row group's tiles.
///   rows        `valid_rows` rows, `row_bytes` apart: mxfp4 and int4 k/2 bytes (element 2j in the low nibble of byte
///               j), fp8 and int8 (two's complement) k bytes, bf16 2k bytes
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
