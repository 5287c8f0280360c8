#include "runtime/kv/kv_memory.h"

#include <cstring>

namespace thermocline {

Result<HostKvMemory> HostKvMemory::allocate(const std::array<Size, kKvPools>& sizes, std::span<const int> nodes) {
  constexpr int kUnbound[] = {-1};
  TC_CHECK(!nodes.empty());
  HostKvMemory memory;
  for (size_t i = 0; i < sizes.size(); ++i) {
    Part& part = memory.parts_[i];
    part.page_bytes = sizes[i].page_bytes;
    const std::span<const int> places = i == static_cast<size_t>(KvPool::compressed) ? nodes : kUnbound;
    part.nodes = static_cast<int32_t>(places.size());
    for (int32_t n = 0; n < part.nodes; ++n) {
      const int64_t pages = (sizes[i].pages + part.nodes - 1 - n) / part.nodes;
      TC_ASSIGN(NumaBuffer buffer,
                NumaBuffer::allocate(static_cast<uint64_t>(pages * part.page_bytes), places[static_cast<size_t>(n)]));
      part.buffers.push_back(std::move(buffer));
    }
    part.first = part.buffers[0].data();
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
