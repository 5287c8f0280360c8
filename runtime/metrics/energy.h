// What the processors have used, as the kernel counts it (RAPL, /sys/class/powercap).
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace thermocline::metrics {

class EnergyCounters {
 public:
  /// Looks for counters below `root` once. Those that may not be read, as most systems leave them to root, are none.
  explicit EnergyCounters(const std::filesystem::path& root);

  /// Joules since this was made, by domain ("package-0", "dram-0"). The kernel's counters start again at a few hundred
  /// kilojoules: whoever asks less often than once in some twenty minutes misses turns.
  std::map<std::string, double> joules();

 private:
  struct Zone {
    std::string domain;
    std::filesystem::path file;
    uint64_t range_uj = 0;  // where it starts again
    uint64_t last_uj = 0;
    double joules = 0;
  };
  std::vector<Zone> zones_;
};

}  // namespace thermocline::metrics
