#include "kernels_gpu/open_device.h"

#include <charconv>

#include "kernels_gpu/device_list.h"
#include "kernels_gpu/simt/simt_device.h"

namespace thermocline::gpu {

Result<DeviceChoice> parse_device(std::string_view text) {
  const size_t colon = text.find(':');
  const std::string_view name = text.substr(0, colon);
  DeviceChoice choice;
  if (name == "none")
    choice.kind = DeviceChoice::Kind::none;
  else if (name == "simt")
    choice.kind = DeviceChoice::Kind::simt;
  else if (name == "cuda")
    choice.kind = DeviceChoice::Kind::cuda;
  else if (name != "auto")
    return invalid("unknown device '" + std::string(text) + "': use auto, cuda, simt or none; cuda:2 for two cards");
  if (colon != std::string_view::npos) {
    const char* const end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data() + colon + 1, end, choice.count);
    const bool counts = choice.kind == DeviceChoice::Kind::simt || choice.kind == DeviceChoice::Kind::cuda;
    if (!counts || error != std::errc() || stop != end || choice.count < 1 || choice.count > 16)
      return invalid("the number of devices in '" + std::string(text) + "' should be 1 to 16, after cuda or simt");
  }
  return choice;
}

Result<std::vector<std::unique_ptr<Device>>> open_devices(const DeviceChoice& choice, size_t memory_bytes) {
  std::vector<std::unique_ptr<Device>> devices;
  if (choice.kind == DeviceChoice::Kind::none) return devices;
  if (choice.kind == DeviceChoice::Kind::simt) {
    for (int i = 0; i < std::max(1, choice.count); ++i) {
      simt::SimtOptions options;
      if (memory_bytes > 0) options.memory_bytes = memory_bytes;
      TC_ASSIGN(std::unique_ptr<Device> device, simt::make_device(options, i));
      devices.push_back(std::move(device));
    }
    return devices;
  }
  const int found = static_cast<int>(list_devices().size());
  if (choice.kind == DeviceChoice::Kind::automatic && found == 0) return devices;
  const int count = choice.count > 0 ? choice.count : found;
  if (count == 0 || count > found)
    return Error{ErrorCode::unsupported,
                 cuda_version().empty()
                     ? "this build has no CUDA: configure with -DTC_CUDA=ON, or use --device none"
                     : std::to_string(found) + " CUDA cards were found, " + std::to_string(std::max(count, 1)) +
                           " asked for: use --device none, or look at nvidia-smi",
                 "--device"};
  for (int i = 0; i < count; ++i) {
    Result<std::unique_ptr<Device>> device = open_cuda_device(i, memory_bytes);
    if (!device) {
      Error error = std::move(device).error();
      error.field = "--device";
      return error;
    }
    devices.push_back(std::move(*device));
  }
  return devices;
}

}  // namespace thermocline::gpu
