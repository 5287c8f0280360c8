// CopyRing: host memory for copies that one thread makes and another is done with in the same order. Once warm, a copy
// meets no page fault.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>

#include "runtime/hw/numa_buffer.h"

namespace thermocline {

class CopyRing {
 public:
  /// Errors: out_of_memory.
  static Result<CopyRing> create(uint64_t bytes) {
    CopyRing ring;
    TC_ASSIGN(ring.memory_, NumaBuffer::allocate(bytes));
    return ring;
  }
  CopyRing(CopyRing&& other) noexcept
      : memory_(std::move(other.memory_)), end_(other.end_), released_(other.released_.load()) {}

  /// The taker's thread: as many bytes in one piece, or an empty span where what waits leaves no room.
  std::span<std::byte> take(uint64_t bytes) {
    const uint64_t size = memory_.size(), released = released_.load(std::memory_order_acquire);
    const bool empty = released == end_;
    uint64_t begin = end_;
    if (empty || begin % size + bytes > size)
      begin = (begin + size - 1) / size * size;  // from the warm beginning again
    if ((empty ? 0 : begin - released) + bytes > size) return {};
    if (empty) released_.store(begin, std::memory_order_release);
    end_ = begin + (bytes + kAlign - 1) / kAlign * kAlign;
    return {memory_.data() + begin % size, bytes};
  }
  /// Where what was taken so far ends.
  uint64_t end() const { return end_; }
  uint64_t waiting() const { return end_ - released_.load(std::memory_order_acquire); }
  /// The other thread: all up to an end() is free again.
  void release(uint64_t end) { released_.store(end, std::memory_order_release); }

 private:
  static constexpr uint64_t kAlign = 64;
  CopyRing() = default;

  NumaBuffer memory_;
  uint64_t end_ = 0;  // counted on over all laps
  std::atomic<uint64_t> released_{0};
};

}  // namespace thermocline
