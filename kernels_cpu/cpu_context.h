// CpuContext: what a kernel family's driver works with. The pool computes, the table holds the micro-kernels, the
// traffic says what was read.
#pragma once

#include <array>
#include <chrono>
#include <numeric>
#include <optional>

#include "kernels_cpu/kernel_table.h"
#include "runtime/hw/worker_pool.h"

namespace thermocline::cpu {

/// What a weight is to who asks where a token's bytes and seconds go: its format, but for the head. Others are the
/// float32 weights of hyper-connections.
enum class WeightKind : uint8_t { fp4, fp8, bf16, other, head };
inline constexpr std::array<const char*, 5> kWeightKindNames = {"FP4 experts", "FP8 linears", "BF16 linears", "other",
                                                                "head"};

constexpr WeightKind weight_kind(WeightFormat format) {
  switch (format) {
    case WeightFormat::mxfp4:
      return WeightKind::fp4;
    case WeightFormat::fp8:
      return WeightKind::fp8;
    case WeightFormat::bf16:
      return WeightKind::bf16;
    default:
      return WeightKind::other;
  }
}

/// Bytes of weights, and seconds of the calls that read them.
struct KindTraffic {
  uint64_t bytes = 0;
  double seconds = 0;
};
using TrafficByKind = std::array<KindTraffic, kWeightKindNames.size()>;

/// Weight bytes by who read them and where they lie, and the time of the calls that read them. Each worker writes its
/// own line; what the driving thread knows of a call beforehand says which kinds of weights it reads.
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
  /// Both by kind. A call that reads several shares its seconds out by their bytes.
  const TrafficByKind& kinds() const { return kinds_; }
  void reset() {
    std::fill(bytes_.begin(), bytes_.end(), 0);
    time_ = {};
    kinds_ = {};
  }
  int nodes() const { return nodes_; }

  /// Adds the time of its scope, and the bytes that it is told of. A null traffic measures nothing.
  class Timer {
   public:
    explicit Timer(WeightTraffic* traffic) : traffic_(traffic) {
      if (traffic_) start_ = std::chrono::steady_clock::now();
    }
    ~Timer() {
      if (traffic_) traffic_->add(std::chrono::steady_clock::now() - start_, reads_);
    }
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;
    /// All workers together read so many bytes in this scope.
    void reads(WeightKind kind, int64_t bytes) { reads_[static_cast<size_t>(kind)] += static_cast<uint64_t>(bytes); }

   private:
    WeightTraffic* traffic_;
    std::chrono::steady_clock::time_point start_;
    std::array<uint64_t, kWeightKindNames.size()> reads_{};
  };

 private:
  using Duration = std::chrono::steady_clock::duration;

  void add(Duration time, const std::array<uint64_t, kWeightKindNames.size()>& reads) {
    time_ += time;
    const double total = static_cast<double>(std::accumulate(reads.begin(), reads.end(), uint64_t{0}));
    for (size_t kind = 0; kind < reads.size(); ++kind) {
      if (reads[kind] == 0) continue;
      kinds_[kind].bytes += reads[kind];
      kinds_[kind].seconds += std::chrono::duration<double>(time).count() * static_cast<double>(reads[kind]) / total;
    }
  }

  int nodes_, stride_;
  std::vector<uint64_t> bytes_;
  Duration time_{};
  TrafficByKind kinds_{};
};

struct CpuContext {
  WorkerPool& pool;
  const KernelTable& table;
  WeightTraffic* traffic = nullptr;
  std::optional<WeightKind> kind = {};  // of all that is read in this context; none: by the formats

  void count(int worker, const PackedMatrix& w, int64_t first_group, int64_t groups) const {
    if (traffic) traffic->add(worker, w.node_of(first_group), groups * w.group_bytes());
  }
  /// Row groups that the workers will count in the timer's scope.
  void expect(WeightTraffic::Timer& timer, const PackedMatrix& w, int64_t groups) const {
    timer.reads(kind.value_or(weight_kind(w.format)), groups * w.group_bytes());
  }
  /// At the end of a worker's part of a region that multiplied weights.
  void finish() const {
    if (table.finish) table.finish();
  }
};

}  // namespace thermocline::cpu
