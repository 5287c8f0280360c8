#include "runtime/kv/synthetic_rows.h"

#include <algorithm>
#include <random>

#include "kernels_cpu/attention.h"
#include "kernels_cpu/indexer.h"
#include "kernels_cpu/ref/ops.h"
#include "runtime/base/number_formats.h"

namespace thermocline {
namespace {

namespace ref = cpu::ref;

constexpr int64_t kImageBytes = 32 << 20;  // of different compressed pages

/// Random rows and keys in the formats of a store.
class Rows {
 public:
  Rows(const ModelGeometry& geometry, const KvStore& store, uint32_t seed)
      : g_(geometry), o_(store.options()), layout_(store.layout()), random_(seed) {}

  void row(std::byte* out) {
    std::vector<float> x = floats(g_.head_dim);
    if (o_.fp8_rows) {
      cpu::store_fp8_row(x.data(), g_.nope_head_dim(), g_.rope_head_dim, reinterpret_cast<uint8_t*>(out));
    } else if (o_.bf16_rows) {  // on FP8's grid: the same rows in either format
      ref::fake_fp8(x.data(), g_.nope_head_dim(), cpu::kFp8Block);
      std::transform(x.begin(), x.end(), reinterpret_cast<bf16*>(out), float_to_bf16);
    } else {
      std::copy(x.begin(), x.end(), reinterpret_cast<float*>(out));
    }
  }
  void keys(std::byte* group) {
    const int64_t c = g_.index_head_dim;
    for (int64_t r = 0; r < cpu::kKeyGroup; ++r) {
      std::vector<float> x = floats(c);
      if (!o_.bf16_rows) {
        std::copy(x.begin(), x.end(), reinterpret_cast<float*>(group) + r * c);
        continue;
      }
      ref::fake_fp4(x.data(), c);
      cpu::store_index_key(x.data(), c, r, reinterpret_cast<uint8_t*>(group));
    }
  }
  void compressed_page(std::byte* page) {
    for (int layer = 0; layer < g_.n_layers; ++layer) {
      const int64_t rows = layout_.rows_per_page(layer);
      for (int64_t r = 0; r < rows; ++r) row(page + layout_.compressed_offset(layer) + r * layout_.row_bytes());
      if (rows == 0 || g_.kind(layer) != LayerKind::csa) continue;
      for (int64_t i = 0; i < rows / cpu::kKeyGroup; ++i)
        keys(page + layout_.index_offset(layer) + i * layout_.index_group_bytes());
    }
  }
  void window_page(std::byte* page) {
    for (int64_t at = 0; at < layout_.window_page_bytes(); at += layout_.row_bytes()) row(page + at);
  }
  std::vector<float> floats(int64_t count) {
    std::vector<float> x(static_cast<size_t>(count));
    for (float& value : x) value = normal_(random_);
    return x;
  }

 private:
  const ModelGeometry& g_;
  const KvOptions& o_;
  const KvLayout& layout_;
  std::mt19937 random_;
  std::normal_distribution<float> normal_;
};

}  // namespace

Result<std::unique_ptr<SequenceKv>> synthetic_sequence(KvStore& store, const ModelGeometry& geometry, WorkerPool& pool,
                                                       int64_t length, uint32_t seed) {
  TC_ASSIGN(std::unique_ptr<SequenceKv> sequence, store.new_sequence());
  while (sequence->length() < length) {
    const int64_t count = std::min(store.options().max_chunk, length - sequence->length());
    TC_RETURN_IF_ERROR(sequence->reserve(count));
    sequence->commit(count);
  }
  const KvLayout& layout = store.layout();
  const std::vector<int32_t>& pages = sequence->compressed_pages();
  const int64_t page_bytes = layout.compressed_page_bytes();
  const int64_t kinds = page_bytes == 0 ? 0
                                        : std::min<int64_t>(static_cast<int64_t>(pages.size()),
                                                            std::max<int64_t>(4, kImageBytes / page_bytes));
  std::vector<std::byte> images(static_cast<size_t>(kinds * page_bytes));
  pool.split(kinds, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      Rows(geometry, store, seed + static_cast<uint32_t>(i)).compressed_page(images.data() + i * page_bytes);
  });
  std::mt19937 random(seed);
  for (const int32_t page : pages)
    TC_RETURN_IF_ERROR(store.memory().write(
        KvPool::compressed, page,
        images.data() + static_cast<int64_t>(random() % static_cast<uint64_t>(kinds)) * page_bytes));
  Rows rows(geometry, store, ~seed);
  std::vector<std::byte> window(static_cast<size_t>(layout.window_page_bytes()));
  for (const int32_t page : sequence->window_pages()) {
    rows.window_page(window.data());
    TC_RETURN_IF_ERROR(store.memory().write(KvPool::window, page, window.data()));
  }
  const std::vector<float> ring = rows.floats(layout.ring_floats());
  if (!ring.empty())
    TC_RETURN_IF_ERROR(
        store.memory().write(KvPool::ring, sequence->ring(), reinterpret_cast<const std::byte*>(ring.data())));
  return sequence;
}

}  // namespace thermocline
