// The measure of one device and of the bus to it: a sched::GpuProfile from the kernels, copies and flags of a step.
// Source: spec/scheduler.md 2.2.
#pragma once

#include <functional>
#include <string>

#include "runtime/hw/device.h"
#include "runtime/hw/worker_pool.h"
#include "scheduler/cost/machine_profile.h"

namespace thermocline {

struct DeviceCalibration {
  sched::GpuProfile profile;
  bool interpreted = false;                           // numbers of no card
  double sync_p99_ns = 0;                             // of GpuProfile::sync_ns
  double parked_sync_ns = 0, parked_sync_p99_ns = 0;  // with workers that sleep
  int rounds = 0;                                     // that the numbers are medians of
};

struct DeviceCalibrateOptions {
  bool quick = false;         // one round
  double seconds = 25;        // after which no further round begins
  uint64_t read_bytes = 0;    // what the CPU reads beside copies: more than its caches hold
  uint64_t pinned_bytes = 0;  // what is copied from
  std::function<void(const std::string& what, double share)> progress = [](const std::string&, double) {};
};

/// Measures a device, with `pool` as the CPU beside it. Errors: out_of_memory; a fault of the device.
Result<DeviceCalibration> calibrate_device(gpu::Device& device, WorkerPool& pool,
                                           const DeviceCalibrateOptions& options);

}  // namespace thermocline
