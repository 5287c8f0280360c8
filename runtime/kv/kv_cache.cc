#include "runtime/kv/kv_cache.h"

#include "kernels_cpu/indexer.h"
#include "runtime/hw/host_memory.h"

namespace thermocline {
namespace {

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align64(int64_t bytes) { return div_up(bytes, 64) * 64; }

}  // namespace

KvLayout::KvLayout(const ModelGeometry& g, const KvOptions& options, int first_layer, int last_layer)
    : first_layer_(first_layer) {
  const int64_t element = options.bf16_rows ? 2 : 4;
  row_bytes_ = options.fp8_rows ? fp8_row_bytes(g.head_dim, g.rope_head_dim) : align64(g.head_dim * element);
  index_group_bytes_ = options.bf16_rows ? align64(cpu::key_group_bytes(div_up(g.index_head_dim, cpu::kTileCols)))
                                         : cpu::kKeyGroup * g.index_head_dim * element;
  const int last = last_layer < 0 ? g.n_layers + (options.mtp ? g.n_mtp_layers : 0) : last_layer;
  window_page_bytes_ = (last - first_layer) * kPageTokens * row_bytes_;
  int64_t token_floats = 0;
  for (int i = 0; i < g.n_layers; ++i) {
    Layer layer;
    if (const int ratio = g.compress_ratios[i]; ratio > 0 && i >= first_layer && i < last) {
      const bool csa = g.kind(i) == LayerKind::csa;
      layer.rows_per_page = div_up(kPageTokens, ratio);
      layer.compressed = compressed_page_bytes_;
      compressed_page_bytes_ += layer.rows_per_page * row_bytes_;
      layer.index = compressed_page_bytes_;
      if (csa) compressed_page_bytes_ += layer.rows_per_page / cpu::kKeyGroup * index_group_bytes_;  // 64 rows a page
      // Pooling row r reads its own window and, where windows overlap, the one before.
      layer.ring = {ring_floats_, csa ? 2 * ratio : ratio, g.compressor_width(i, g.head_dim),
                    csa ? g.compressor_width(i, g.index_head_dim) : 0, token_floats};
      token_floats += layer.ring.slot_floats();
      ring_floats_ += layer.ring.slots * layer.ring.slot_floats();
    }
    layers_.push_back(layer);
  }
}

Result<PagePool> PagePool::allocate(int64_t pages, int64_t page_bytes) {
  PagePool pool;
  pool.pages_ = pages;
  pool.page_bytes_ = page_bytes;
  if (page_bytes > 0) {
    TC_ASSIGN(pool.buffer_, NumaBuffer::allocate(static_cast<uint64_t>(pages * page_bytes)));
  }
  return pool;
}

int32_t PagePool::take() {
  TC_CHECK(free_pages() > 0);
  if (free_.empty()) return static_cast<int32_t>(fresh_++);
  const int32_t page = free_.back();
  free_.pop_back();
  return page;
}

SequenceKv::~SequenceKv() {
  for (const int32_t page : window_pages_) cache_.window_.give_back(page);
  for (const int32_t page : compressed_pages_) cache_.compressed_.give_back(page);
  cache_.free_rings_.push_back(ring_);
}

const KvLayout& SequenceKv::layout() const { return cache_.layout(); }

Status SequenceKv::reserve(int64_t count) {
  const int64_t pages = div_up(length_ + count, kPageTokens);
  const int64_t window = pages - first_window_page_ - static_cast<int64_t>(window_pages_.size());
  const int64_t compressed =
      cache_.layout_.compressed_page_bytes() == 0 ? 0 : pages - static_cast<int64_t>(compressed_pages_.size());
  if (window > cache_.window_.free_pages() || compressed > cache_.compressed_.free_pages())
    return Error{ErrorCode::out_of_memory, "no free KV pages for token " + std::to_string(length_ + count) +
                                               ": the cache was sized for " +
                                               std::to_string(cache_.options_.max_tokens) + " tokens"};
  for (int64_t i = 0; i < window; ++i) window_pages_.push_back(cache_.window_.take());
  for (int64_t i = 0; i < compressed; ++i) compressed_pages_.push_back(cache_.compressed_.take());
  return {};
}

void SequenceKv::commit(int64_t count) {
  length_ += count;
  const int64_t first_visible = std::max<int64_t>(0, length_ - cache_.window_size_ + 1);
  while (first_window_page_ < first_visible / kPageTokens) {
    cache_.window_.give_back(window_pages_.front());
    window_pages_.erase(window_pages_.begin());
    ++first_window_page_;
  }
}

std::byte* SequenceKv::raw_row(int layer, int64_t pos) const {
  const KvLayout& layout = cache_.layout_;
  const int32_t page = window_pages_[static_cast<size_t>(pos / kPageTokens - first_window_page_)];
  return cache_.window_.page(page) + layout.window_offset(layer) + pos % kPageTokens * layout.row_bytes();
}

std::byte* SequenceKv::compressed_row(int layer, int64_t row) const {
  const KvLayout& layout = cache_.layout_;
  const int64_t per_page = layout.rows_per_page(layer);
  return cache_.compressed_.page(compressed_pages_[static_cast<size_t>(row / per_page)]) +
         layout.compressed_offset(layer) + row % per_page * layout.row_bytes();
}

std::byte* SequenceKv::index_group(int layer, int64_t group) const {
  const KvLayout& layout = cache_.layout_;
  const int64_t per_page = layout.rows_per_page(layer) / cpu::kKeyGroup;
  return cache_.compressed_.page(compressed_pages_[static_cast<size_t>(group / per_page)]) +
         layout.index_offset(layer) + group % per_page * layout.index_group_bytes();
}

float* SequenceKv::ring_slot(int layer, int64_t pos) const {
  const KvLayout::Ring& ring = cache_.layout_.ring(layer);
  return cache_.rings_.data() + ring_ * cache_.layout_.ring_floats() + ring.offset +
         pos % ring.slots * ring.slot_floats();
}

Result<std::unique_ptr<KvCache>> KvCache::create(const ModelGeometry& geometry, const KvOptions& options) {
  std::unique_ptr<KvCache> cache(new KvCache(geometry, options));
  // Between steps a sequence holds what its window still reaches, wherever that lies on pages: n tokens touch
  // (n + 254) / 256 + 1 pages at most. A step adds its chunk, and a page's end for each sequence in it.
  const int64_t sequences = options.max_sequences, whole = div_up(options.max_tokens, kPageTokens) + sequences;
  const int64_t held = (geometry.window_size + kPageTokens - 2) / kPageTokens + 1;
  const int64_t window_pages = sequences * held + options.max_chunk / kPageTokens + sequences;
  TC_ASSIGN(cache->window_, PagePool::allocate(std::min(window_pages, whole),
                                               options.host_rows ? cache->layout_.window_page_bytes() : 0));
  TC_ASSIGN(cache->compressed_,
            PagePool::allocate(whole, options.host_rows ? cache->layout_.compressed_page_bytes() : 0));
  if (options.host_rows) {
    TC_ASSIGN(cache->rings_, HostArray<float>::allocate(options.max_sequences * cache->layout_.ring_floats()));
  }
  for (int i = options.max_sequences; i-- > 0;) cache->free_rings_.push_back(i);
  return cache;
}

uint64_t KvCache::bytes(const ModelGeometry& geometry, const KvOptions& options) {
  const HostMemoryMeasure measure;
  TC_CHECK(create(geometry, options).has_value());
  return measure.bytes();
}

Result<std::unique_ptr<SequenceKv>> KvCache::new_sequence() {
  if (free_rings_.empty())
    return Error{ErrorCode::out_of_memory, "all " + std::to_string(options_.max_sequences) + " sequences are in use"};
  std::unique_ptr<SequenceKv> sequence(new SequenceKv(*this));
  sequence->ring_ = free_rings_.back();
  free_rings_.pop_back();
  return sequence;
}

}  // namespace thermocline
