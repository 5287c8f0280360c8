#include "runtime/engine/machine_info.h"

#include <fmt/format.h>

#include "kernels_gpu/device_list.h"
#include "runtime/hw/topology.h"

namespace thermocline {

Json machine_json(const MachineInfo& machine) {
  Json gpus = Json::array();
  for (const gpu::DeviceInfo& device : gpu::list_devices())
    gpus.push_back({{"name", device.name},
                    {"compute_capability", device.compute_capability},
                    {"memory_bytes", device.memory_bytes}});
  return {{"cpu", machine.cpu.model},
          {"instruction_sets", machine.cpu.to_string()},
          {"kernels", isa_name(machine.kernels)},
          {"cores", machine.topology.cores.size()},
          {"threads", machine.threads},
          {"numa_nodes", machine.topology.nodes.size()},
          {"memory_bytes", usable_memory_bytes()},
          {"gpus", gpus}};
}

Json build_json() {
  return {{"version", TC_VERSION},
          {"type", TC_BUILD_TYPE},
          {"compiler", "GCC " __VERSION__},
          {"cuda", gpu::cuda_version()}};
}

std::string machine_line(const MachineInfo& machine) {
  return fmt::format("{}, {} kernels, {} thread{}, {:.1f} GiB", machine.cpu.model, isa_name(machine.kernels),
                     machine.threads, machine.threads == 1 ? "" : "s",
                     static_cast<double>(usable_memory_bytes()) / (1 << 30));
}

}  // namespace thermocline
