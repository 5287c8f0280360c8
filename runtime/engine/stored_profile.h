// Where the machine's measure is kept: one file for each hardware, found again by its fingerprint.
#pragma once

#include <filesystem>
#include <optional>

#include "runtime/engine/machine_info.h"
#include "scheduler/cost/machine_profile.h"

namespace thermocline {

/// What a measure depends on, in words: CPU model, kernels, workers, nodes, memory in GiB, GPUs, program version.
std::string hardware_line(const MachineInfo& machine);
/// 16 hexadecimal digits of that line.
std::string fingerprint_of(const MachineInfo& machine);

/// $XDG_CACHE_HOME/thermocline, or ~/.cache/thermocline; empty where neither is known.
std::filesystem::path profile_folder();
std::filesystem::path profile_path(const std::filesystem::path& folder, const std::string& fingerprint);

/// Writes a profile to `path`, mode 0600, whole or not at all; makes its folder, mode 0700, where it is missing.
///   hardware  hardware_line(), for whoever opens the file
Status store_profile(const std::filesystem::path& path, const sched::MachineProfile& profile,
                     const std::string& hardware);

/// A profile in a file. Errors: not_found, io, corrupt; all name the file.
Result<sched::MachineProfile> read_profile(const std::filesystem::path& path);

/// What `calibrate` stored for this box and these workers, or nothing. Errors: corrupt, io: there is a file, but not a
/// profile of this fingerprint.
Result<std::optional<sched::MachineProfile>> stored_profile(const MachineInfo& machine,
                                                            const std::filesystem::path& folder = profile_folder());

/// The same; a file that is no profile counts as none, and is logged.
std::optional<sched::MachineProfile> calibrated_profile(const MachineInfo& machine);

}  // namespace thermocline
