// KvMemory: the bytes behind page and ring numbers, here or on devices.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

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

/// Host memory: pages are where they are read.
class HostKvMemory : public KvMemory {
 public:
  struct Size {
    int64_t pages = 0, page_bytes = 0;
  };
  /// By KvPool. Errors: out_of_memory.
  static Result<HostKvMemory> allocate(const std::array<Size, kKvPools>& sizes);

  std::byte* page(KvPool pool, int32_t number) const {
    const Part& part = parts_[static_cast<size_t>(pool)];
    return part.buffer.data() + number * part.page_bytes;
  }
  Status read(KvPool pool, int32_t page, std::byte* to) override;
  Status write(KvPool pool, int32_t page, const std::byte* from) override;
  Status copy(KvPool pool, int32_t from, int32_t to) override;
  std::byte* place(KvPool pool, int32_t page) override { return this->page(pool, page); }

 private:
  struct Part {
    NumaBuffer buffer;
    int64_t page_bytes = 0;
  };
  std::array<Part, kKvPools> parts_;
};

}  // namespace thermocline
