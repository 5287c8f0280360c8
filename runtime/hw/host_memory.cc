#include "runtime/hw/host_memory.h"

#include <algorithm>

#include "runtime/hw/worker_pool.h"

namespace thermocline {
namespace {

constexpr uint64_t kPage = 4096, kPiece = 2 << 20;  // a worker's pieces are whole transparent huge pages

// Whose workers touch what is meant for an OS node; -1: all, where no team's is.
int team_of(const WorkerPool& pool, int os_node) {
  for (int node = 0; os_node >= 0 && node < pool.nodes(); ++node)
    if (pool.os_node(node) == os_node) return node;
  return -1;
}

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
  for (const Mapping& mapping : mappings_) sum += mapping.bytes;
  return sum;
}

void HostMemoryLedger::remove(const std::byte* data) {
  std::erase_if(mappings_, [&](const Mapping& mapping) { return mapping.data == data; });
}

void HostMemoryLedger::make_resident(WorkerPool& pool) const {
  pool.run([&](int worker) {
    const WorkerPool::Team& team = pool.team(worker);
    int64_t piece = 0;  // dealt out in turn over all buffers
    for (const Mapping& mapping : mappings_) {
      const int node = team_of(pool, mapping.os_node);
      const int64_t sharers = node < 0 ? pool.size() : team.size, mine = node < 0 ? worker : team.rank;
      for (uint64_t begin = 0; begin < mapping.bytes; begin += kPiece, ++piece) {
        if ((node >= 0 && node != team.node) || piece % sharers != mine) continue;
        for (uint64_t at = begin; at < std::min(mapping.bytes, begin + kPiece); at += kPage) {
          volatile std::byte* const byte = mapping.data + at;
          *byte = *byte;
        }
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
