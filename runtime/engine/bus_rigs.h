// What lies between the CPU and a device, as a step uses it: copies from pinned memory, and the hand-over of a layer's
// misses by flags.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <vector>

#include "runtime/engine/device_rigs.h"
#include "runtime/hw/memory_bandwidth.h"

namespace thermocline {

struct CopyTime {
  double bytes = 0, ns = 0;
};
/// A copy takes fixed_ns + bytes / bytes_per_second.
struct CopyCost {
  double bytes_per_second = 0, fixed_ns = 0;
};
/// Least squares of the relative errors over at least two sizes, so that small copies say what one costs and large ones
/// the rate. Times that would make a copy of nothing take less than nothing are those of a rate alone.
CopyCost fit_copies(std::span<const CopyTime> times);

/// Copies from pinned host memory.
class CopyRig {
 public:
  /// A megabyte to a V4-Pro expert.
  static constexpr std::array<double, 5> kBytes = {1e6, 2e6, 4e6, 13e6, 35e6};

  /// Copies start everywhere in `host_bytes`, so that they come from memory where that is more than caches hold.
  static Result<CopyRig> create(DeviceRig& rig, uint64_t host_bytes);
  /// One copy with nothing beside it. Errors: a fault of the device.
  Result<double> seconds(double bytes);
  /// Of the rate that `read` reads alone, what it reads while copies run one after the other; at most 1.
  ///   copy_rate  bytes a second, about: how many copies that takes
  Result<double> read_share(StreamRead& read, double copy_rate);

 private:
  explicit CopyRig(gpu::Stream& stream) : stream_(&stream) {}
  void queue(double bytes);

  gpu::Stream* stream_;
  gpu::PinnedBuffer from_;
  gpu::DeviceBuffer to_;
  std::unique_ptr<gpu::Event> copied_;
  size_t at_ = 0;
};

/// Layers that hand one pair to the CPU and wait for it, as DevicePart has them, in one graph; nobody computes.
class HandoverRig {
 public:
  static Result<HandoverRig> create(DeviceRig& rig, int layers);
  int layers() const { return layers_; }
  /// Runs the graph; every layer is answered after an empty region of the pool. Adds the times from one layer's flag to
  /// the next one's to `ns`. Errors: a fault of the device.
  Status run(WorkerPool& pool, std::vector<double>& ns);

 private:
  HandoverRig(DeviceRig& rig, int layers) : stream_(&rig.stream()), layers_(layers) {}
  uint32_t* mail(int layer) const;  // a flag as DevicePart::Mail has it, the answer a line behind
  Result<std::unique_ptr<gpu::Graph>> capture(DeviceRig& rig, gpu::PublishArgs publish, gpu::FetchArgs fetch);

  gpu::Stream* stream_;
  int layers_;
  uint32_t step_ = 0;
  gpu::PinnedBuffer pinned_step_, flags_, misses_, x_, y_;
  std::vector<gpu::DeviceBuffer> held_;
  uint32_t* device_step_ = nullptr;
  std::unique_ptr<gpu::Graph> graph_;
};

}  // namespace thermocline
