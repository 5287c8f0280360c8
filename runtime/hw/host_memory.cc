#include "runtime/hw/host_memory.h"

#include <algorithm>

#include "runtime/hw/worker_pool.h"

namespace thermocline {
namespace {

constexpr uint64_t kPage = 4096, kPiece = 2 << 20;  // a worker's pieces are whole transparent huge pages

}  // namespace

HostMemoryMeasure*& HostMemoryMeasure::current() {
  thread_local HostMemoryMeasure* measure = nullptr;
  return measure;
}
HostMemoryMeasure::HostMemoryMeasure() : outer_(std::exchange(current(), this)) {}
HostMemoryMeasure::~HostMemoryMeasure() { current() = outer_; }

HostMemoryLedger*& HostMemoryLedger::current() {
  thread_local HostMemoryLedger* ledger = nullptr;
  return ledger;
}
HostMemoryLedger::HostMemoryLedger() : outer_(std::exchange(current(), this)) {}
HostMemoryLedger::~HostMemoryLedger() { current() = outer_; }

uint64_t HostMemoryLedger::bytes() const {
  uint64_t sum = 0;
  for (const auto& [data, bytes] : mappings_) sum += bytes;
  return sum;
}

void HostMemoryLedger::remove(const std::byte* data) {
  std::erase_if(mappings_, [&](const auto& mapping) { return mapping.first == data; });
}

void HostMemoryLedger::make_resident(WorkerPool& pool) const {
  pool.run([&](int worker) {
    int64_t piece = 0;  // dealt out in turn over all buffers
    for (const auto& [data, bytes] : mappings_)
      for (uint64_t begin = 0; begin < bytes; begin += kPiece) {
        if (piece++ % pool.size() != worker) continue;
        for (uint64_t at = begin; at < std::min(bytes, begin + kPiece); at += kPage) {
          volatile std::byte* const byte = data + at;
          *byte = *byte;
        }
      }
  });
}

int& HostMemorySeal::depth() {
  thread_local int depth = 0;
  return depth;
}
HostMemorySeal::HostMemorySeal() { ++depth(); }
HostMemorySeal::~HostMemorySeal() { --depth(); }

}  // namespace thermocline
