// The SIMT interpreter: runs one block of a kernel on one host thread. Every CUDA thread is a fiber that yields at
// barriers and warp collectives; the scheduler carries a collective out once every lane of its mask has arrived, so a
// lane that never comes is named instead of awaited. Kernels reach it through kernels_gpu/device/simt.cuh only.
//
// With TC_SIMT_CHECKS the kernels' accesses are checked too: bounds of shared arrays and device views, reads of shared
// memory nobody wrote, two lanes at one shared element without a barrier between them, and device memory touched by
// two streams without an event between them. A fault names kernel, block and lane and fails the stream.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace thermocline::gpu::simt {

inline constexpr int kWarp = 32;
inline constexpr int kMaxBlock = 1024;
/// What a block may have on every card we build for: 99 KiB on sm_86, sm_89 and sm_120.
inline constexpr size_t kMaxSharedBytes = 99 * 1024;

struct Dim {
  int x = 1, y = 1, z = 1;
};

struct LaunchShape {
  const char* kernel = "";
  Dim grid;
  int block = 1;
};

/// What a kernel did wrong.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A collective of some lanes of a warp: what a lane brings, and where its share of the result goes.
struct WarpOp {
  enum class Kind : uint8_t { sync, shuffle, ballot, mma_bf16, mma_e4m3, ldmatrix };
  Kind kind = Kind::sync;
  const char* name = "";
  uint32_t mask = 0;
  uint64_t value = 0;  // shuffle: what this lane offers; ballot: its predicate
  int source = 0;      // shuffle: whose value it wants
  uint64_t result = 0;
  float* d = nullptr;           // mma: accumulators [4], added to
  const uint32_t* a = nullptr;  // [4]
  const uint32_t* b = nullptr;  // [2]
  const void* row = nullptr;    // ldmatrix: the 16 bytes this lane points to
  uint32_t* out = nullptr;      // ldmatrix: [4]
};

/// The streams' clocks: what a stream has seen of each. Index 0 is the host.
inline constexpr int kMaxStreams = 64;
struct StreamClock {
  int stream = 0;
  std::array<uint64_t, kMaxStreams> seen{};
  void merge(const StreamClock& other) {
    for (int i = 0; i < kMaxStreams; ++i) seen[i] = std::max(seen[i], other.seen[i]);
  }
};

/// Who touched device memory last, in granules of 256 bytes.
class AccessLog {
 public:
  static constexpr size_t kGranule = 256;
  AccessLog(const std::byte* begin, size_t bytes);
  ~AccessLog();
  AccessLog(const AccessLog&) = delete;
  AccessLog& operator=(const AccessLog&) = delete;
  bool covers(const void* p) const {
    const std::byte* b = static_cast<const std::byte*>(p);
    return b >= begin_ && b < begin_ + bytes_;
  }
  /// Notes an access of a stream. False where another stream's is not known to have finished: `complaint` says which.
  bool touch(const void* p, size_t bytes, bool write, const StreamClock& clock, std::string& complaint);
  void forget(const void* p, size_t bytes);

 private:
  struct Entry {
    std::atomic<uint64_t> writer, reader;  // stream << 48 | sequence number
  };
  const std::byte* const begin_;
  const size_t bytes_;
  size_t mapped_ = 0;
  Entry* entries_ = nullptr;
};

/// One element of shared memory, for the checks.
struct SharedShadow {
  uint32_t writer_epoch = 0, reader_epoch = 0;            // barrier count + 1; 0: never
  uint32_t writer_warp_epoch = 0, reader_warp_epoch = 0;  // of the lane's warp
  int16_t writer = -1, reader = -1;                       // lanes; reader -2: several
};

struct SharedBlock {
  std::byte* data = nullptr;
  SharedShadow* shadow = nullptr;
  int64_t elements = 0;
};

/// 16 bytes on their way to shared memory; `valid` of them are read, the rest are zeros.
struct AsyncCopy {
  std::byte* to = nullptr;
  const std::byte* from = nullptr;
  int valid = 16;
  SharedBlock block;  // for the checks: the array and its elements that are written
  int64_t index = 0, count = 0;
  const char* name = "";
};

/// Runs blocks, one at a time, on the thread that calls it; keeps its fibers for the next.
class BlockRunner {
 public:
  BlockRunner();
  ~BlockRunner();
  BlockRunner(const BlockRunner&) = delete;
  BlockRunner& operator=(const BlockRunner&) = delete;

  /// Calls body() once as every thread of the block. Throws Fault.
  void run(const LaunchShape& shape, Dim block, const std::function<void()>& body, AccessLog* log,
           const StreamClock* clock);

  // --- what device code asks, from inside body() ---
  static BlockRunner& current();
  int thread() const { return thread_; }
  const Dim& block() const { return block_; }
  const LaunchShape& shape() const { return *shape_; }
  void block_sync();
  void collective(WarpOp& op);
  /// The block's shared array number n (in order of declaration), the same for every thread.
  SharedBlock shared(size_t element_bytes, int64_t elements, const char* name);
  void check_shared(const SharedBlock& block, int64_t index, int64_t count, bool write, const char* name);
  void check_device(const void* p, size_t bytes, bool write);
  /// Throws a Fault that names kernel, block and lane.
  [[noreturn]] void fail(const std::string& what) const;
  /// cp.async: copied when waited for, as late as the hardware may.
  void async_copy(const AsyncCopy& copy);
  void async_commit();
  void async_wait(int newest_allowed);

 private:
  struct Impl;
  struct Lane;
  void yield();
  void resume(int thread);
  void unwind();
  bool resolve_warp(int warp);
  std::string describe(int thread) const;

  std::unique_ptr<Impl> impl_;
  const LaunchShape* shape_ = nullptr;
  Dim block_;
  int thread_ = 0;
};

/// D += A B of mma.m16n8k16 on the fragments of 32 lanes: for tests, and for the interpreter. A and B bf16 pairs; every
/// product is exact in float32, and the 16 of them are added to the accumulator one by one, in order of k.
void mma_bf16_16816(float* const d[kWarp], const uint32_t* const a[kWarp], const uint32_t* const b[kWarp]);
void mma_e4m3_16832(float* const d[kWarp], const uint32_t* const a[kWarp], const uint32_t* const b[kWarp]);

}  // namespace thermocline::gpu::simt
