#include "runtime/hw/memory_bandwidth.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "runtime/hw/cgroup.h"
#include "runtime/hw/numa_buffer.h"

namespace thermocline {
namespace {

#ifdef TC_SANITIZED  // the resolvers of clones run before a sanitizer's runtime is up
#define TC_VECTOR_CLONES
#else
#define TC_VECTOR_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#endif

typedef uint64_t Vector __attribute__((vector_size(64)));

// Wider vectors where the CPU has them; the compiler makes one clone per target and the loader picks.
// Prefetching 4 KiB ahead keeps the read streams of one core full.
TC_VECTOR_CLONES uint64_t sum_lines(const std::byte* data, int64_t bytes) {
  Vector sums[4] = {};
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    for (int line = 0; line < 4; ++line) {
      __builtin_prefetch(data + i + line * 64 + 4096);
      Vector v;
      std::memcpy(&v, data + i + line * 64, sizeof v);
      sums[line] += v;
    }
  }
  const Vector total = sums[0] + sums[1] + sums[2] + sums[3];
  uint64_t sum = 0;
  for (int i = 0; i < 8; ++i) sum += total[i];
  return sum;
}

constexpr uint64_t kLeastBytes = 16 << 20;  // fewer say nothing about memory

}  // namespace

Result<StreamRead> StreamRead::create(WorkerPool& pool, uint64_t bytes) {
  StreamRead stream(pool);
  const MemoryBudget free = free_memory();
  if (bytes == 0) {
    bytes = std::max(uint64_t{256} << 20, 2 * pool.last_level_cache_bytes());
    if (const uint64_t half = free.bytes / 2; free.bytes < bytes && half >= kLeastBytes) {
      bytes = half;
      stream.note_ =
          "read from " + std::to_string(bytes >> 20) + " MiB, as little more is free: caches may have helped";
    }
  }
  if (free.bytes < bytes)
    return Error{ErrorCode::out_of_memory, "measuring how fast memory is read takes " + std::to_string(bytes >> 20) +
                                               " MiB, and " + std::to_string(free.bytes >> 20) + " MiB are free (" +
                                               free.source + ")"};
  TC_ASSIGN(stream.buffer_, NumaBuffer::allocate(bytes));
  stream.chunk_ = static_cast<int64_t>(bytes) / pool.size() / 256 * 256;
  pool.run([&](int worker) {  // first touch: each share lies on its reader's node
    std::memset(stream.buffer_.data() + worker * stream.chunk_, worker + 1, static_cast<size_t>(stream.chunk_));
  });
  return stream;
}

double StreamRead::measure(int passes) {
  const WorkerPool::StepScope scope(*pool_);
  double best = 0;
  volatile uint64_t sink = 0;
  for (int pass = 0; pass < passes; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    std::atomic<uint64_t> total{0};
    pool_->run([&](int worker) { total += sum_lines(buffer_.data() + worker * chunk_, chunk_); });
    sink = sink + total;
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, static_cast<double>(chunk_) * pool_->size() / seconds);
  }
  return best;
}

uint64_t peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
}

}  // namespace thermocline
