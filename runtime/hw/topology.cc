#include "runtime/hw/topology.h"

#include <hwloc.h>
#include <sched.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include <fmt/format.h>

#include "runtime/hw/cgroup.h"

namespace thermocline {
namespace {

using TopologyHandle = std::unique_ptr<hwloc_topology, decltype(&hwloc_topology_destroy)>;
using Bitmap = std::unique_ptr<hwloc_bitmap_s, decltype(&hwloc_bitmap_free)>;

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

void add_caches(hwloc_topology_t topology, Topology& out) {
  const int count = hwloc_get_nbobjs_by_type(topology, HWLOC_OBJ_L3CACHE);
  for (int i = 0; i < count; ++i)
    out.last_level_cache_bytes +=
        hwloc_get_obj_by_type(topology, HWLOC_OBJ_L3CACHE, static_cast<unsigned>(i))->attr->cache.size;
  if (hwloc_obj_t l2 = hwloc_get_obj_by_type(topology, HWLOC_OBJ_L2CACHE, 0)) {
    const int cores = hwloc_get_nbobjs_inside_cpuset_by_type(topology, l2->cpuset, HWLOC_OBJ_CORE);
    out.core_cache_bytes = l2->attr->cache.size / static_cast<uint64_t>(std::max(1, cores));
  }
}

// The CPUs the calling thread may run on: hwloc knows the cpuset of the group, not what taskset left of it.
Bitmap allowed_cpus(hwloc_topology_t topology, bool synthetic) {
  Bitmap allowed(hwloc_bitmap_alloc_full(), &hwloc_bitmap_free);
  if (!synthetic && hwloc_get_cpubind(topology, allowed.get(), HWLOC_CPUBIND_THREAD) != 0)
    hwloc_bitmap_fill(allowed.get());
  return allowed;
}

void add_cores(hwloc_topology_t topology, Topology& out) {
  const bool has_cores = hwloc_get_nbobjs_by_type(topology, HWLOC_OBJ_CORE) > 0;
  const hwloc_obj_type_t type = has_cores ? HWLOC_OBJ_CORE : HWLOC_OBJ_PU;
  const int count = hwloc_get_nbobjs_by_type(topology, type);
  const Bitmap allowed = allowed_cpus(topology, out.synthetic);
  for (int i = 0; i < count; ++i) {
    const hwloc_obj_t core = hwloc_get_obj_by_type(topology, type, static_cast<unsigned>(i));
    const Bitmap mine(hwloc_bitmap_alloc(), &hwloc_bitmap_free);
    hwloc_bitmap_and(mine.get(), core->cpuset, allowed.get());
    if (const int first = hwloc_bitmap_first(mine.get()); first >= 0)
      out.cores.push_back({first, node_index_of(topology, core, out.nodes)});
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

// Rounded down: with 2 spinning workers on a quota of 1.5 CPUs all of them stand still for a quarter of every period.
int Topology::default_threads() const {
  const int most = static_cast<int>(cores.size());
  return cpu_quota > 0 ? std::clamp(static_cast<int>(std::floor(cpu_quota)), 1, most) : most;
}

std::string Topology::threads_note() const {
  if (default_threads() == static_cast<int>(cores.size())) return "";
  return fmt::format("{} of {} cores: the control group grants {:.4g} CPUs ({})", default_threads(), cores.size(),
                     cpu_quota, quota_source);
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
  add_caches(raw, topology);
  if (!topology.synthetic) {
    const CpuQuota quota = thermocline::cpu_quota();
    topology.cpu_quota = quota.cpus;
    topology.quota_source = quota.source;
  }
  return topology;
}

uint64_t usable_memory_bytes() { return memory_limit().bytes; }

}  // namespace thermocline
