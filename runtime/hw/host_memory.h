// Scopes over the buffers that the calling thread allocates (NumaBuffer, and with it HostArray): measure what a builder
// would take, note what it took and make it resident, or promise that nothing is taken at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace thermocline {

class WorkerPool;

/// While one lives, buffers of this thread get a size and no memory, and their bytes are added up: what allocates is
/// asked for its size, and no second description of sizes can drift from it. Such buffers may not be read or written.
class HostMemoryMeasure {
 public:
  HostMemoryMeasure();
  ~HostMemoryMeasure();
  HostMemoryMeasure(const HostMemoryMeasure&) = delete;
  HostMemoryMeasure& operator=(const HostMemoryMeasure&) = delete;

  uint64_t bytes() const { return bytes_; }

 private:
  friend class NumaBuffer;
  static HostMemoryMeasure*& current();
  uint64_t bytes_ = 0;
  HostMemoryMeasure* const outer_;
};

/// Notes the buffers that this thread allocates while one lives and that are still there. What frees them is this
/// thread too, or comes after the ledger.
class HostMemoryLedger {
 public:
  HostMemoryLedger();
  ~HostMemoryLedger();
  HostMemoryLedger(const HostMemoryLedger&) = delete;
  HostMemoryLedger& operator=(const HostMemoryLedger&) = delete;

  uint64_t bytes() const;
  /// Touches every page of them without changing a byte, the workers side by side: no page fault and no kill for want
  /// of memory is left for later. A range lies on the node of the worker that touched it, the whole on all of them;
  /// what is one node's is touched by its own workers, so that it lies there even where the system refuses to bind it.
  void make_resident(WorkerPool& pool) const;

 private:
  friend class NumaBuffer;
  static HostMemoryLedger*& current();
  struct Mapping {
    std::byte* data = nullptr;
    uint64_t bytes = 0;
    int os_node = -1;  // it is meant for, -1: for all
  };
  void add(std::byte* data, uint64_t bytes, int os_node) { mappings_.push_back({data, bytes, os_node}); }
  void remove(const std::byte* data);
  std::vector<Mapping> mappings_;
  HostMemoryLedger* const outer_;
};

/// While one lives, allocating a buffer on this thread is a bug: sizes are settled before a step, as a
/// sealed device says of its memory. Debug and sanitizer builds abort, others warn.
class HostMemorySeal {
 public:
  HostMemorySeal();
  ~HostMemorySeal();
  HostMemorySeal(const HostMemorySeal&) = delete;
  HostMemorySeal& operator=(const HostMemorySeal&) = delete;

 private:
  friend class NumaBuffer;
  static int& depth();
};

}  // namespace thermocline
