// KvLayout: where each layer's rows lie inside a page, and each layer's projections inside a sequence's ring.
//   window pages      kWindowPageTokens tokens: raw rows of every layer; a sequence keeps those its window still
//   reaches compressed pages  kPageTokens tokens; a sequence keeps all of them. First what every step reads whole,
//   index keys and
//                     HCA rows (scanned); then what the indexer selects from, CSA rows (selected)
//   rings             what is not a row: the compressors' projections of the last few tokens, by position
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/model/model_geometry.h"

namespace thermocline {

inline constexpr int64_t kPageTokens = 256;
inline constexpr int64_t kWindowPageTokens = 16;
/// Pages that the first `tokens` tokens lie on.
constexpr int64_t pages_of(int64_t tokens, int64_t page_tokens) { return (tokens + page_tokens - 1) / page_tokens; }

/// A row in FP8: the dims that rotate in bf16, the others as e4m3 codes, then a byte for the power-of-two scale
/// (2^(byte - 127)) of each 64 of them. 583 bytes at V4's 512 dims, in whole 16. Nothing is lost: rows are rounded to
/// that grid in every numerics but fp32.
constexpr int64_t fp8_row_bytes(int64_t head_dim, int64_t rope_head_dim) {
  const int64_t codes = head_dim - rope_head_dim;
  return (2 * rope_head_dim + codes + (codes + 63) / 64 + 15) / 16 * 16;
}

struct KvOptions {
  bool bf16_rows = true;      // and FP4 index keys; else f32, for the fp32 numerics
  bool fp8_rows = false;      // fp8_row_bytes each instead of bf16
  bool mtp = false;           // keep raw rows of the MTP layers too
  int64_t max_tokens = 4096;  // of all sequences together
  int max_sequences = 1;
  int64_t max_chunk = 512;      // tokens of one step, of all its sequences together
  int64_t rollback_tokens = 8;  // a sequence can go back this far behind the longest it has been
  bool host_rows = true;        // false: page and ring numbers only; the rows are a device's
  /// OS nodes that compressed pages are dealt out to in turn, a buffer each; -1: bound to none.
  std::vector<int> nodes = {-1};
};

class KvLayout {
 public:
  /// Of the layers [first, last), MTP layers counting on from the main ones; last < 0: all. Other layers have no place.
  /// Window pages and rings of consecutive layer ranges, one after the other, are those of all layers; of compressed
  /// pages so are both sections, each by itself.
  KvLayout(const ModelGeometry& geometry, const KvOptions& options, int first_layer = 0, int last_layer = -1);

  int64_t window_page_bytes() const { return window_page_bytes_; }
  int64_t compressed_page_bytes() const { return scanned_page_bytes_ + selected_page_bytes_; }
  int64_t scanned_page_bytes() const { return scanned_page_bytes_; }
  int64_t selected_page_bytes() const { return selected_page_bytes_; }
  int64_t ring_bytes() const { return ring_floats_ * static_cast<int64_t>(sizeof(float)); }
  int64_t row_bytes() const { return row_bytes_; }
  /// Index keys lie in groups of 16 rows: FP4 tiles and scales (kernels_cpu/indexer.h), or rows of f32.
  int64_t index_group_bytes() const { return index_group_bytes_; }
  /// Compressed rows a page holds for a layer: those of 256 tokens, rounded up.
  int64_t rows_per_page(int layer) const { return at(layer).rows_per_page; }
  /// Layers with selected rows, and a layer's number among them.
  int64_t csa_layers() const { return csa_layers_; }
  int64_t csa_layer(int layer) const { return at(layer).csa; }
  int64_t window_offset(int layer) const { return (layer - first_layer_) * kWindowPageTokens * row_bytes_; }
  int64_t compressed_offset(int layer) const { return at(layer).compressed; }
  int64_t index_offset(int layer) const { return at(layer).index; }

  /// The compressor ring of a layer: `slots` tokens of [a | z] floats, attention first, then the indexer's. A slot is a
  /// position modulo their number.
  struct Ring {
    int64_t offset = 0, slots = 0, width = 0, index_width = 0;  // floats; widths of a and of z each
    int64_t token_offset = 0;                                   // floats of one slot of every layer before
    int64_t ratio = 0;                                          // tokens a row pools
    bool overlap = false;                                       // and those of the row before
    int64_t slot_floats() const { return 2 * (width + index_width); }
    int64_t at(int64_t pos) const { return offset + pos % slots * slot_floats(); }
    /// The first position that rows to come still pool, of a sequence of `length` tokens.
    int64_t first_live(int64_t length) const {
      const int64_t open = length / ratio * ratio;
      return overlap && open > 0 ? open - ratio : open;
    }
  };
  const Ring& ring(int layer) const { return at(layer).ring; }
  int64_t ring_floats() const { return ring_floats_; }
  /// Whether every row lies on the page of its last token, so that whoever copies that page owns what it writes; not
  /// with ratios that do not divide a page.
  bool shares_pages() const { return shares_pages_; }
  int layers() const { return static_cast<int>(layers_.size()); }

 private:
  struct Layer {
    int64_t rows_per_page = 0, compressed = 0, index = 0, csa = 0;
    Ring ring;
  };
  const Layer& at(int layer) const { return layers_[static_cast<size_t>(layer)]; }

  std::vector<Layer> layers_;
  int first_layer_ = 0;
  bool shares_pages_ = true;
  int64_t row_bytes_ = 0, index_group_bytes_ = 0, window_page_bytes_ = 0, ring_floats_ = 0;
  int64_t scanned_page_bytes_ = 0, selected_page_bytes_ = 0, csa_layers_ = 0;
};

}  // namespace thermocline
