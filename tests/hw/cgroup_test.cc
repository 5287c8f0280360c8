// runtime/hw/cgroup over trees as Linux shows them: v1, v2, both at once, inside and outside of a container.
#include "runtime/hw/cgroup.h"

#include <fstream>

#include "runtime/hw/topology.h"
#include "tests/support/fixtures.h"

namespace thermocline {
namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;

/// A /proc and /sys of our own.
class Tree {
 public:
  Tree() {
    write("proc/meminfo",
          "MemTotal:       67108864 kB\nMemFree:  100 kB\nMemAvailable:   33554432 kB\n");  // 64 and 32 GiB
  }
  const std::filesystem::path& root() const { return dir_.path(); }
  void write(const std::string& name, const std::string& text) {
    std::filesystem::create_directories((root() / name).parent_path());
    std::ofstream(root() / name) << text << "\n";
  }
  void v2(const std::string& group, const std::string& mounted_group = "/") {
    write("proc/self/cgroup", "0::" + group);
    write("proc/self/mountinfo",
          "30 23 0:28 " + mounted_group + " /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw");
  }
  /// As systemd mounts v1: cpu and cpuacct together, an empty v2 beside it.
  void v1(const std::string& group, const std::string& mounted_group = "/") {
    write("proc/self/cgroup", "5:memory:" + group + "\n4:cpu,cpuacct:" + group + "\n0::/");
    write("proc/self/mountinfo",
          "31 30 0:29 " + mounted_group +
              " /sys/fs/cgroup/cpu,cpuacct rw shared:5 - cgroup cgroup rw,cpu,cpuacct\n32 30 0:30 " + mounted_group +
              " /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n33 30 0:31 / "
              "/sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw");
  }
  std::string at(const std::string& name) const { return (root() / name).string(); }

 private:
  test::TempDir dir_;
};

TEST(CpuQuota, NoGroupsAndMaxAreNoLimit) {
  Tree tree;
  EXPECT_EQ(cpu_quota(tree.root()).cpus, 0);
  tree.v2("/");
  EXPECT_EQ(cpu_quota(tree.root()).cpus, 0) << "the real root has no cpu.max";
  tree.write("sys/fs/cgroup/cpu.max", "max 100000");
  EXPECT_EQ(cpu_quota(tree.root()).cpus, 0);
  tree.v1("/");
  tree.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1");
  tree.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000");
  EXPECT_EQ(cpu_quota(tree.root()).cpus, 0);
}

TEST(CpuQuota, TheTightestLevelCounts) {
  Tree tree;
  tree.v2("/system.slice/serve.scope");
  tree.write("sys/fs/cgroup/system.slice/cpu.max", "250000 100000");
  EXPECT_EQ(cpu_quota(tree.root()).cpus, 2.5) << "only the parent has a limit";
  tree.write("sys/fs/cgroup/system.slice/serve.scope/cpu.max", "400000 100000");
  EXPECT_EQ(cpu_quota(tree.root()).cpus, 2.5);
  EXPECT_EQ(cpu_quota(tree.root()).source, tree.at("sys/fs/cgroup/system.slice/cpu.max"));
  tree.write("sys/fs/cgroup/system.slice/serve.scope/cpu.max", "75000 50000");
  EXPECT_EQ(cpu_quota(tree.root()).cpus, 1.5);
}

TEST(CpuQuota, ContainersSeeTheirGroupAtTheMount) {
  Tree tree;
  tree.v2("/");  // a namespace of its own
  tree.write("sys/fs/cgroup/cpu.max", "50000 100000");
  EXPECT_EQ(cpu_quota(tree.root()).cpus, 0.5);
  tree.v1("/docker/1a2b", "/docker/1a2b");  // v1 without one: the host's path, and only the container's part mounted
  tree.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "150000");
  tree.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000");
  EXPECT_EQ(cpu_quota(tree.root()).cpus, 1.5);
  tree.v1("/docker/1a2b/workers", "/docker/1a2b");
  tree.write("sys/fs/cgroup/cpu,cpuacct/workers/cpu.cfs_quota_us", "100000");
  tree.write("sys/fs/cgroup/cpu,cpuacct/workers/cpu.cfs_period_us", "100000");
  EXPECT_EQ(cpu_quota(tree.root()).cpus, 1);
  tree.v1("/elsewhere", "/docker/1a2b");  // a path of another namespace
  EXPECT_EQ(cpu_quota(tree.root()).cpus, 1.5);
}

