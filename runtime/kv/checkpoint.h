// KvCheckpoint: what it takes to go on from a length: a sequence's window rows and open compressor windows, copied, and
// its compressed pages, referred to. Compressed rows alone cannot resume (spec section 4.6).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "runtime/kv/page_pool.h"

namespace thermocline {

class KvCheckpoint {
 public:
  KvCheckpoint(KvCheckpoint&& other) noexcept { *this = std::move(other); }
  KvCheckpoint& operator=(KvCheckpoint&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(owner_, other.owner_);
    std::swap(length_, other.length_);
    std::swap(pages_, other.pages_);
    std::swap(window_bytes_, other.window_bytes_);
    std::swap(image_bytes_, other.image_bytes_);
    std::swap(image_, other.image_);
    return *this;
  }
  ~KvCheckpoint() {
    if (pool_)
      for (const int32_t page : pages_) pool_->drop(page, owner_);
  }

  int64_t length() const { return length_; }
  /// Of host memory, its pages not among them.
  int64_t bytes() const { return static_cast<int64_t>(image_bytes_); }
  /// Compressed pages of its tokens; rows beyond length() on the last one are somebody else's, or nobody's.
  const std::vector<int32_t>& pages() const { return pages_; }
  /// What it copies of the sequence, to be saved or filled elsewhere: window rows, then rings.
  std::span<std::byte> image() const { return {image_.get(), image_bytes_}; }
  /// Of KvStore::blank(): the bytes of its pages and copies are there, and its pages can be taken as those of any
  /// other.
  void settle() {
    for (const int32_t page : pages_) {
      pool_->add(page, PagePool::Owner::cache);
      pool_->drop(page, owner_);
    }
    owner_ = PagePool::Owner::cache;
  }

 private:
  friend class KvStore;
  KvCheckpoint() = default;
  void allocate(size_t window_bytes, size_t ring_floats) {
    window_bytes_ = window_bytes;
    image_bytes_ = window_bytes + ring_floats * sizeof(float);
    image_ = std::make_unique_for_overwrite<std::byte[]>(image_bytes_);
  }
  float* rings() const { return reinterpret_cast<float*>(image_.get() + window_bytes_); }

  PagePool* pool_ = nullptr;  // of pages_; the store's, which outlives it
  PagePool::Owner owner_ = PagePool::Owner::cache;
  int64_t length_ = 0;
  std::vector<int32_t> pages_;
  // Whole window pages, from the first that the next token sees; then of every layer that compresses the live slots by
  // rising position.
  std::unique_ptr<std::byte[]> image_;
  size_t window_bytes_ = 0, image_bytes_ = 0;
};

}  // namespace thermocline
