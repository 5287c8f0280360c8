// The box that a prediction is for: this one, or one that flags describe, each figure with its source.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "runtime/engine/machine_info.h"
#include "runtime/hw/cpu_features.h"
#include "scheduler/cost/hardware_presets.h"

namespace thermocline::cli {

/// As the user wrote them (hardware_flags.h); empty: not given.
struct HardwareFlags {
  std::vector<std::string> gpus;
  std::string ram, ram_size, cpu, nvme;
};

/// --gpu, --ram, --ram-size, --cpu and --nvme.
void add_hardware_flags(CLI::App& command, HardwareFlags& flags);

/// A number that the prediction rests on.
struct Figure {
  enum class Unit { count, bytes, bytes_per_second, flops } unit = Unit::count;
  std::string name;
  double value = 0;
  std::string source;  // "measured", "data sheet, 1792 GB/s x 0.85"
};

struct Box {
  sched::MachineProfile machine;
  std::optional<sched::CpuSheet> cpu_sheet;  // what machine.cpu was made from; none where it was calibrated
  double system_bytes = 0;                   // of its memory, not free
  std::string memory_source;
  std::vector<Figure> figures;
};

/// The kernels of an instruction set, in the planner's words.
sched::CpuKernels cpu_kernels(Isa isa);

/// --ram and --cpu describe another box, without a card unless --gpu names some; --gpu alone puts cards into this one,
/// --ram-size and --nvme change that alone. This box is what was calibrated, or else its topology, free memory, cards
/// of the list, and STREAM read, measured here in a fraction of a second with 256 MiB or what is free. Errors:
/// invalid_argument of a flag, naming it; out_of_memory where nothing can be measured.
Result<Box> box_of(const HardwareFlags& flags);

}  // namespace thermocline::cli
