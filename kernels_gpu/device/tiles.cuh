// A warp's product of packed tiles and bf16 rows: 16 outputs of one or more matrices over all of K, for up to 8 kFrags
// tokens. Tiles stream through a ring of cp.async stages in shared memory, 1 KiB a stage; a lane unpacks its share of a
// tile straight into the A fragments of mma.m16n8k16. K may be permuted as long as both operands agree, so lane 4g + c
// takes columns 8c .. 8c + 7 of a tile: rows g and g + 8 of the weights, and of token g 16 bytes.
#pragma once

#include "kernels_gpu/device/device_view.h"
#include "kernels_gpu/device/numbers.cuh"
#include "kernels_gpu/kernels.h"

namespace thermocline::gpu::dev {

using cpu::ScaleFormat;
using cpu::WeightFormat;

inline constexpr int kStageBytes = 1024;
inline constexpr int kStageScaleBytes = 64;  // E8M0 bytes of a stage's tiles, at most 4 tiles
inline constexpr int kRingStage = kStageBytes + kStageScaleBytes;

/// Two bf16 products of codes by a power of two that moves their exponent to its place; exact, subnormals included.
template <int s>
TC_DEVICE uint32_t e2m1_pair(uint32_t word) {  // codes at bits 4s and 4s + 16
  const uint32_t magnitude = s < 2 ? word << (6 - 4 * (s & 1)) : word >> ((4 * s - 6) & 31);
  return mul_bf16x2((word << (12 - 4 * s) & 0x80008000u) | (magnitude & 0x01c001c0u), 0x7e807e80u);
}

/// The lane's columns 8c .. 8c + 7 of row `row` of a tile at byte `at` of the ring: four bf16 pairs.
template <WeightFormat format, class Ring>
TC_DEVICE void load_row(const Ring& ring, int at, int row, uint32_t (&pairs)[4]) {
  const int c = lane() % 4;
  if constexpr (format == WeightFormat::mxfp4) {
    const uint32_t word = load_shared_as<uint32_t>(ring, at + 64 * c + 4 * row);
    pairs[0] = e2m1_pair<0>(word);
    pairs[1] = e2m1_pair<1>(word);
    pairs[2] = e2m1_pair<2>(word);
    pairs[3] = e2m1_pair<3>(word);
  } else if constexpr (format == WeightFormat::fp8) {
    TC_UNROLL
    for (int s = 0; s < 4; ++s) {
      const uint32_t codes =
          load_shared_as<uint16_t>(ring, at + 64 * (2 * c + s / 2) + 16 * (row / 4) + 2 * (row % 4) + 8 * (s % 2));
      pairs[s] = e4m3_pair((codes & 255) | codes >> 8 << 16);
    }
  } else {
    TC_UNROLL
    for (int s = 0; s < 4; ++s) pairs[s] = load_shared_as<uint32_t>(ring, at + 64 * (4 * c + s) + 4 * row);
  }
}

template <WeightFormat format>
inline constexpr int kTileBytes = static_cast<int>(cpu::tile_bytes(format));
template <WeightFormat format>
inline constexpr int kTilesPerStage = kStageBytes / kTileBytes<format>;

/// One row group in device memory.
struct TileSource {
  DeviceView<const uint8_t, 1> tiles, scales;
};
TC_DEVICE TileSource row_group(const DeviceMatrix& w, int64_t group, int64_t slot_offset = 0) {
  const int64_t tile_bytes = w.group_tile_bytes(), scale_bytes = w.group_scale_bytes();
  return {{w.tiles.pointer + slot_offset + group * tile_bytes, {tile_bytes}},
          {w.scales.pointer + slot_offset + group * scale_bytes, {scale_bytes}}};
}

/// Bytes of shared memory a warp's ring takes.
constexpr int ring_bytes(int groups, int depth) { return groups * depth * kRingStage; }

/// sums[group][frag] += the products; lane 4g + c holds rows g (0, 1) and g + 8 (2, 3), tokens 8 frag + 2c and + 1.
///   x, x_at   element offsets of tokens 8 frag + g in x; negative: no such token
///   ring, at  ring_bytes(kGroups, kDepth) bytes of shared memory that are this warp's
template <WeightFormat format, ScaleFormat scale, int kGroups, int kFrags, int kDepth, class Ring>
TC_DEVICE void warp_gemm(const TileSource (&source)[kGroups], int k_tiles, int scale_tiles,
                         const DeviceView<const bf16, 1>& x, const int64_t (&x_at)[kFrags], Ring& ring, int at,
                         float (&sums)[kGroups][kFrags][4]) {
  constexpr int kTiles = kTilesPerStage<format>;
  const int g = lane() / 4, c = lane() % 4, stages = (k_tiles + kTiles - 1) / kTiles;
  const auto start = [&](int stage) {
    if (stage < stages) {
      TC_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        const int to = at + (group * kDepth + stage % kDepth) * kRingStage;
        const int bytes = min_of(kTiles, k_tiles - stage * kTiles) * kTileBytes<format>;
        TC_UNROLL
        for (int i = 0; i < kStageBytes / 512; ++i) {
          const int b = 512 * i + 16 * lane();
          if (b < bytes) cp_async16(ring, to + b, source[group].tiles.read(int64_t{stage} * kStageBytes + b, 16));
        }
        if constexpr (scale == ScaleFormat::e8m0_rows) {
          const int b = 16 * lane();
          if (b < bytes / kTileBytes<format> * 16)
            cp_async16(ring, to + kStageBytes + b, source[group].scales.read(int64_t{stage} * 16 * kTiles + b, 16));
        }
      }
    }
    cp_async_commit();
  };
  TC_UNROLL
  for (int stage = 0; stage < kDepth - 1; ++stage) start(stage);
  for (int stage = 0; stage < stages; ++stage) {
    cp_async_wait<kDepth - 2>();
    warp_sync();  // every lane's bytes are there, and the stage before has been read by all
    start(stage + kDepth - 1);
    [[maybe_unused]] constexpr int kUnrolled = kFrags == 8 ? 1 : kTiles;  // few tokens: addresses become constants
    TC_UNROLL_BY(kUnrolled)
    for (int t = 0; t < kTiles; ++t) {
      const int tile = stage * kTiles + t;
      if (tile >= k_tiles) break;
      uint32_t low[kGroups][4], high[kGroups][4];
      float scales[kGroups][2];
      TC_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        const int from = at + (group * kDepth + stage % kDepth) * kRingStage;
        load_row<format>(ring, from + t * kTileBytes<format>, g, low[group]);
        load_row<format>(ring, from + t * kTileBytes<format>, g + 8, high[group]);
        if constexpr (scale == ScaleFormat::e8m0_rows) {
          scales[group][0] = e8m0(ring[from + kStageBytes + t * 16 + g]);
          scales[group][1] = e8m0(ring[from + kStageBytes + t * 16 + g + 8]);
        } else if constexpr (scale == ScaleFormat::f32_rows) {
          const int64_t row = (int64_t{tile} / scale_tiles * 16 + g) * 4;
          scales[group][0] = *reinterpret_cast<const float*>(source[group].scales.read(row, 4));
          scales[group][1] = *reinterpret_cast<const float*>(source[group].scales.read(row + 32, 4));
        } else if constexpr (scale == ScaleFormat::f32_blocks) {
          scales[group][0] = scales[group][1] =
              *reinterpret_cast<const float*>(source[group].scales.read(int64_t{tile} / scale_tiles * 4, 4));
        } else {
          scales[group][0] = scales[group][1] = 1;
        }
      }
      TC_UNROLL
      for (int frag = 0; frag < kFrags; ++frag) {
        Vec4 tokens = {};
        if (x_at[frag] >= 0) tokens = *reinterpret_cast<const Vec4*>(x.read(x_at[frag] + tile * 32 + 8 * c, 8));
        TC_UNROLL
        for (int group = 0; group < kGroups; ++group) {
          float d[4] = {};
          TC_UNROLL
          for (int half = 0; half < 2; ++half) {
            const uint32_t a[4] = {low[group][2 * half], high[group][2 * half], low[group][2 * half + 1],
                                   high[group][2 * half + 1]};
            const uint32_t b[2] = {tokens.x[2 * half], tokens.x[2 * half + 1]};
            mma_bf16_16816(d, a, b);
          }
          TC_UNROLL
          for (int i = 0; i < 4; ++i) sums[group][frag][i] = fma_of(d[i], scales[group][i / 2], sums[group][frag][i]);
        }
      }
    }
  }
  cp_async_wait<0>();
  warp_sync();
}

}  // namespace thermocline::gpu::dev