TEST(CpuQuota, ThreadsAreItsWholeCpus) {
  Topology topology;
  topology.cores.resize(8);
  for (const auto& [quota, threads] :
       {std::pair{0.0, 8}, {0.5, 1}, {1.0, 1}, {1.5, 1}, {2.0, 2}, {3.99, 3}, {100.0, 8}}) {
    topology.cpu_quota = quota;
    EXPECT_EQ(topology.default_threads(), threads) << quota;
    EXPECT_EQ(topology.threads_note().empty(), threads == 8) << quota;
  }
  topology.cpu_quota = 2.5;
  topology.quota_source = "/sys/fs/cgroup/cpu.max";
  EXPECT_EQ(topology.threads_note(), "2 of 8 cores: the control group grants 2.5 CPUs (/sys/fs/cgroup/cpu.max)");
}

TEST(Memory, WithoutGroupsItIsTheMachines) {
  Tree tree;
  EXPECT_EQ(memory_limit(tree.root()).bytes, 64 * kGiB);
  EXPECT_EQ(free_memory(tree.root()).bytes, 32 * kGiB);
  tree.v2("/serve");
  tree.write("sys/fs/cgroup/serve/memory.max", "max");
  tree.write("sys/fs/cgroup/serve/memory.high", "max");
  tree.write("sys/fs/cgroup/serve/memory.current", std::to_string(60 * kGiB));  // nearly all of it page cache, or not
  EXPECT_EQ(free_memory(tree.root()).bytes, 32 * kGiB) << "max is no number";
  tree.v1("/serve");
  tree.write("sys/fs/cgroup/memory/serve/memory.limit_in_bytes", "9223372036854771712");
  EXPECT_EQ(memory_limit(tree.root()).bytes, 64 * kGiB);
  EXPECT_EQ(free_memory(tree.root()).bytes, 32 * kGiB);
}

TEST(Memory, EveryLevelAndBothLimitsCount) {
  Tree tree;
  tree.v2("/pod/serve");
  tree.write("sys/fs/cgroup/pod/memory.max", std::to_string(16 * kGiB));
  tree.write("sys/fs/cgroup/pod/memory.current", std::to_string(10 * kGiB));
  tree.write("sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 3221225472\nactive_file 1073741824\nshmem 5");
  EXPECT_EQ(memory_limit(tree.root()).bytes, 16 * kGiB);
  const MemoryBudget pod = free_memory(tree.root());
  EXPECT_EQ(pod.bytes, 10 * kGiB) << "4 of the 10 GiB are page cache";
  EXPECT_EQ(pod.source, "the limit in " + tree.at("sys/fs/cgroup/pod/memory.max"));
  tree.write("sys/fs/cgroup/pod/serve/memory.high", std::to_string(4 * kGiB));
  EXPECT_EQ(free_memory(tree.root()).bytes, 4 * kGiB);
  tree.write("sys/fs/cgroup/pod/serve/memory.current", std::to_string(5 * kGiB));
  EXPECT_EQ(free_memory(tree.root()).bytes, 0u) << "over the limit already";
}

TEST(Memory, VersionOneCountsTheGroupsBelow) {
  Tree tree;
  tree.v1("/docker/1a2b", "/docker/1a2b");
  tree.write("sys/fs/cgroup/memory/memory.limit_in_bytes", std::to_string(8 * kGiB));
  tree.write("sys/fs/cgroup/memory/memory.usage_in_bytes", std::to_string(6 * kGiB));
  tree.write("sys/fs/cgroup/memory/memory.stat",
             "inactive_file 7\ntotal_inactive_file 2147483648\ntotal_active_file 0");
  EXPECT_EQ(free_memory(tree.root()).bytes, 4 * kGiB);
}

TEST(Memory, ReservedHugePagesCanStillBeTaken) {
  Tree tree;
  tree.write("sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages", "100");
  tree.write("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "512");
  EXPECT_EQ(free_memory(tree.root()).bytes, (32 + 100 + 1) * kGiB);
}

}  // namespace
}  // namespace thermocline
