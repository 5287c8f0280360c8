#include "runtime/kv/kv_memory.h"

#include <cstring>

namespace thermocline {

Result<HostKvMemory> HostKvMemory::allocate(const std::array<Size, kKvPools>& sizes) {
  HostKvMemory memory;
  for (size_t i = 0; i < sizes.size(); ++i) {
    memory.parts_[i].page_bytes = sizes[i].page_bytes;
    if (const int64_t bytes = sizes[i].pages * sizes[i].page_bytes; bytes > 0) {
      TC_ASSIGN(memory.parts_[i].buffer, NumaBuffer::allocate(static_cast<uint64_t>(bytes)));
    }
  }
  return memory;
}

Status HostKvMemory::read(KvPool pool, int32_t page, std::byte* to) {
  std::memcpy(to, this->page(pool, page), static_cast<size_t>(parts_[static_cast<size_t>(pool)].page_bytes));
  return {};
}

Status HostKvMemory::write(KvPool pool, int32_t page, const std::byte* from) {
  std::memcpy(this->page(pool, page), from, static_cast<size_t>(parts_[static_cast<size_t>(pool)].page_bytes));
  return {};
}

Status HostKvMemory::copy(KvPool pool, int32_t from, int32_t to) { return write(pool, to, page(pool, from)); }

}  // namespace thermocline
