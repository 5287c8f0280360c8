// Builds without the CUDA toolkit have no devices.
#include "kernels_gpu/device_list.h"

namespace thermocline::gpu {

std::vector<DeviceInfo> list_devices() { return {}; }
std::string cuda_version() { return ""; }

}  // namespace thermocline::gpu
