#include "runtime/hw/topology.h"

#include <hwloc.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <memory>
#include <sstream>

namespace thermocline {
namespace {

using TopologyHandle = std::unique_ptr<hwloc_topology, decltype(&hwloc_topology_destroy)>;

// cgroup v2 is mounted at /sys/fs/cgroup; a process sees its own limits at the path /proc/self/cgroup names, and a
// container with its own namespace sees them at the root.
std::string read_cgroup_file(const std::string& name) {
  std::string path;
  std::ifstream self("/proc/self/cgroup");
  for (std::string line; std::getline(self, line);)
    if (line.rfind("0::", 0) == 0) path = line.substr(3);
  for (const std::string& folder : {"/sys/fs/cgroup" + path, std::string("/sys/fs/cgroup")}) {
    std::ifstream file(folder + "/" + name);
    std::string text;
    if (std::getline(file, text)) return text;
  }
  return "";
}

double cgroup_cpu_quota() {
  std::istringstream text(read_cgroup_file("cpu.max"));
  std::string quota;
  double period = 0;
  if (!(text >> quota >> period) || quota == "max" || period <= 0) return 0;
  return std::strtod(quota.c_str(), nullptr) / period;
}

int node_index_of(hwloc_topology_t topology, hwloc_obj_t core, const std::vector<NumaNode>& nodes) {
  for (size_t i = 0; i < nodes.size(); ++i) {
    const hwloc_obj_t node = hwloc_get_numanode_obj_by_os_index(topology, static_cast<unsigned>(nodes[i].os_node));
    if (node && hwloc_bitmap_intersects(node->cpuset, core->cpuset)) return static_cast<int>(i);
  }
  return 0;
}

void add_nodes(hwloc_topology_t topology, Topology& out) {
  const int count = hwloc_get_nbobjs_by_type(topology, HWLOC_OBJ_NUMANODE);
  for (int i = 0; i < count; ++i) {
    const hwloc_obj_t node = hwloc_get_obj_by_type(topology, HWLOC_OBJ_NUMANODE, static_cast<unsigned>(i));
    if (!hwloc_bitmap_iszero(node->cpuset))  // memory-only nodes (CXL, HBM flat mode) are no home for workers
      out.nodes.push_back({static_cast<int>(node->os_index), node->attr->numanode.local_memory});
  }
  if (out.nodes.empty()) {
    out.nodes.push_back({});
    out.note = "the system hides its NUMA nodes: treating it as one";
  }
}

void add_cores(hwloc_topology_t topology, Topology& out) {
  const bool has_cores = hwloc_get_nbobjs_by_type(topology, HWLOC_OBJ_CORE) > 0;
  const hwloc_obj_type_t type = has_cores ? HWLOC_OBJ_CORE : HWLOC_OBJ_PU;
  const int count = hwloc_get_nbobjs_by_type(topology, type);
  for (int i = 0; i < count; ++i) {
    const hwloc_obj_t core = hwloc_get_obj_by_type(topology, type, static_cast<unsigned>(i));
    out.cores.push_back({hwloc_bitmap_first(core->cpuset), node_index_of(topology, core, out.nodes)});
  }
  if (out.cores.empty()) {
    cpu_set_t set;
    CPU_ZERO(&set);
    sched_getaffinity(0, sizeof set, &set);
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) out.cores.push_back({cpu, 0});
    out.note = "the system hides its cores: using the CPUs of the affinity mask";
  }
  std::stable_sort(out.cores.begin(), out.cores.end(), [](const Core& a, const Core& b) { return a.node < b.node; });
}

}  // namespace

int Topology::default_threads() const {
  int threads = static_cast<int>(cores.size());
  if (cpu_quota > 0) threads = std::min(threads, std::max(1, static_cast<int>(std::floor(cpu_quota))));
  return std::max(1, threads);
}

Result<Topology> read_topology(const std::string& synthetic) {
  hwloc_topology_t raw = nullptr;
  if (hwloc_topology_init(&raw) != 0) return Error{ErrorCode::internal, "hwloc could not be initialised"};
  const TopologyHandle handle(raw, &hwloc_topology_destroy);
  if (!synthetic.empty() && hwloc_topology_set_synthetic(raw, synthetic.c_str()) != 0)
    return invalid("hwloc cannot read the topology '" + synthetic + "': expected something like 'node:2 core:4 pu:1'");
  // By default hwloc keeps only what the cpuset of this process allows.
  if (hwloc_topology_load(raw) != 0) return invalid("hwloc could not load the topology '" + synthetic + "'");
  Topology topology;
  topology.synthetic = !hwloc_topology_is_thissystem(raw);
  add_nodes(raw, topology);
  add_cores(raw, topology);
  if (!topology.synthetic) topology.cpu_quota = cgroup_cpu_quota();
  return topology;
}

uint64_t usable_memory_bytes() {
  const uint64_t machine =
      static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const std::string limit = read_cgroup_file("memory.max");
  if (limit.empty() || limit == "max") return machine;
  return std::min<uint64_t>(machine, std::strtoull(limit.c_str(), nullptr, 10));
}

}  // namespace thermocline
