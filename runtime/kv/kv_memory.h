// KvMemory: the bytes behind page and ring numbers, here or on devices.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "runtime/base/result.h"
#include "runtime/hw/numa_buffer.h"

namespace thermocline {

enum class KvPool : uint8_t { window, compressed, ring };
inline constexpr int kKvPools = 3;

/// Pages are read and written whole, as KvLayout of all layers has them. Errors: internal (a device fault).
class KvMemory {
 public:
  virtual ~KvMemory() = default;
  virtual Status read(KvPool pool, int32_t page, std::byte* to) = 0;
  virtual Status write(KvPool pool, int32_t page, const std::byte* from) = 0;
  virtual Status copy(KvPool pool, int32_t from, int32_t to) = 0;
  /// The page itself where it is host memory, nullptr elsewhere.
  virtual std::byte* place(KvPool, int32_t) { return nullptr; }
};

/// Host memory: pages are where they are read. Compressed pages, of which a long context scans all the keys, lie round
/// robin over the nodes, so that each node's workers can scan their own.
class HostKvMemory : public KvMemory {
 public:
  struct Size {
    int64_t pages = 0, page_bytes = 0;
  };
  /// By KvPool; compressed pages over one buffer for each of the OS nodes, bound to it, -1: to none.
  /// Errors: out_of_memory.
  static Result<HostKvMemory> allocate(const std::array<Size, kKvPools>& sizes, std::span<const int> nodes);

  std::byte* page(KvPool pool, int32_t number) const {
    const Part& part = parts_[static_cast<size_t>(pool)];
    if (part.nodes == 1) return part.first + number * part.page_bytes;
    return part.buffers[static_cast<size_t>(number % part.nodes)].data() + number / part.nodes * part.page_bytes;
  }
  /// How many nodes compressed pages lie on, 0 before allocate(); and on which of them a page does.
  int nodes() const { return parts_[static_cast<size_t>(KvPool::compressed)].nodes; }
  int node_of(int32_t page) const { return page % nodes(); }
  Status read(KvPool pool, int32_t page, std::byte* to) override;
  Status write(KvPool pool, int32_t page, const std::byte* from) override;
  Status copy(KvPool pool, int32_t from, int32_t to) override;
  std::byte* place(KvPool pool, int32_t page) override { return this->page(pool, page); }

 private:
  struct Part {
    std::vector<NumaBuffer> buffers;  // page p: number p / nodes of buffer p % nodes
    std::byte* first = nullptr;       // of them, as most machines have one
    int32_t nodes = 0;
    int64_t page_bytes = 0;
  };
  std::array<Part, kKvPools> parts_;
};

}  // namespace thermocline
