#include "runtime/hw/numa_buffer.h"

#include <linux/mempolicy.h>
#include <linux/mman.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "runtime/base/log.h"
#include "runtime/hw/host_memory.h"

namespace thermocline {
namespace {

constexpr uint64_t kGiantPage = uint64_t{1} << 30;
constexpr uint64_t kHugePage = 2 << 20;
constexpr uint64_t kSmallPage = 4096;

uint64_t round_up(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

bool bind_to_node(void* data, uint64_t bytes, int node) {
  if (node < 0 || node >= 64) return false;
  const unsigned long mask = 1ul << node;
  return syscall(SYS_mbind, data, bytes, MPOL_BIND, &mask, 65, 0) == 0;
}

constexpr std::string_view kPageKindNames[] = {"4 KiB pages", "transparent huge pages", "2 MiB pages", "1 GiB pages"};

void* map_pages(uint64_t bytes, int extra_flags) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | extra_flags, -1, 0);
  return data == MAP_FAILED ? nullptr : data;
}

// Explicit huge pages, bound and populated at once: a node whose pool is empty is told here and not by a SIGBUS later.
void* map_explicit(uint64_t bytes, int size_flag, int node, bool& bound) {
  void* data = map_pages(bytes, MAP_HUGETLB | size_flag);
  if (!data) return nullptr;
  bound = bind_to_node(data, bytes, node);
#ifndef MADV_POPULATE_WRITE
  constexpr int MADV_POPULATE_WRITE = 23;
#endif
  if (madvise(data, bytes, MADV_POPULATE_WRITE) == 0) return data;
  munmap(data, bytes);
  return nullptr;
}

}  // namespace

std::string_view page_kind_name(PageKind kind) { return kPageKindNames[static_cast<int>(kind)]; }

Result<NumaBuffer> NumaBuffer::allocate(uint64_t bytes, int node) {
  NumaBuffer buffer;
  buffer.bytes_ = bytes;
  if (bytes == 0) return buffer;
  if (HostMemoryMeasure* const measure = HostMemoryMeasure::current()) {
    measure->bytes_ += round_up(bytes, bytes >= kHugePage ? kHugePage : kSmallPage);
    return buffer;
  }
  if (HostMemorySeal::depth() > 0) {
#if defined(TC_SANITIZED) || !defined(NDEBUG)
    TC_CHECK(false, std::to_string(bytes) + " bytes are allocated within a step");
#else
    log_warn("internal error, please report: {} bytes are allocated within a step", bytes);
#endif
  }
  TC_RETURN_IF_ERROR(buffer.map(node));
  if (HostMemoryLedger* const ledger = HostMemoryLedger::current())
    ledger->add(buffer.data_, buffer.mapped_bytes_, node);
  return buffer;
}

Status NumaBuffer::map(int node) {
  // Reserved huge pages are scarce: only for weights and caches.
  struct Explicit {
    PageKind kind;
    uint64_t page, least;
    int flag;
  };
  for (const Explicit& e : {Explicit{PageKind::huge_1g, kGiantPage, 4 * kGiantPage, 30 << MAP_HUGE_SHIFT},
                            Explicit{PageKind::huge_2m, kHugePage, 64 * kHugePage, 21 << MAP_HUGE_SHIFT}}) {
    if (bytes_ < e.least) continue;
    mapped_bytes_ = round_up(bytes_, e.page);
    data_ = static_cast<std::byte*>(map_explicit(mapped_bytes_, e.flag, node, bound_));
    pages_ = e.kind;
    if (data_) return {};
  }
  const bool huge = bytes_ >= kHugePage;
  mapped_bytes_ = round_up(bytes_, huge ? kHugePage : kSmallPage);
  void* data = map_pages(mapped_bytes_, MAP_NORESERVE);
  if (!data)
    return Error{ErrorCode::out_of_memory,
                 "cannot map " + std::to_string(bytes_ >> 20) + " MiB of memory: " + std::strerror(errno)};
  const bool transparent = huge && madvise(data, mapped_bytes_, MADV_HUGEPAGE) == 0;
  pages_ = transparent ? PageKind::transparent_huge : PageKind::small_4k;
  data_ = static_cast<std::byte*>(data);
  bound_ = bind_to_node(data, mapped_bytes_, node);
  return {};
}

std::optional<double> NumaBuffer::share_on_node(int node) const {
  constexpr uint64_t kSamples = 1024;
  std::vector<void*> pages;
  const uint64_t step = round_up(std::max<uint64_t>(1, bytes_ / kSamples), kSmallPage);
  for (uint64_t at = 0; at < bytes_; at += step) pages.push_back(data_ + at);
  std::vector<int> nodes(pages.size(), -1);
  if (pages.empty() || syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, nodes.data(), 0) != 0)
    return std::nullopt;
  const auto touched = std::count_if(nodes.begin(), nodes.end(), [](int n) { return n >= 0; });
  if (touched == 0) return std::nullopt;
  return static_cast<double>(std::count(nodes.begin(), nodes.end(), node)) / static_cast<double>(touched);
}

NumaBuffer::~NumaBuffer() {
  if (!data_) return;
  if (HostMemoryLedger* const ledger = HostMemoryLedger::current()) ledger->remove(data_);
  munmap(data_, mapped_bytes_);
}

void NumaBuffer::swap(NumaBuffer& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(mapped_bytes_, other.mapped_bytes_);
  std::swap(pages_, other.pages_);
  std::swap(bound_, other.bound_);
}

}  // namespace thermocline
