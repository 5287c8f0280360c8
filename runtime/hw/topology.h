// The machine as hwloc sees it, cut down to what this process may use: cpuset, cgroup quota and NUMA nodes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/base/result.h"

namespace thermocline {

struct Core {
  int os_cpu = 0;  // the first hardware thread of the core that may be used, as sched_setaffinity counts
  int node = 0;    // index into Topology::nodes
};

struct NumaNode {
  int os_node = 0;
  uint64_t memory_bytes = 0;  // 0 where the system hides it
};

struct Topology {
  std::vector<NumaNode> nodes;          // at least one
  std::vector<Core> cores;              // physical cores in cpuset and affinity mask, by node then number; at least one
  uint64_t last_level_cache_bytes = 0;  // of all L3 caches; 0 where the system hides them
  uint64_t core_cache_bytes = 0;        // of one core's L2; 0 where the system hides it
  double cpu_quota = 0;                 // CPUs the control groups grant (cgroup.h), 0 for no limit
  std::string quota_source;             // the file that says so
  bool synthetic = false;               // described by text, so nothing may be bound to it
  std::string note;                     // what had to be guessed, e.g. "topology hidden"; empty when nothing

  /// How many workers this process should run: one per core, no more than the whole CPUs of the quota, at least one.
  int default_threads() const;
  /// Why that is less than one per core: a line for the log; empty where it is not.
  std::string threads_note() const;
};

/// Reads the topology. `synthetic` is an hwloc description such as "node:2 core:4 pu:1"; empty asks the machine
/// (and hwloc itself honours HWLOC_SYNTHETIC). A machine that hides its topology gives one node and a note.
/// Errors: invalid_argument for a description hwloc cannot read.
Result<Topology> read_topology(const std::string& synthetic = "");

/// Bytes of memory this process may use at most: memory_limit() of cgroup.h.
uint64_t usable_memory_bytes();

}  // namespace thermocline
