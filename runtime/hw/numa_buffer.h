// NumaBuffer: page-aligned host memory in one mapping, on huge pages where the system gives them, optionally bound to a
// NUMA node. Move-only; unmapped by its owner.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "runtime/base/result.h"

namespace thermocline {

enum class PageKind { small_4k, transparent_huge, huge_2m, huge_1g };

std::string_view page_kind_name(PageKind kind);

class NumaBuffer {
 public:
  NumaBuffer() = default;
  /// Maps `bytes` of zeroed memory. node >= 0 binds the pages to that OS node before first touch; a refused binding is
  /// not an error (containers forbid it), `bound()` tells. Large buffers get explicit pages of 1 GiB, then of 2 MiB,
  /// when the system has reserved enough of them, where they are wanted; transparent huge pages otherwise. Errors:
  /// out_of_memory.
  static Result<NumaBuffer> allocate(uint64_t bytes, int node = -1);

  NumaBuffer(NumaBuffer&& other) noexcept { swap(other); }
  NumaBuffer& operator=(NumaBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~NumaBuffer();

  std::byte* data() const { return data_; }
  uint64_t size() const { return bytes_; }
  PageKind pages() const { return pages_; }
  bool bound() const { return bound_; }
  /// The share of touched pages that lie on an OS node, by move_pages over at most 1024 pages spread over the buffer.
  /// Nothing where the system does not say (containers), or no page has been touched.
  std::optional<double> share_on_node(int node) const;

 private:
  Status map(int node);
  void swap(NumaBuffer& other) noexcept;

  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
  uint64_t mapped_bytes_ = 0;
  PageKind pages_ = PageKind::small_4k;
  bool bound_ = false;
};

/// An array of trivially destructible T in a NumaBuffer, zeroed. An empty one holds no mapping.
template <class T>
class HostArray {
 public:
  HostArray() = default;
  static Result<HostArray> allocate(int64_t count, int node = -1) {
    HostArray array;
    if (count > 0) {
      TC_ASSIGN(array.buffer_, NumaBuffer::allocate(static_cast<uint64_t>(count) * sizeof(T), node));
    }
    array.count_ = count;
    return array;
  }
  T* data() const { return reinterpret_cast<T*>(buffer_.data()); }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) const { return data()[i]; }

 private:
  NumaBuffer buffer_;
  int64_t count_ = 0;
};

}  // namespace thermocline
