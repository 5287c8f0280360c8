// The KV cache: pages of 256 tokens over all layers, read through block tables, in two pools.
//   window pages      raw rows of every layer; a sequence keeps those its sliding window still reaches
//   compressed pages  CSA rows, their index keys and HCA rows; a sequence keeps all of them
// What is not a row, the compressors' projections of the last few tokens, lies in a ring per sequence, by position.
// Rows are final (normed, rotated, rounded), so a page means the same wherever it is. One thread owns the cache.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/base/result.h"
#include "runtime/hw/numa_buffer.h"
#include "runtime/model/model_geometry.h"

namespace thermocline {

inline constexpr int64_t kPageTokens = 256;

/// A row in FP8, as devices keep it: the dims that rotate in bf16, the others as e4m3 codes, then a byte for the
/// power-of-two scale (2^(byte - 127)) of each 64 of them. 583 bytes at V4's 512 dims, in whole 16. Nothing is lost:
/// rows are rounded to that grid in every numerics but fp32.
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
  int64_t max_chunk = 512;  // tokens of one step, of all its sequences together
  bool host_rows = true;    // false: page and ring numbers only; the rows are a device's
};

/// Where each layer's rows lie inside a page, in bytes.
class KvLayout {
 public:
  /// Of the layers [first, last), MTP layers counting on from the main ones; last < 0: all. Other layers have no place.
  KvLayout(const ModelGeometry& geometry, const KvOptions& options, int first_layer = 0, int last_layer = -1);

  int64_t window_page_bytes() const { return window_page_bytes_; }
  int64_t compressed_page_bytes() const { return compressed_page_bytes_; }
  int64_t row_bytes() const { return row_bytes_; }
  /// Index keys lie in groups of 16 rows: FP4 tiles and scales (kernels_cpu/indexer.h), or rows of f32.
  int64_t index_group_bytes() const { return index_group_bytes_; }
  /// Compressed rows a page holds for a layer: those of 256 tokens, rounded up.
  int64_t rows_per_page(int layer) const { return layers_[layer].rows_per_page; }
  int64_t window_offset(int layer) const { return (layer - first_layer_) * kPageTokens * row_bytes_; }
  int64_t compressed_offset(int layer) const { return layers_[layer].compressed; }
  int64_t index_offset(int layer) const { return layers_[layer].index; }

  /// The compressor ring of a layer: `slots` tokens of [a | z] floats, attention first, then the indexer's.
  struct Ring {
    int64_t offset = 0, slots = 0, width = 0, index_width = 0;  // floats; widths of a and of z each
    int64_t token_offset = 0;                                   // floats of one slot of every layer before
    int64_t slot_floats() const { return 2 * (width + index_width); }
  };
  const Ring& ring(int layer) const { return layers_[layer].ring; }
  int64_t ring_floats() const { return ring_floats_; }

 private:
  struct Layer {
    int64_t rows_per_page = 0, compressed = 0, index = 0;
    Ring ring;
  };
  std::vector<Layer> layers_;
  int first_layer_ = 0;
  int64_t row_bytes_ = 0, index_group_bytes_ = 0, window_page_bytes_ = 0, compressed_page_bytes_ = 0, ring_floats_ = 0;
};

/// Uniform pages in one mapping, handed out by number.
class PagePool {
 public:
  static Result<PagePool> allocate(int64_t pages, int64_t page_bytes);  // page_bytes 0: numbers only
  int64_t pages() const { return pages_; }
  int64_t free_pages() const { return pages_ - fresh_ + static_cast<int64_t>(free_.size()); }
  int32_t take();
  void give_back(int32_t page) { free_.push_back(page); }
  std::byte* page(int32_t number) const { return buffer_.data() + number * page_bytes_; }

 private:
  NumaBuffer buffer_;
  int64_t pages_ = 0, page_bytes_ = 0;
  int64_t fresh_ = 0;          // pages from here on were never taken
  std::vector<int32_t> free_;  // and these came back
};

class KvCache;

/// What a sequence keeps: its length, its block tables, its compressor rings. Frees its pages when destroyed.
class SequenceKv {
 public:
  ~SequenceKv();
  SequenceKv(const SequenceKv&) = delete;
  SequenceKv& operator=(const SequenceKv&) = delete;

  /// Tokens whose rows are stored.
  int64_t length() const { return length_; }
  const KvLayout& layout() const;
  /// Makes room for tokens length() .. length() + count. Errors: out_of_memory, and nothing changed.
  Status reserve(int64_t count);
  /// The reserved tokens are stored; window pages no later token can see go back.
  void commit(int64_t count);

  std::byte* raw_row(int layer, int64_t pos) const;
  std::byte* compressed_row(int layer, int64_t row) const;
  std::byte* index_group(int layer, int64_t group) const;
  /// The block tables: logical page first_window_page() + i of the window, logical page i of compressed rows.
  const std::vector<int32_t>& window_pages() const { return window_pages_; }
  const std::vector<int32_t>& compressed_pages() const { return compressed_pages_; }
  int64_t first_window_page() const { return first_window_page_; }
  int32_t ring() const { return ring_; }

  /// The ring slot of a position: a [width], z [width], index a [index_width], index z [index_width].
  float* ring_slot(int layer, int64_t pos) const;

 private:
  friend class KvCache;
  explicit SequenceKv(KvCache& cache) : cache_(cache) {}

  KvCache& cache_;
  int64_t length_ = 0;
  int64_t first_window_page_ = 0;      // logical number of window_pages_[0]
  std::vector<int32_t> window_pages_;  // logical page -> page of the pool
  std::vector<int32_t> compressed_pages_;
  int32_t ring_ = 0;
};

class KvCache {
 public:
  /// Errors: out_of_memory.
  static Result<std::unique_ptr<KvCache>> create(const ModelGeometry& geometry, const KvOptions& options);
  /// Bytes of host memory that create() takes.
  static uint64_t bytes(const ModelGeometry& geometry, const KvOptions& options);
  /// Allocates nothing. Errors: out_of_memory when max_sequences are in use.
  Result<std::unique_ptr<SequenceKv>> new_sequence();

  const KvLayout& layout() const { return layout_; }
  const KvOptions& options() const { return options_; }
  /// Pages of the two pools.
  int64_t window_pages() const { return window_.pages(); }
  int64_t compressed_pages() const { return compressed_.pages(); }
  int64_t free_compressed_pages() const { return compressed_.free_pages(); }

 private:
  friend class SequenceKv;
  KvCache(const ModelGeometry& geometry, const KvOptions& options)
      : options_(options), window_size_(geometry.window_size), layout_(geometry, options) {}

  const KvOptions options_;
  const int64_t window_size_;
  const KvLayout layout_;
  PagePool window_, compressed_;
  HostArray<float> rings_;           // [max_sequences, ring_floats]; what an earlier sequence left there is never read
  std::vector<int32_t> free_rings_;  // one a sequence
};

}  // namespace thermocline
