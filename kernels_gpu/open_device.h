// Opens the devices a user asked for: --device auto|cuda|simt|none.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "runtime/hw/device.h"

namespace thermocline::gpu {

/// A parsed --device: what, and how many ("cuda:2", "simt:3"; cuda alone is every card).
struct DeviceChoice {
  enum class Kind { none, simt, cuda, automatic } kind = Kind::automatic;
  int count = 0;  // 0: simt one, cuda all
};
/// Errors: invalid_argument.
Result<DeviceChoice> parse_device(std::string_view text);

/// Opens them, each with `memory_bytes` (0: what is free; 4 GiB for simt). Empty for none, and for auto without a card.
/// Errors: unsupported (cuda in a build without it, no card, one older than sm_80), out_of_memory.
Result<std::vector<std::unique_ptr<Device>>> open_devices(const DeviceChoice& choice, size_t memory_bytes);

Result<std::unique_ptr<Device>> open_cuda_device(int index, size_t memory_bytes);

}  // namespace thermocline::gpu
