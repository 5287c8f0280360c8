// Rows of a sequence through its block tables, as bytes. Layouts: runtime/kv/kv_layout.h.
#pragma once

#include "kernels_gpu/device/simt.cuh"
#include "kernels_gpu/kernels.h"

namespace thermocline::gpu::dev {

inline constexpr int kWindowPageTokens = 16;

TC_DEVICE DeviceView<uint8_t, 1> raw_row(const StepTables& step, const LayerPages& pages, const TokenInfo& token,
                                         int64_t pos) {
  const SequenceInfo sequence = step.sequences(token.sequence);
  const int64_t page =
      static_cast<int32_t>(step.pages(sequence.window_table + pos / kWindowPageTokens - sequence.first_window_page));
  return {(pages.window.pointer + page * pages.window_page_bytes + pages.window_offset +
           pos % kWindowPageTokens * pages.row_bytes),
          {pages.row_bytes}};
}

TC_DEVICE DeviceView<uint8_t, 1> compressed_row(const StepTables& step, const LayerPages& pages, const TokenInfo& token,
                                                int64_t row) {
  const SequenceInfo sequence = step.sequences(token.sequence);
  const int64_t page = static_cast<int32_t>(step.pages(sequence.compressed_table + row / pages.rows_per_page));
  return {(pages.compressed.pointer + page * pages.compressed_page_bytes + pages.compressed_offset +
           row % pages.rows_per_page * pages.row_bytes),
          {pages.row_bytes}};
}

/// Keys of 16 neighbouring rows: mxfp4 tiles, then their scales.
TC_DEVICE DeviceView<uint8_t, 1> index_group(const StepTables& step, const LayerPages& pages, const TokenInfo& token,
                                             int64_t group) {
  const SequenceInfo sequence = step.sequences(token.sequence);
  const int64_t per_page = pages.rows_per_page / 16;
  const int64_t page = static_cast<int32_t>(step.pages(sequence.compressed_table + group / per_page));
  return {pages.compressed.pointer + page * pages.compressed_page_bytes + pages.index_offset +
              group % per_page * pages.index_group_bytes,
          {pages.index_group_bytes}};
}

}  // namespace thermocline::gpu::dev
