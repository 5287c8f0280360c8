// The measure of this machine: a sched::MachineProfile from the real kernels on weights of a model's shapes, far more
// of them than the caches hold. Everything is measured once a round, round after round, and the median counts: a
// neighbour that is busy for some seconds disturbs a round of everything instead of all rounds of something.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels_cpu/cpu_context.h"
#include "runtime/base/result.h"
#include "runtime/engine/calibrate_device.h"
#include "scheduler/cost/machine_profile.h"

namespace thermocline {

struct CalibrateOptions {
  bool quick = false;                 // small shapes, one round: seconds, and rough
  std::filesystem::path disk_folder;  // read speed of the disk that holds it; empty: not measured
  std::span<const std::unique_ptr<gpu::Device>> devices = {};
  std::function<void(const std::string& what, double share)> progress = [](const std::string&, double) {};
};

/// STREAM read by some of the workers.
struct ThreadRate {
  int threads = 0;
  double bytes_per_second = 0;
};

struct Calibration {
  sched::MachineProfile profile;           // without a fingerprint
  std::vector<DeviceCalibration> devices;  // as in profile.gpus
  std::vector<ThreadRate> by_threads;      // rising, the last with all workers
  std::vector<double> by_node;  // bytes a second that each node's workers read of its memory; empty with one node
  double parked_region_ns = 0;  // of a parallel region whose workers sleep
  double peak_flops = 0, peak_int8_ops = 0;  // of the instructions that the kernels use, all workers
  double working_set_bytes = 0;              // of each kernel's weights
  int rounds = 0;                            // that the numbers are medians of
  std::vector<std::string> notes;            // what makes the numbers less than they should be

  /// The fewest threads that read at 95 % of the best rate.
  int saturated_by() const;
};

/// Measures the devices, then `cpu` with its workers on `topology`. About a minute, with devices half a minute more;
/// less than half of the memory that is free. Errors: out_of_memory, io of the disk's folder, a fault of a device.
Result<Calibration> calibrate(const Topology& topology, const std::string& cpu_name, const cpu::CpuContext& cpu,
                              const CalibrateOptions& options);

/// Bytes a second that a file of 512 MiB (quick: 64 MiB) in `folder` is read at, past the page cache. Errors: io.
Result<double> disk_read_rate(const std::filesystem::path& folder, bool quick);

}  // namespace thermocline
