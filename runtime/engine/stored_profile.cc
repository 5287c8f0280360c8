#include "runtime/engine/stored_profile.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <xxhash.h>

#include <cmath>
#include <cstdlib>

#include "kernels_gpu/device_list.h"
#include "runtime/base/log.h"
#include "runtime/engine/machine_profile_json.h"
#include "runtime/io/file.h"

namespace thermocline {

std::string hardware_line(const MachineInfo& machine) {
  std::string line =
      fmt::format("{}, {} kernels, {} of {} cores on {} node{}, {} GiB", machine.cpu.model, isa_name(machine.kernels),
                  machine.threads, machine.topology.cores.size(), machine.topology.nodes.size(),
                  machine.topology.nodes.size() == 1 ? "" : "s",
                  std::llround(static_cast<double>(usable_memory_bytes()) / static_cast<double>(uint64_t{1} << 30)));
  for (const gpu::DeviceInfo& device : gpu::list_devices()) line += ", " + device.name;
  return line + ", thermocline " TC_VERSION;
}

std::string fingerprint_of(const MachineInfo& machine) {
  const std::string line = hardware_line(machine);
  return fmt::format("{:016x}", XXH3_64bits(line.data(), line.size()));
}

std::filesystem::path profile_folder() {
  if (const char* const cache = std::getenv("XDG_CACHE_HOME"); cache && *cache == '/')  // others are to be ignored
    return std::filesystem::path(cache) / "thermocline";
  const char* const home = std::getenv("HOME");
  return home && *home ? std::filesystem::path(home) / ".cache" / "thermocline" : std::filesystem::path();
}

std::filesystem::path profile_path(const std::filesystem::path& folder, const std::string& fingerprint) {
  return folder / ("machine-" + fingerprint + ".json");
}

Status store_profile(const std::filesystem::path& path, const sched::MachineProfile& profile,
                     const std::string& hardware) {
  const std::filesystem::path folder = path.parent_path();
  std::error_code error;
  if (!folder.empty() && !std::filesystem::exists(folder, error)) {
    std::filesystem::create_directories(folder.parent_path(), error);
    if (error || (::mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST))
      return Error{ErrorCode::io, "no folder can be made at " + folder.string()};
  }
  Json json = machine_profile_json(profile);
  json["hardware"] = hardware;
  return write_private_file(path, dump_json(json, 2) + "\n");
}

Result<sched::MachineProfile> read_profile(const std::filesystem::path& path) {
  TC_ASSIGN(const std::string text, read_text_file(path, 1 << 20));
  Result<sched::MachineProfile> profile = parse_machine_profile(text);
  if (!profile) return std::move(profile).error().with(path.string());
  return profile;
}

Result<std::optional<sched::MachineProfile>> stored_profile(const MachineInfo& machine,
                                                            const std::filesystem::path& folder) {
  const std::string fingerprint = fingerprint_of(machine);
  const std::filesystem::path path = profile_path(folder, fingerprint);
  std::error_code error;
  if (folder.empty() || !std::filesystem::exists(path, error)) return std::optional<sched::MachineProfile>();
  TC_ASSIGN(sched::MachineProfile profile, read_profile(path));
  if (profile.fingerprint != fingerprint)
    return corrupt(path.string() + ": fingerprint is of another machine: calibrate again");
  return std::optional(std::move(profile));
}

std::optional<sched::MachineProfile> calibrated_profile(const MachineInfo& machine) {
  Result<std::optional<sched::MachineProfile>> stored = stored_profile(machine);
  if (stored) return *std::move(stored);
  log_warn("{}: as if there were none", stored.error().message);
  return std::nullopt;
}

}  // namespace thermocline
