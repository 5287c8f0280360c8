// Random packed weights of every format, with their values in plain floats.
#pragma once

#include "kernels_cpu/kernel_table.h"
#include "tests/support/fixtures.h"

namespace thermocline::test {

/// Owns the planes of a PackedMatrix; `values` [n, k] are what it stands for.
struct RandomMatrix {
  cpu::PackedMatrix matrix;
  std::vector<float> values;
  std::vector<uint8_t> tiles, scales;
};

inline RandomMatrix random_matrix(std::mt19937& random, cpu::GemmKind kind, int64_t n, int64_t k,
                                  int64_t scale_tiles = 4) {
  using cpu::ScaleFormat;
  using cpu::WeightFormat;
  RandomMatrix out;
  cpu::PackedMatrix& m = out.matrix;
  m.n = n;
  m.k = k;
  const bool nibbles =
      kind == cpu::GemmKind::mxfp4_e8m0 || kind == cpu::GemmKind::mxfp4_f32 || kind == cpu::GemmKind::int4_f32;
  m.format = kind == cpu::GemmKind::int4_f32   ? WeightFormat::int4
             : nibbles                         ? WeightFormat::mxfp4
             : kind == cpu::GemmKind::fp8_f32  ? WeightFormat::fp8
             : kind == cpu::GemmKind::int8_f32 ? WeightFormat::int8
                                               : WeightFormat::bf16;
  m.scale = kind == cpu::GemmKind::mxfp4_e8m0 ? ScaleFormat::e8m0_rows
            : kind == cpu::GemmKind::fp8_f32  ? ScaleFormat::f32_blocks
            : kind == cpu::GemmKind::bf16     ? ScaleFormat::none
                                              : ScaleFormat::f32_rows;
  m.scale_tiles = kind == cpu::GemmKind::fp8_f32    ? scale_tiles
                  : kind == cpu::GemmKind::int4_f32 ? 1 + static_cast<int64_t>(random() % 4)
                  : kind == cpu::GemmKind::int8_f32 ? 4
                                                    : 1;
  out.tiles.resize(static_cast<size_t>(m.tile_plane_bytes()));
  out.scales.resize(static_cast<size_t>(m.scale_plane_bytes()) + 1);
  const int64_t row_bytes = nibbles ? k / 2 : m.format == WeightFormat::bf16 ? 2 * k : k;
  std::vector<std::byte> rows(static_cast<size_t>(n * row_bytes));
  for (std::byte& b : rows) b = std::byte(random() & 255);
  if (m.format == WeightFormat::fp8)
    for (std::byte& b : rows)
      if ((static_cast<int>(b) & 0x7f) == 0x7f) b = std::byte{0x3a};
  if (m.format == WeightFormat::bf16)
    for (int64_t i = 0; i < n * k; ++i) {
      const bf16 word = float_to_bf16(std::normal_distribution<float>(0, 1)(random));
      std::memcpy(&rows[static_cast<size_t>(2 * i)], &word, 2);
    }
  for (int64_t group = 0; group < m.row_groups(); ++group)
    pack_row_group(m, rows.data() + group * 16 * row_bytes, row_bytes, std::min<int64_t>(16, n - group * 16),
                   out.tiles.data() + group * m.group_tile_bytes());
  const int64_t elements = static_cast<int64_t>(out.scales.size() - 1) / (m.scale == ScaleFormat::e8m0_rows ? 1 : 4);
  for (int64_t i = 0; i < elements; ++i) {
    if (m.scale == ScaleFormat::e8m0_rows) {
      out.scales[static_cast<size_t>(i)] = static_cast<uint8_t>(121 + random() % 10);
    } else {
      const float value = std::uniform_real_distribution<float>(0.1f, 2)(random);
      std::memcpy(&out.scales[static_cast<size_t>(4 * i)], &value, 4);
    }
  }
  m.tiles = out.tiles.data();
  m.scales = out.scales.data();
  for (int64_t row = 0; row < n; ++row)
    for (int64_t col = 0; col < k; ++col) {
      float value = 0;
      const std::byte* source = rows.data() + row * row_bytes;
      if (nibbles) {
        const int code = (static_cast<int>(source[col / 2]) >> (4 * (col % 2))) & 15;
        value = m.format == WeightFormat::mxfp4 ? kE2m1[code] : static_cast<float>(code < 8 ? code : code - 16);
      } else if (m.format == WeightFormat::int8)
        value = static_cast<float>(std::max<int>(static_cast<int8_t>(source[col]), -127));
      else if (m.format == WeightFormat::fp8)
        value = e4m3_to_float(static_cast<uint8_t>(source[col]));
      else {
        bf16 word;
        std::memcpy(&word, source + 2 * col, 2);
        value = bf16_to_float(word);
      }
      out.values.push_back(value * tile_scale(m.scale, m.row_group(row / 16), col / 32, row % 16));
    }
  return out;
}

}  // namespace thermocline::test
