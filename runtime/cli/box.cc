#include "runtime/cli/box.h"

#include <fmt/format.h>

#include <algorithm>

#include "kernels_gpu/device_list.h"
#include "runtime/base/log.h"
#include "runtime/cli/command.h"
#include "runtime/cli/hardware_flags.h"
#include "runtime/engine/stored_profile.h"
#include "runtime/hw/cgroup.h"
#include "runtime/hw/memory_bandwidth.h"
#include "runtime/hw/topology.h"

namespace thermocline::cli {
namespace {

constexpr double kSystemBytes = 2.0 * (1 << 30);  // of a box that is described: an operating system, an estimate
constexpr int kCoresOfAChannel = 5;               // of servers with 8 and 12 channels
constexpr double kGB = 1e9;

using Unit = Figure::Unit;

void add_figure(Box& box, Unit unit, std::string name, double value, std::string source) {
  box.figures.push_back({unit, std::move(name), value, std::move(source)});
}

void add_cpu_figures(Box& box, const std::string& cores_source, const std::string& read_source) {
  const sched::CpuSheet& sheet = *box.cpu_sheet;
  add_figure(box, Unit::count, "cores", sheet.cores, cores_source);
  add_figure(box, Unit::flops, "prefill on the CPU", sheet.cores * sched::core_flops(sheet.kernels),
             fmt::format("assumed, {:.0f} GFLOP/s a core with {} kernels", sched::core_flops(sheet.kernels) / 1e9,
                         sched::kCpuKernelNames[static_cast<size_t>(sheet.kernels)]));
  const bool few_cores = box.machine.cpu.read_bytes_per_second < 0.999 * sheet.read_bytes_per_second;
  add_figure(box, Unit::bytes_per_second, "RAM read", box.machine.cpu.read_bytes_per_second,
             few_cores ? "what so many cores can compute; " + read_source : read_source);
}

// Whether the user said so, the data sheet or a measurement: how much there is, what of it is gone.
void set_memory(Box& box, double bytes, double system_bytes, const std::string& source) {
  box.machine.cpu.memory_bytes = bytes;
  if (box.cpu_sheet) box.cpu_sheet->memory_bytes = bytes;
  box.system_bytes = system_bytes;
  box.memory_source = source;
}

void add_card(Box& box, const sched::GpuSheet& sheet, double memory_bytes, const std::string& memory_source) {
  sched::GpuProfile gpu = sched::gpu_profile(sheet, box.machine.cpu.read_bytes_per_second);
  gpu.memory_bytes = memory_bytes;
  add_figure(box, Unit::bytes, gpu.name + " memory", memory_bytes, memory_source);
  add_figure(box, Unit::bytes_per_second, gpu.name + " read", gpu.bytes_per_second,
             fmt::format("data sheet, {:.0f} GB/s x {}", sheet.bytes_per_second / kGB, sched::kGpuMemoryShare));
  add_figure(box, Unit::bytes_per_second, gpu.name + " copies to it", gpu.h2d_bytes_per_second,
             "assumed, PCIe x16 of its generation");
  add_figure(box, Unit::flops, gpu.name + " prefill", sheet.flops, "assumed share of the data sheet");
  box.machine.gpus.push_back(std::move(gpu));
}

Status add_cards(Box& box, const std::vector<std::string>& flags) {
  for (const std::string& flag : flags) {
    if (flag == "none" && flags.size() == 1) return {};
    if (flag == "none") return invalid("--gpu none does not go with other cards");
    Result<sched::GpuSheet> sheet = parse_gpu(flag);
    if (!sheet) return std::move(sheet).error().with("--gpu");
    add_card(box, *sheet, sheet->memory_bytes, flag.find(',') == std::string::npos ? "data sheet" : "--gpu");
  }
  return {};
}

void add_calibrated_figures(Box& box) {
  for (const sched::GpuProfile& gpu : box.machine.gpus) {
    add_figure(box, Unit::bytes, gpu.name + " memory", gpu.memory_bytes, "calibrated");
    add_figure(box, Unit::bytes_per_second, gpu.name + " read", gpu.bytes_per_second, "calibrated");
    add_figure(box, Unit::bytes_per_second, gpu.name + " copies to it", gpu.h2d_bytes_per_second, "calibrated");
  }
}

// Cards whose figures are not known count for nothing, and say so.
// Those behind the first `known` ones.
void add_own_cards(Box& box, size_t known) {
  const std::vector<gpu::DeviceInfo> devices = gpu::list_devices();
  for (size_t i = known; i < devices.size(); ++i) {
    const gpu::DeviceInfo& device = devices[i];
    const auto bytes = static_cast<double>(device.memory_bytes);
    if (const sched::GpuSheet* const sheet = sched::gpu_sheet_of_device(device.name))
      add_card(box, *sheet, bytes, "its driver");
    else
      add_figure(box, Unit::bytes, device.name, bytes, "left out: its figures are not known; name a like one by --gpu");
  }
}

Result<Box> described_box(const HardwareFlags& flags) {
  if (flags.ram.empty()) return invalid("--cpu describes another box: give its memory too, such as --ram 12x6000");
  Result<RamFlag> ram = parse_ram(flags.ram);
  if (!ram) return std::move(ram).error().with("--ram");
  CpuFlag cpu{.cores = kCoresOfAChannel * ram->channels};
  if (!flags.cpu.empty()) {
    Result<CpuFlag> said = parse_cpu(flags.cpu);
    if (!said) return std::move(said).error().with("--cpu");
    cpu = *said;
  }
  Box box;
  box.cpu_sheet =
      sched::CpuSheet{.cores = cpu.cores,
                      .kernels = cpu.kernels,
                      .channels = ram->channels,
                      .megatransfers = ram->megatransfers,
                      .read_bytes_per_second = sched::dram_bytes_per_second(ram->channels, ram->megatransfers)};
  box.machine.cpu = sched::cpu_profile(*box.cpu_sheet);
  add_cpu_figures(
      box, flags.cpu.empty() ? fmt::format("assumed, {} a channel: say --cpu", kCoresOfAChannel) : "--cpu",
      fmt::format("data sheet, {} x {:.0f} MT/s x 8 bytes x {}", ram->channels, ram->megatransfers, sched::kDramShare));
  if (flags.ram_size.empty()) box.memory_source = "as much as it needs: say --ram-size";
  return box;
}

Result<Box> measured_box() {
  TC_ASSIGN(const Topology topology, read_topology());
  const CpuFeatures features = detect_cpu_features();
  WorkerPool pool(topology);
  double read = 0;
  std::string note;
  {
    TC_ASSIGN(StreamRead stream, StreamRead::create(pool));
    read = stream.measure();
    if (!stream.note().empty()) note = ", " + stream.note();
  }
  Box box;
  box.cpu_sheet = sched::CpuSheet{.cores = pool.size(),
                                  .kernels = cpu_kernels(features.best()),
                                  .read_bytes_per_second = sched::kStreamShare * read};
  box.machine.cpu = sched::cpu_profile(*box.cpu_sheet);
  box.machine.cpu.name = features.model;
  add_cpu_figures(box, "this box, " + features.model,
                  fmt::format("measured, STREAM read of {:.1f} GB/s x {}{}", read / kGB, sched::kStreamShare, note));
  return box;
}

Result<Box> this_box(bool own_cards) {
  Box box;
  TC_ASSIGN(const Topology topology, read_topology());
  const CpuFeatures features = detect_cpu_features();
  const MachineInfo machine{features, topology, features.best(), topology.default_threads()};
  if (std::optional<sched::MachineProfile> profile = calibrated_profile(machine)) {
    box.machine = *std::move(profile);
    add_figure(box, Unit::count, "cores", box.machine.cpu.cores, "calibrated");
    add_figure(box, Unit::bytes_per_second, "RAM read", box.machine.cpu.read_bytes_per_second, "calibrated");
  } else {
    TC_ASSIGN(box, measured_box());
  }
  if (!own_cards) {
    box.machine.gpus.clear();  // others are named
  } else {
    if (!box.machine.gpus.empty()) add_calibrated_figures(box);
    add_own_cards(box, box.machine.gpus.size());  // those that were not measured
  }
  const MemoryBudget budget = free_memory();
  set_memory(box, static_cast<double>(budget.bytes), 0, budget.source);
  return box;
}

}  // namespace

sched::CpuKernels cpu_kernels(Isa isa) {
  switch (isa) {
    case Isa::scalar:
    case Isa::amx_emulated:
      return sched::CpuKernels::scalar;
    case Isa::avx2:
      return sched::CpuKernels::avx2;
    case Isa::avx512:
      return sched::CpuKernels::avx512;
    case Isa::amx:
      return sched::CpuKernels::amx;
  }
  return sched::CpuKernels::scalar;
}

void add_hardware_flags(CLI::App& command, HardwareFlags& flags) {
  const auto add = [&](const char* name, auto& value, const char* text) {
    return not_empty(command.add_option(name, value, text));
  };
  add("--gpu", flags.gpus,
      "A card: 5090, h100, '4090,48GiB' ...; given again, one more; none: the CPU alone. Without --ram and "
      "--cpu in this box")
      ->allow_extra_args(false);
  add("--ram", flags.ram, "Memory of another box: channels of all sockets x MT/s, such as 12x6000");
  add("--ram-size", flags.ram_size, "Its size, such as 384GiB");
  add("--cpu", flags.cpu, "Processor of another box: '64 cores, avx512', or amx");
  add("--nvme", flags.nvme, "Read rate of its disk, such as 7GB/s");
}

Result<Box> box_of(const HardwareFlags& flags) {
  double ram_size = 0, disk = 0;
  if (!flags.ram_size.empty()) {
    Result<double> bytes = parse_bytes(flags.ram_size);
    if (!bytes) return std::move(bytes).error().with("--ram-size");
    ram_size = *bytes;
  }
  if (!flags.nvme.empty()) {
    Result<double> rate = parse_rate(flags.nvme);
    if (!rate) return std::move(rate).error().with("--nvme");
    disk = *rate;
  }
  const bool described = !flags.ram.empty() || !flags.cpu.empty();
  TC_ASSIGN(Box box, described ? described_box(flags) : this_box(flags.gpus.empty()));
  if (ram_size > 0) set_memory(box, ram_size, kSystemBytes, "--ram-size");
  if (box.machine.cpu.memory_bytes > 0)
    add_figure(box, Unit::bytes, "RAM", box.machine.cpu.memory_bytes, box.memory_source);
  TC_RETURN_IF_ERROR(add_cards(box, flags.gpus));
  box.machine.disk.read_bytes_per_second = disk;
  if (disk > 0) add_figure(box, Unit::bytes_per_second, "disk read", disk, "--nvme");
  return box;
}

}  // namespace thermocline::cli
