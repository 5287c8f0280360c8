#include "runtime/hw/cgroup.h"

#include <unistd.h>

#include <charconv>
#include <fstream>
#include <optional>
#include <sstream>
#include <vector>

namespace thermocline {
namespace {

using std::filesystem::path;

/// The folders of this process's groups for one controller, the innermost first.
struct Groups {
  bool v2 = false;
  std::vector<path> folders;
};

std::string first_line(const path& file) {
  std::ifstream in(file);
  std::string line;
  std::getline(in, line);
  return line;
}

// A whole file that is one number; nothing for "max" and for what is no number.
std::optional<uint64_t> read_number(const path& file) {
  const std::string text = first_line(file);
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

bool lists(const std::string& comma_separated, const std::string& word) {
  std::istringstream words(comma_separated);
  for (std::string w; std::getline(words, w, ',');)
    if (w == word) return true;
  return false;
}

/// Where a hierarchy is mounted, and which of its groups is visible there.
struct Mount {
  path at, group;
};

// /proc/self/mountinfo: "id parent device group at options [tags] - type source options".
std::optional<Mount> find_mount(const path& root, bool v2, const std::string& controller) {
  std::ifstream mounts(root / "proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {
    const size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    std::istringstream front(line), back(line.substr(dash + 3));
    std::string id, parent, device, group, at, type, source, options;
    front >> id >> parent >> device >> group >> at;
    back >> type >> source >> options;
    if (v2 ? type == "cgroup2" : type == "cgroup" && lists(options, controller)) return Mount{at, group};
  }
  return std::nullopt;
}

// The path of this process's group: "0::/path" of v2, "4:memory:/path" of v1.
std::optional<path> find_group(const path& root, bool v2, const std::string& controller) {
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (v2 ? controllers.empty() : lists(controllers, controller)) return path(line.substr(second + 1));
  }
  return std::nullopt;
}

std::vector<path> levels(const path& root, const Mount& mount, const path& group) {
  const path top = root / mount.at.relative_path();
  // A group outside of what is mounted is another namespace's name for what lies at the mount.
  path below = group.lexically_relative(mount.group);
  if (below.empty() || *below.begin() == "..") below = ".";
  std::vector<path> folders;
  for (; below != "." && !below.empty(); below = below.parent_path()) folders.push_back(top / below);
  folders.push_back(top);
  return folders;
}

// On hybrid systems a controller is in one of the two hierarchies: v1 where it is mounted.
std::optional<Groups> find_groups(const path& root, const std::string& controller) {
  for (const bool v2 : {false, true}) {
    const std::optional<Mount> mount = find_mount(root, v2, controller);
    const std::optional<path> group = find_group(root, v2, controller);
    if (mount && group) return Groups{v2, levels(root, *mount, *group)};
  }
  return std::nullopt;
}

double quota_of(const path& folder, bool v2) {
  std::istringstream text(v2 ? first_line(folder / "cpu.max")
                             : first_line(folder / "cpu.cfs_quota_us") + " " +
                                   first_line(folder / "cpu.cfs_period_us"));
  double quota = 0, period = 0;  // "max" and -1: none
  return text >> quota >> period && quota > 0 && period > 0 ? quota / period : 0;
}

uint64_t field_of(const path& file, const std::string& name) {
  std::ifstream in(file);
  std::string key;
  for (uint64_t value = 0; in >> key >> value;)
    if (key == name) return value;
  return 0;
}

// MemTotal or MemAvailable, in bytes; where /proc is hidden, what the C library says.
uint64_t meminfo(const path& root, const std::string& name) {
  std::ifstream in(root / "proc/meminfo");
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string key;
    uint64_t kib = 0;
    if (words >> key >> kib && key == name + ":") return kib * 1024;
  }
  return static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

// Pages somebody reserved for programs that ask for them, as NumaBuffer does: no part of MemAvailable.
uint64_t free_huge_pages(const path& root) {
  constexpr std::string_view kPrefix = "hugepages-";
  uint64_t bytes = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(root / "sys/kernel/mm/hugepages", error)) {
    const std::string name = entry.path().filename();
    uint64_t kib = 0;
    if (name.starts_with(kPrefix)) std::from_chars(name.data() + kPrefix.size(), name.data() + name.size(), kib);
    bytes += kib * 1024 * read_number(entry.path() / "free_hugepages").value_or(0);
  }
  return bytes;
}

/// A limit of one group, and what its members hold of it.
struct Limit {
  uint64_t bytes, held;
  path file;
};

std::vector<Limit> limits_of(const path& folder, bool v2) {
  const uint64_t usage = read_number(folder / (v2 ? "memory.current" : "memory.usage_in_bytes")).value_or(0);
  const std::string prefix = v2 ? "" : "total_";  // v1: with the groups below
  const path stat = folder / "memory.stat";
  const uint64_t cache = field_of(stat, prefix + "inactive_file") + field_of(stat, prefix + "active_file");
  std::vector<Limit> limits;
  for (const char* name : {v2 ? "memory.max" : "memory.limit_in_bytes", v2 ? "memory.high" : ""})
    if (const std::optional<uint64_t> bytes = *name ? read_number(folder / name) : std::nullopt)
      limits.push_back({*bytes, usage - std::min(usage, cache), folder / name});
  return limits;
}

template <class Fn>
MemoryBudget tightest(const path& root, MemoryBudget budget, const Fn& bytes_of) {
  const std::optional<Groups> groups = find_groups(root, "memory");
  if (!groups) return budget;
  for (const path& folder : groups->folders)
    for (const Limit& limit : limits_of(folder, groups->v2))
      if (const uint64_t bytes = bytes_of(limit); bytes < budget.bytes)
        budget = {bytes, "the limit in " + limit.file.string()};
  return budget;
}

}  // namespace

CpuQuota cpu_quota(const path& root) {
  CpuQuota lowest;
  const std::optional<Groups> groups = find_groups(root, "cpu");
  if (!groups) return lowest;
  for (const path& folder : groups->folders)
    if (const double cpus = quota_of(folder, groups->v2); cpus > 0 && (lowest.cpus == 0 || cpus < lowest.cpus))
      lowest = {cpus, folder / (groups->v2 ? "cpu.max" : "cpu.cfs_quota_us")};
  return lowest;
}

MemoryBudget memory_limit(const path& root) {
  return tightest(root, {meminfo(root, "MemTotal"), "the machine's memory"},
                  [](const Limit& limit) { return limit.bytes; });
}

MemoryBudget free_memory(const path& root) {
  const uint64_t huge = free_huge_pages(root);
  MemoryBudget budget = {meminfo(root, "MemAvailable"), "what the machine has free"};
  budget = tightest(root, budget, [](const Limit& limit) { return limit.bytes - std::min(limit.bytes, limit.held); });
  budget.bytes += huge;  // groups do not count them
  return budget;
}

}  // namespace thermocline
