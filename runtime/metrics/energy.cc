#include "runtime/metrics/energy.h"

#include <algorithm>
#include <fstream>
#include <optional>

namespace thermocline::metrics {
namespace {

namespace fs = std::filesystem;

template <class T>
std::optional<T> read(const fs::path& file) {
  std::ifstream stream(file);
  T value;
  if (!(stream >> value)) return std::nullopt;
  return value;
}

}  // namespace

// Zones are intel-rapl:PACKAGE, and below intel-rapl:PACKAGE:PART, on AMD too; parts of a package are in its own count.
EnergyCounters::EnergyCounters(const fs::path& root) {
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(root, error)) {
    const std::string zone = entry.path().filename();
    if (!zone.starts_with("intel-rapl:")) continue;  // intel-rapl-mmio has the same packages again
    const size_t part = zone.find(':', sizeof("intel-rapl:") - 1);
    const std::optional<std::string> name = read<std::string>(entry.path() / "name");
    const std::optional<uint64_t> now = read<uint64_t>(entry.path() / "energy_uj"),
                                  range = read<uint64_t>(entry.path() / "max_energy_range_uj");
    if (!name || !now || !range) continue;
    std::string domain = *name;  // package-0; of a part only "dram"
    if (part != std::string::npos)
      domain += "-" + zone.substr(sizeof("intel-rapl:") - 1, part - sizeof("intel-rapl:") + 1);
    zones_.push_back({domain, entry.path() / "energy_uj", *range, *now});
  }
  std::sort(zones_.begin(), zones_.end(), [](const Zone& a, const Zone& b) { return a.domain < b.domain; });
}

std::map<std::string, double> EnergyCounters::joules() {
  std::map<std::string, double> joules;
  for (Zone& zone : zones_) {
    if (const std::optional<uint64_t> now = read<uint64_t>(zone.file)) {
      const uint64_t used = *now >= zone.last_uj ? *now - zone.last_uj : *now + zone.range_uj - zone.last_uj;
      zone.joules += static_cast<double>(used) / 1e6;
      zone.last_uj = *now;
    }
    joules[zone.domain] = zone.joules;
  }
  return joules;
}

}  // namespace thermocline::metrics
