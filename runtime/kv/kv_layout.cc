#include "runtime/kv/kv_layout.h"

#include <algorithm>
#include <utility>

#include "kernels_cpu/indexer.h"

namespace thermocline {
namespace {

int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

KvLayout::KvLayout(const ModelGeometry& g, const KvOptions& options, int first_layer, int last_layer)
    : first_layer_(first_layer) {
  const int64_t element = options.bf16_rows ? 2 : 4;
  row_bytes_ = options.fp8_rows ? fp8_row_bytes(g.head_dim, g.rope_head_dim) : align64(g.head_dim * element);
  index_group_bytes_ = options.bf16_rows
                           ? align64(cpu::key_group_bytes((g.index_head_dim + cpu::kTileCols - 1) / cpu::kTileCols))
                           : cpu::kKeyGroup * g.index_head_dim * element;
  const int last = last_layer < 0 ? g.n_layers + (options.mtp ? g.n_mtp_layers : 0) : last_layer;
  window_page_bytes_ = (last - first_layer) * kWindowPageTokens * row_bytes_;
  int64_t token_floats = 0;
  for (int i = 0; i < g.n_layers; ++i) {
    Layer layer;
    if (const int64_t ratio = g.compress_ratios[static_cast<size_t>(i)]; ratio > 0 && i >= first_layer && i < last) {
      const bool csa = g.kind(i) == LayerKind::csa;
      layer.rows_per_page = (kPageTokens + ratio - 1) / ratio;
      shares_pages_ = shares_pages_ && kPageTokens % ratio == 0;
      const int64_t bytes = layer.rows_per_page * row_bytes_;
      int64_t& section = csa ? selected_page_bytes_ : scanned_page_bytes_;
      layer.compressed = std::exchange(section, section + (csa ? bytes : align64(bytes)));
      layer.index = scanned_page_bytes_;
      if (csa) layer.csa = csa_layers_++;
      if (csa) scanned_page_bytes_ += layer.rows_per_page / cpu::kKeyGroup * index_group_bytes_;  // 64 rows a page
      // Pooling row r reads its own window and, where windows overlap, the one before.
      layer.ring = {.offset = ring_floats_,
                    .slots = (csa ? 2 * ratio : ratio) + options.rollback_tokens,
                    .width = g.compressor_width(i, g.head_dim),
                    .index_width = csa ? g.compressor_width(i, g.index_head_dim) : 0,
                    .token_offset = token_floats,
                    .ratio = ratio,
                    .overlap = csa};
      token_floats += layer.ring.slot_floats();
      ring_floats_ += layer.ring.slots * layer.ring.slot_floats();
    }
    layers_.push_back(layer);
  }
  for (int i = first_layer; i < std::min(last, g.n_layers); ++i)
    if (g.kind(i) == LayerKind::csa) layers_[static_cast<size_t>(i)].compressed += scanned_page_bytes_;
}

}  // namespace thermocline
