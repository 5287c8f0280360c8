// What stands in the way of speed on this box, told from its settings alone: nothing is measured, nothing is changed.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/engine/machine_info.h"

namespace thermocline {

enum class CheckLevel { ok, warning, problem };
constexpr std::string_view kCheckLevelNames[] = {"ok", "warning", "problem"};

struct Check {
  std::string name;
  CheckLevel level = CheckLevel::ok;
  std::string found;        // what is
  std::string advice = {};  // what to do next; empty where all is well
};

struct DoctorOptions {
  std::filesystem::path root = "/";    // where /proc, /sys and /dev are looked for: tests bring trees of their own
  std::filesystem::path folder = ".";  // whose disk is asked for free space
  std::filesystem::path profiles;      // where calibrate keeps its files; empty: profile_folder()
};

/// Every check, in the order of the machine: processor, memory, disk, devices, calibration.
std::vector<Check> check_machine(const MachineInfo& machine, const DoctorOptions& options = {});

/// Memory modules by the SMBIOS table of /sys/firmware/dmi/tables/DMI.
struct MemoryModules {
  int slots = 0, filled = 0;
  int slowest_mts = 0;  // of those filled, mega-transfers a second; 0: not said
};
MemoryModules parse_memory_modules(std::string_view dmi);

}  // namespace thermocline
