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

/// A compressed row: its page, and its number in it.
struct RowPlace {
  int64_t page = 0, row = 0;
};
TC_DEVICE RowPlace row_place(const StepTables& step, const LayerPages& pages, const TokenInfo& token, int64_t row) {
  const SequenceInfo sequence = step.sequences(token.sequence);
  // 32 bits hold any row, and a division of 64 is a call.
  const uint32_t per_page = static_cast<uint32_t>(pages.rows_per_page), at = static_cast<uint32_t>(row);
  return {static_cast<int32_t>(step.pages(sequence.compressed_table + at / per_page)), at % per_page};
}
TC_DEVICE int64_t slot_entry(const LayerPages& pages, const RowPlace& place) {
  return place.page * pages.page_entries + pages.first_entry + place.row;
}
/// Where a row is at home: in its page.
TC_DEVICE DeviceView<uint8_t, 1> home_row(const LayerPages& pages, const RowPlace& place) {
  return {pages.rows.pointer + place.page * pages.row_page_bytes + pages.row_offset + place.row * pages.row_bytes,
          {pages.row_bytes}};
}
TC_DEVICE DeviceView<uint8_t, 1> hot_row(const LayerPages& pages, int64_t slot) {
  return {pages.hot.pointer + slot * pages.row_bytes, {pages.row_bytes}};
}
/// The slot with a copy of the row, or kNoSlot.
TC_DEVICE int32_t slot_of_row(const LayerPages& pages, const RowPlace& place) {
  return pages.slot_of.pointer ? static_cast<int32_t>(pages.slot_of(slot_entry(pages, place))) : kNoSlot;
}

/// Keys of 16 neighbouring rows: mxfp4 tiles, then their scales.
TC_DEVICE DeviceView<uint8_t, 1> index_group(const StepTables& step, const LayerPages& pages, const TokenInfo& token,
                                             int64_t group) {
  const SequenceInfo sequence = step.sequences(token.sequence);
  const int64_t per_page = pages.rows_per_page / 16;
  const int64_t page = static_cast<int32_t>(step.pages(sequence.compressed_table + group / per_page));
  return {
      pages.keys.pointer + page * pages.key_page_bytes + pages.key_offset + group % per_page * pages.index_group_bytes,
      {pages.index_group_bytes}};
}

}  // namespace thermocline::gpu::dev
