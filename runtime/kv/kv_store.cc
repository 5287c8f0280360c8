#include "runtime/kv/kv_store.h"

#include <algorithm>

#include "runtime/hw/host_memory.h"

namespace thermocline {
namespace {

using Owner = PagePool::Owner;

// Between steps a sequence holds what its window reaches, from as far back as it can be rolled; n tokens touch
// (n + page - 2) / page + 1 pages at most. A step adds its chunk, and a page's end for each sequence in it.
int64_t window_pages(int64_t window_size, const KvOptions& o) {
  const int64_t reach = window_size + o.rollback_tokens, held = (reach + kWindowPageTokens - 2) / kWindowPageTokens + 1;
  return o.max_sequences * (held + 1) + pages_of(o.max_chunk, kWindowPageTokens);
}

}  // namespace

KvStore::KvStore(const ModelGeometry& geometry, const KvOptions& options)
    : options_(options),
      window_size_(geometry.window_size),
      layout_(geometry, options),
      window_(thermocline::window_pages(window_size_, options)),
      compressed_(pages_of(options.max_tokens, kPageTokens) + options.max_sequences),
      rings_(options.max_sequences) {}

Result<std::unique_ptr<KvStore>> KvStore::create(const ModelGeometry& geometry, const KvOptions& options) {
  std::unique_ptr<KvStore> store(new KvStore(geometry, options));
  if (options.host_rows) {
    const KvLayout& layout = store->layout_;
    TC_ASSIGN(store->host_, HostKvMemory::allocate({{{store->window_.pages(), layout.window_page_bytes()},
                                                     {store->compressed_.pages(), layout.compressed_page_bytes()},
                                                     {store->rings_.pages(), layout.ring_bytes()}}},
                                                   options.nodes));
    store->memory_ = &store->host_;
  }
  return store;
}

uint64_t KvStore::bytes(const ModelGeometry& geometry, const KvOptions& options) {
  const HostMemoryMeasure measure;
  TC_CHECK(create(geometry, options).has_value());
  return measure.bytes();
}

Result<std::unique_ptr<SequenceKv>> KvStore::new_sequence() {
  if (rings_.free_pages() == 0)
    return Error{ErrorCode::out_of_memory, "all " + std::to_string(options_.max_sequences) + " sequences are in use"};
  std::unique_ptr<SequenceKv> sequence(new SequenceKv(*this));
  sequence->ring_ = rings_.take();
  sequence->number_ = ++sequences_made_;
  return sequence;
}

int32_t KvStore::take_compressed() {
  while (compressed_.free_pages() == 0) TC_CHECK(reclaim());
  return compressed_.take();
}

template <class Fn>
void KvStore::for_live_slots(int64_t length, const Fn& fn) const {
  for (int layer = 0; layer < layout_.layers(); ++layer) {
    const KvLayout::Ring& ring = layout_.ring(layer);
    if (ring.slots == 0) continue;
    for (int64_t pos = ring.first_live(length); pos < length;) {
      const int64_t count = std::min(length - pos, ring.slots - pos % ring.slots);
      fn(ring.at(pos), count * ring.slot_floats());
      pos += count;
    }
  }
}

size_t KvStore::live_floats(int64_t length) const {
  size_t live = 0;
  for_live_slots(length, [&](int64_t, int64_t floats) { live += static_cast<size_t>(floats); });
  return live;
}

// Window pages that the token after `length` sees.
int64_t KvStore::window_pages_at(int64_t length) const {
  return pages_of(length, kWindowPageTokens) - std::max<int64_t>(0, length - window_size_ + 1) / kWindowPageTokens;
}

int64_t KvStore::compressed_pages_at(int64_t length) const {
  return layout_.compressed_page_bytes() == 0 ? 0 : pages_of(length, kPageTokens);
}

// A ring of host memory, or room for a copy of one that is not.
float* KvStore::ring_image(int32_t ring) {
  if (memory_ == &host_) return reinterpret_cast<float*>(host_.page(KvPool::ring, ring));
  ring_copy_.resize(static_cast<size_t>(layout_.ring_floats()));
  return ring_copy_.data();
}

Result<KvCheckpoint> KvStore::checkpoint(const SequenceKv& sequence, int64_t length) {
  TC_CHECK(length >= sequence.rollback_floor_ && length <= sequence.length_);
  KvCheckpoint out;
  out.length_ = length;
  const int64_t pages = window_pages_at(length), first = pages_of(length, kWindowPageTokens) - pages;
  out.allocate(static_cast<size_t>(pages * layout_.window_page_bytes()), live_floats(length));
  for (int64_t i = 0; i < pages; ++i)
    TC_RETURN_IF_ERROR(memory().read(
        KvPool::window, sequence.window_pages_[static_cast<size_t>(first + i - sequence.first_window_page_)],
        out.image_.get() + i * layout_.window_page_bytes()));
  if (layout_.ring_floats() > 0) {
    float* const image = ring_image(sequence.ring_);
    if (memory_ != &host_)
      TC_RETURN_IF_ERROR(memory().read(KvPool::ring, sequence.ring_, reinterpret_cast<std::byte*>(image)));
    float* to = out.rings();
    for_live_slots(length, [&](int64_t at, int64_t floats) { to = std::copy_n(image + at, floats, to); });
  }
  out.pages_.assign(sequence.compressed_pages_.begin(),
                    sequence.compressed_pages_.begin() + static_cast<std::ptrdiff_t>(compressed_pages_at(length)));
  for (const int32_t page : out.pages_) compressed_.add(page, Owner::cache);
  out.pool_ = &compressed_;
  return out;
}

Result<KvCheckpoint> KvStore::blank(int64_t length, std::span<const int32_t> first_pages) {
  const int64_t pages = compressed_pages_at(length), first = static_cast<int64_t>(first_pages.size());
  TC_CHECK(first <= pages);
  KvCheckpoint out;
  out.length_ = length;
  out.pool_ = &compressed_;
  out.owner_ = Owner::sequence;
  for (const int32_t page : first_pages) {
    compressed_.add(page, Owner::sequence);
    out.pages_.push_back(page);
  }
  if (pages - first > available_pages()) return Error{ErrorCode::out_of_memory, "no free KV pages for a saved prefix"};
  while (static_cast<int64_t>(out.pages_.size()) < pages) out.pages_.push_back(take_compressed());
  out.allocate(static_cast<size_t>(window_pages_at(length) * layout_.window_page_bytes()), live_floats(length));
  return out;
}

Result<std::unique_ptr<SequenceKv>> KvStore::restore(const KvCheckpoint& checkpoint) {
  TC_ASSIGN(std::unique_ptr<SequenceKv> sequence, new_sequence());
  SequenceKv& s = *sequence;
  const int64_t page_bytes = layout_.window_page_bytes(), length = checkpoint.length_;
  const int64_t pages = static_cast<int64_t>(checkpoint.window_bytes_) / page_bytes;
  if (pages > window_.free_pages()) return Error{ErrorCode::out_of_memory, "no free KV window pages"};
  s.length_ = s.rollback_floor_ = length;
  s.first_window_page_ = pages_of(length, kWindowPageTokens) - pages;
  s.compressed_pages_ = checkpoint.pages_;
  for (const int32_t page : s.compressed_pages_) compressed_.add(page, Owner::sequence);
  s.list_by_node();
  for (int64_t i = 0; i < pages; ++i) {
    s.window_pages_.push_back(window_.take());
    TC_RETURN_IF_ERROR(
        memory().write(KvPool::window, s.window_pages_.back(), checkpoint.image_.get() + i * page_bytes));
  }
  if (layout_.ring_floats() == 0) return sequence;
  float* const image = ring_image(s.ring_);
  const float* from = checkpoint.rings();
  for_live_slots(length, [&](int64_t at, int64_t floats) {
    std::copy_n(from, floats, image + at);
    from += floats;
  });
  if (memory_ != &host_)
    TC_RETURN_IF_ERROR(memory().write(KvPool::ring, s.ring_, reinterpret_cast<const std::byte*>(image)));
  return sequence;
}

Result<std::unique_ptr<SequenceKv>> KvStore::fork(const SequenceKv& sequence) {
  TC_ASSIGN(const KvCheckpoint present, checkpoint(sequence, sequence.length()));
  return restore(present);
}

}  // namespace thermocline
