#include "runtime/kv/sequence_kv.h"

#include <algorithm>

#include "kernels_cpu/indexer.h"
#include "runtime/kv/kv_store.h"

namespace thermocline {
namespace {

using Owner = PagePool::Owner;

}  // namespace

SequenceKv::SequenceKv(KvStore& store) : store_(store), pages_on_(static_cast<size_t>(store.host_.nodes())) {}

SequenceKv::~SequenceKv() {
  for (const int32_t page : window_pages_) store_.window_.drop(page, Owner::sequence);
  for (const int32_t page : compressed_pages_) store_.compressed_.drop(page, Owner::sequence);
  store_.rings_.drop(ring_, Owner::sequence);
}

const KvLayout& SequenceKv::layout() const { return store_.layout_; }

// The page that the next token is written on, where it has one.
const int32_t* SequenceKv::tail() const {
  const auto page = static_cast<size_t>(length_ / kPageTokens);
  return page < compressed_pages_.size() ? &compressed_pages_[page] : nullptr;
}

// Whether another sequence has it too: a copy takes a page more. One that only checkpoints share goes to them instead.
bool SequenceKv::tail_is_used() const { return tail() && store_.compressed_.sequences(*tail()) > 1; }

int64_t SequenceKv::own_pages() const { return static_cast<int64_t>(compressed_pages_.size()) - tail_is_used(); }

int64_t SequenceKv::exclusive_pages() const {
  return std::count_if(compressed_pages_.begin(), compressed_pages_.end(),
                       [&](int32_t page) { return store_.compressed_.sequences(page) == 1; });
}

// After every change of the table, so that each layer's scan finds its node's pages without looking through all.
void SequenceKv::list_by_node() {
  if (nodes() < 2) return;
  for (std::vector<int32_t>& pages : pages_on_) pages.clear();
  for (size_t i = 0; i < compressed_pages_.size(); ++i)
    pages_on_[static_cast<size_t>(store_.host_.node_of(compressed_pages_[i]))].push_back(static_cast<int32_t>(i));
}

// Whoever writes a shared page takes a copy first; without a page for it, checkpoints let go of theirs.
Status SequenceKv::own_tail() {
  if (!tail()) return {};
  int32_t& page = compressed_pages_[static_cast<size_t>(length_ / kPageTokens)];
  while (store_.compressed_.shared(page) && store_.available_pages() == 0 && store_.reclaim()) {
  }
  if (!store_.compressed_.shared(page)) return {};
  const int32_t own = store_.take_compressed();
  Status copied = store_.memory().copy(KvPool::compressed, page, own);
  store_.compressed_.drop(page, Owner::sequence);
  page = own;
  list_by_node();
  return copied;
}

Status SequenceKv::reserve(int64_t count) {
  if (rollback_floor_ > length_) return Error{ErrorCode::internal, "a step of this sequence has ended midway"};
  const int64_t end = length_ + count;
  const int64_t window =
      pages_of(end, kWindowPageTokens) - first_window_page_ - static_cast<int64_t>(window_pages_.size());
  const int64_t compressed = store_.layout_.compressed_page_bytes() == 0
                                 ? 0
                                 : pages_of(end, kPageTokens) - static_cast<int64_t>(compressed_pages_.size());
  if (window > store_.window_.free_pages() || compressed + tail_is_used() > store_.available_pages())
    return Error{ErrorCode::out_of_memory, "no free KV pages for token " + std::to_string(end) +
                                               ": the cache was sized for " +
                                               std::to_string(store_.options_.max_tokens) + " tokens"};
  TC_RETURN_IF_ERROR(own_tail());
  for (int64_t i = 0; i < window; ++i) window_pages_.push_back(store_.window_.take());
  for (int64_t i = 0; i < compressed; ++i) compressed_pages_.push_back(store_.take_compressed());
  if (compressed > 0) list_by_node();
  return {};
}

void SequenceKv::commit(int64_t count) {
  length_ += count;
  rollback_floor_ = std::max(rollback_floor_, length_ - store_.options_.rollback_tokens);
  const int64_t first_visible = std::max<int64_t>(0, rollback_floor_ - store_.window_size_ + 1);
  while (first_window_page_ < first_visible / kWindowPageTokens) {
    store_.window_.drop(window_pages_.front(), Owner::sequence);
    window_pages_.erase(window_pages_.begin());
    ++first_window_page_;
  }
}

void SequenceKv::rollback(int64_t length) {
  TC_CHECK(length >= rollback_floor_ && length <= length_, "a rollback reaches behind what the rings hold");
  length_ = length;
  const auto give_back = [](std::vector<int32_t>& pages, int64_t keep, PagePool& pool) {
    for (; static_cast<int64_t>(pages.size()) > keep; pages.pop_back()) pool.drop(pages.back(), Owner::sequence);
  };
  give_back(window_pages_, std::max<int64_t>(0, pages_of(length, kWindowPageTokens) - first_window_page_),
            store_.window_);
  const size_t before = compressed_pages_.size();
  give_back(compressed_pages_, pages_of(length, kPageTokens), store_.compressed_);
  if (compressed_pages_.size() != before) list_by_node();
}

std::byte* SequenceKv::raw_row(int layer, int64_t pos) const {
  const KvLayout& layout = store_.layout_;
  const int32_t page = window_pages_[static_cast<size_t>(pos / kWindowPageTokens - first_window_page_)];
  return store_.host_.page(KvPool::window, page) + layout.window_offset(layer) +
         pos % kWindowPageTokens * layout.row_bytes();
}

std::byte* SequenceKv::compressed_row(int layer, int64_t row) const {
  const KvLayout& layout = store_.layout_;
  const int64_t per_page = layout.rows_per_page(layer);
  return store_.host_.page(KvPool::compressed, compressed_pages_[static_cast<size_t>(row / per_page)]) +
         layout.compressed_offset(layer) + row % per_page * layout.row_bytes();
}

std::byte* SequenceKv::index_group(int layer, int64_t group) const {
  const KvLayout& layout = store_.layout_;
  const int64_t per_page = layout.rows_per_page(layer) / cpu::kKeyGroup;
  return store_.host_.page(KvPool::compressed, compressed_pages_[static_cast<size_t>(group / per_page)]) +
         layout.index_offset(layer) + group % per_page * layout.index_group_bytes();
}

float* SequenceKv::ring_slot(int layer, int64_t pos) const {
  return reinterpret_cast<float*>(store_.host_.page(KvPool::ring, ring_)) + store_.layout_.ring(layer).at(pos);
}

}  // namespace thermocline
