// KvCheckpoint: what it takes to go on from a length: a sequence's window rows and open compressor windows, copied, and
// its compressed pages, referred to. Compressed rows alone cannot resume (spec section 4.6).
#pragma once

#include <cstddef>
#include <cstdint>
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
    std::swap(window_, other.window_);
    std::swap(rings_, other.rings_);
    return *this;
  }
  ~KvCheckpoint() {
    if (pool_)
      for (const int32_t page : pages_) pool_->drop(page, owner_);
  }

  int64_t length() const { return length_; }
  /// Of host memory, its pages not among them.
  int64_t bytes() const { return static_cast<int64_t>(window_.size() + rings_.size() * sizeof(float)); }
  /// Compressed pages of its tokens; rows beyond length() on the last one are somebody else's, or nobody's.
  const std::vector<int32_t>& pages() const { return pages_; }
  /// What it copies of the sequence, to be saved or filled elsewhere.
  std::span<std::byte> window() { return window_; }
  std::span<std::byte> rings() { return std::as_writable_bytes(std::span(rings_)); }
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

  PagePool* pool_ = nullptr;  // of pages_; the store's, which outlives it
  PagePool::Owner owner_ = PagePool::Owner::cache;
  int64_t length_ = 0;
  std::vector<int32_t> pages_;
  std::vector<std::byte> window_;  // whole window pages, from the first that the next token sees
  std::vector<float> rings_;       // of every layer that compresses, the live slots by rising position
};

}  // namespace thermocline
