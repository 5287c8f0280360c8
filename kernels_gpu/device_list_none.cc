// Builds without the CUDA toolkit have no devices.
#include "kernels_gpu/device_list.h"
#include "kernels_gpu/open_device.h"

namespace thermocline::gpu {

std::vector<DeviceInfo> list_devices() { return {}; }
std::string cuda_version() { return ""; }
Result<std::unique_ptr<Device>> open_cuda_device(int, size_t) { return unsupported("this build has no CUDA"); }

}  // namespace thermocline::gpu
