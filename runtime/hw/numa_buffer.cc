#include "runtime/hw/numa_buffer.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace thermocline {
namespace {

constexpr uint64_t kHugePage = 2 << 20;
constexpr uint64_t kSmallPage = 4096;

uint64_t round_up(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

bool bind_to_node(void* data, uint64_t bytes, int node) {
  if (node < 0 || node >= 64) return false;
  const unsigned long mask = 1ul << node;
  return syscall(SYS_mbind, data, bytes, MPOL_BIND, &mask, 65, 0) == 0;
}

void* map(uint64_t bytes, int extra_flags) {
  void* data =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | extra_flags, -1, 0);
  return data == MAP_FAILED ? nullptr : data;
}

}  // namespace

Result<NumaBuffer> NumaBuffer::allocate(uint64_t bytes, int node) {
  NumaBuffer buffer;
  buffer.bytes_ = bytes;
  if (bytes == 0) return buffer;
  void* data = nullptr;
  if (bytes >= 64 * kHugePage) {  // reserved huge pages are scarce: only for weights and caches
    buffer.mapped_bytes_ = round_up(bytes, kHugePage);
    data =
        mmap(nullptr, buffer.mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    if (data == MAP_FAILED) data = nullptr;
    if (data) buffer.pages_ = PageKind::huge_2m;
  }
  if (!data) {
    const bool huge = bytes >= kHugePage;
    buffer.mapped_bytes_ = round_up(bytes, huge ? kHugePage : kSmallPage);
    data = map(buffer.mapped_bytes_, 0);
    if (!data)
      return Error{ErrorCode::out_of_memory,
                   "cannot map " + std::to_string(bytes >> 20) + " MiB of memory: " + std::strerror(errno)};
    if (huge && madvise(data, buffer.mapped_bytes_, MADV_HUGEPAGE) == 0) buffer.pages_ = PageKind::transparent_huge;
  }
  buffer.data_ = static_cast<std::byte*>(data);
  buffer.bound_ = bind_to_node(data, buffer.mapped_bytes_, node);
  return buffer;
}

NumaBuffer::~NumaBuffer() {
  if (data_) munmap(data_, mapped_bytes_);
}

void NumaBuffer::swap(NumaBuffer& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(mapped_bytes_, other.mapped_bytes_);
  std::swap(pages_, other.pages_);
  std::swap(bound_, other.bound_);
}

}  // namespace thermocline
