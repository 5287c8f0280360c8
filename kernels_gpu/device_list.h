// The GPUs this process can see. No CUDA header here, so every build includes it.
#pragma once

#include <string>
#include <vector>

namespace thermocline::gpu {

struct DeviceInfo {
  std::string name;
  int compute_capability = 0;  // 90 for sm_90
  unsigned long long memory_bytes = 0;
};

/// Empty without a GPU, without a driver, and in builds without CUDA.
std::vector<DeviceInfo> list_devices();

/// The CUDA runtime this build was made with, e.g. "13.0"; empty in builds without CUDA.
std::string cuda_version();

}  // namespace thermocline::gpu
