// What Linux's control groups, v1 and v2, leave to this process: CPU time and memory. A limit may be set on any level
// between the process's group and the root, so every level is asked and the tightest counts. Inside a container the
// levels above it are hidden; there the container's own is the root.
// `root` is where /proc and /sys are looked for: tests bring trees of their own.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace thermocline {

/// CPUs that a group grants: quota over period of cpu.max or cpu.cfs_quota_us.
struct CpuQuota {
  double cpus = 0;     // 0: no limit
  std::string source;  // the file that says so, for messages; empty without a limit
};
CpuQuota cpu_quota(const std::filesystem::path& root = "/");

/// Bytes, and what bounds them: "the machine's memory", or the file of a group.
struct MemoryBudget {
  uint64_t bytes = 0;
  std::string source;
};

/// Memory this process may use at most: the machine's, or the lowest limit of its groups.
MemoryBudget memory_limit(const std::filesystem::path& root = "/");

/// Memory this process can still take: MemAvailable and free reserved huge pages of the machine, or of a group its
/// limit (memory.max, memory.high, memory.limit_in_bytes) without what its members hold. Page cache does not count as
/// held: the kernel gives it up first. Swap does not count as memory.
MemoryBudget free_memory(const std::filesystem::path& root = "/");

}  // namespace thermocline
