// CpuContext: what a kernel family's driver works with. The pool computes, the table holds the micro-kernels, the
// traffic says what was read.
#pragma once

#include <chrono>

#include "kernels_cpu/kernel_table.h"
#include "runtime/hw/worker_pool.h"

namespace thermocline::cpu {

/// Weight bytes by who read them and where they lie, and the time of the calls that read them. Each worker writes its
/// own line.
class WeightTraffic {
 public:
  WeightTraffic(int workers, int nodes)
      : nodes_(nodes), stride_((nodes + 7) / 8 * 8), bytes_(static_cast<size_t>(workers * stride_)) {}

  void add(int worker, int node, int64_t bytes) {
    bytes_[static_cast<size_t>(worker * stride_ + node)] += static_cast<uint64_t>(bytes);
  }
  uint64_t bytes(int worker, int node) const { return bytes_[static_cast<size_t>(worker * stride_ + node)]; }
  uint64_t total_bytes() const {
    uint64_t sum = 0;
    for (const uint64_t b : bytes_) sum += b;
    return sum;
  }
  /// Seconds of the driving thread inside calls that read weights.
  double seconds() const { return std::chrono::duration<double>(time_).count(); }
  void reset() {
    std::fill(bytes_.begin(), bytes_.end(), 0);
    time_ = {};
  }
  int nodes() const { return nodes_; }

  /// Adds the time of its scope. A null traffic measures nothing.
  class Timer {
   public:
    explicit Timer(WeightTraffic* traffic) : traffic_(traffic) {
      if (traffic_) start_ = std::chrono::steady_clock::now();
    }
    ~Timer() {
      if (traffic_) traffic_->time_ += std::chrono::steady_clock::now() - start_;
    }
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;

   private:
    WeightTraffic* traffic_;
    std::chrono::steady_clock::time_point start_;
  };

 private:
  int nodes_, stride_;
  std::vector<uint64_t> bytes_;
  std::chrono::steady_clock::duration time_{};
};

struct CpuContext {
  WorkerPool& pool;
  const KernelTable& table;
  WeightTraffic* traffic = nullptr;

  void count(int worker, const PackedMatrix& w, int64_t first_group, int64_t groups) const {
    if (traffic) traffic->add(worker, w.node_of(first_group), groups * (w.group_tile_bytes() + w.group_scale_bytes()));
  }
  /// At the end of a worker's part of a region that multiplied weights.
  void finish() const {
    if (table.finish) table.finish();
  }
};

}  // namespace thermocline::cpu
