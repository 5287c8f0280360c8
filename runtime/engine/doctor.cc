#include "runtime/engine/doctor.h"

#include <fmt/format.h>
#include <unistd.h>

#include <charconv>
#include <fstream>
#include <set>
#include <sstream>

#include "kernels_gpu/device_list.h"
#include "runtime/engine/stored_profile.h"
#include "runtime/hw/cgroup.h"
#include "runtime/io/disk_files.h"

namespace thermocline {
namespace {

namespace fs = std::filesystem;
constexpr double kGiB = 1 << 30;

std::string line_of(const fs::path& file) {
  std::ifstream in(file);
  std::string line;
  std::getline(in, line);
  return line;
}

int64_t number_of(const fs::path& file, int64_t otherwise) {
  const std::string text = line_of(file);
  int64_t value = otherwise;
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

// "SwapTotal:  1024 kB" of a file of such lines, in bytes.
int64_t kib_field(const fs::path& file, const std::string& name) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string key;
    int64_t kib = 0;
    if (words >> key >> kib && key == name + ":") return kib * 1024;
  }
  return 0;
}

// Entries of a folder by name, in order; none where it is hidden.
std::vector<fs::path> entries(const fs::path& folder) {
  std::set<fs::path> sorted;
  std::error_code error;
  for (auto it = fs::directory_iterator(folder, error); !error && it != fs::directory_iterator(); it.increment(error))
    sorted.insert(it->path());
  return {sorted.begin(), sorted.end()};
}

class Doctor {
 public:
  Doctor(const MachineInfo& machine, const DoctorOptions& options) : m_(machine), o_(options), root_(options.root) {}

  std::vector<Check> run() {
    instruction_sets();
    amx();
    governor();
    cpu_limit();
    memory();
    memory_limit_of_group();
    modules();
    swap();
    transparent_huge_pages();
    reserved_huge_pages();
    numa_balancing();
    locked_memory();
    io_uring();
    disk();
    nvidia();
    calibration();
    return std::move(checks_);
  }

 private:
  void ok(const char* name, std::string found) { checks_.push_back({name, CheckLevel::ok, std::move(found)}); }
  void warn(const char* name, std::string found, std::string advice) {
    checks_.push_back({name, CheckLevel::warning, std::move(found), std::move(advice)});
  }
  void problem(const char* name, std::string found, std::string advice) {
    checks_.push_back({name, CheckLevel::problem, std::move(found), std::move(advice)});
  }

  void instruction_sets() {
    const std::string found =
        fmt::format("{}: {} kernels ({})", m_.cpu.model, isa_name(m_.kernels), m_.cpu.to_string());
    if (m_.cpu.best() == Isa::scalar)
      warn("instruction sets", found,
           "without AVX2 everything runs in plain C++, some fifty times slower: use another machine");
    else if (m_.cpu.best() == Isa::avx2)
      warn("instruction sets", found, "prompts are several times faster with AVX-512 BF16 or AMX; answers are not");
    else
      ok("instruction sets", found);
  }

  void amx() {
    std::ifstream in(root_ / "proc/cpuinfo");
    bool has_tiles = false;
    for (std::string line; !has_tiles && std::getline(in, line);)
      has_tiles = line.starts_with("flags") && line.find(" amx_tile") != std::string::npos;
    if (!has_tiles)
      ok("AMX", "this processor shows none");
    else if (m_.cpu.amx)
      ok("AMX", "allowed");
    else
      warn("AMX", "the processor has it, the system does not let this process use it",
           "needs Linux 5.16 or later, and a container that allows arch_prctl");
  }

  void governor() {
    std::set<std::string> seen;
    for (const fs::path& cpu : entries(root_ / "sys/devices/system/cpu"))
      if (const std::string name = line_of(cpu / "cpufreq/scaling_governor"); !name.empty()) seen.insert(name);
    if (seen.empty()) return ok("CPU governor", "not shown, as in virtual machines");
    const std::string found = fmt::format("{}", fmt::join(seen, ", "));
    if (seen == std::set<std::string>{"performance"}) return ok("CPU governor", found);
    warn("CPU governor", found, "sudo cpupower frequency-set -g performance");
  }

  void cpu_limit() {
    const CpuQuota quota = cpu_quota(root_);
    const size_t cores = m_.topology.cores.size();
    const std::string found = quota.cpus > 0
                                  ? fmt::format("{:.4g} CPUs for {} cores ({})", quota.cpus, cores, quota.source)
                                  : fmt::format("none; {} cores", cores);
    if (quota.cpus <= 0 || quota.cpus >= static_cast<double>(cores)) return ok("CPU limit", found);
    if (quota.cpus < 1)
      return problem("CPU limit", found,
                     "less than one CPU: every step stands still for a part of each period; raise the limit");
    warn("CPU limit", found, "raise the limit to whole cores, or start with taskset on as many");
  }

  void memory() {
    const MemoryBudget free = free_memory(root_);
    const std::string found = fmt::format("{:.1f} GiB free of {:.1f}", static_cast<double>(free.bytes) / kGiB,
                                          static_cast<double>(memory_limit(root_).bytes) / kGiB);
    if (free.bytes < uint64_t{1} << 30) return problem("memory", found, "end what holds it: no model fits");
    ok("memory", found);
  }

  void memory_limit_of_group() {
    const MemoryBudget limit = memory_limit(root_);
    const int64_t machine = kib_field(root_ / "proc/meminfo", "MemTotal");
    if (machine == 0 || limit.bytes >= static_cast<uint64_t>(machine)) return ok("memory limit", "none");
    warn("memory limit", fmt::format("{:.1f} GiB by {}", static_cast<double>(limit.bytes) / kGiB, limit.source),
         fmt::format("the machine has {:.1f} GiB: raise it if the model needs more",
                     static_cast<double>(machine) / kGiB));
  }

  void modules() {
    std::ifstream in(root_ / "sys/firmware/dmi/tables/DMI", std::ios::binary);
    const std::string table{std::istreambuf_iterator<char>(in), {}};
    const MemoryModules modules = parse_memory_modules(table);
    if (modules.slots == 0) return ok("memory modules", "not shown (root may read them, virtual machines have none)");
    std::string found = fmt::format("{} of {} slots filled", modules.filled, modules.slots);
    if (modules.slowest_mts > 0) found += fmt::format(", {} MT/s", modules.slowest_mts);
    if (2 * modules.filled >= modules.slots) return ok("memory modules", found);
    warn("memory modules", found, "answers are as fast as memory is read: fill every channel, see the board's manual");
  }

  void swap() {
    const int64_t total = kib_field(root_ / "proc/meminfo", "SwapTotal"),
                  used = total - kib_field(root_ / "proc/meminfo", "SwapFree");
    if (total <= 0) return ok("swap", "off");
    warn("swap",
         fmt::format("{:.1f} GiB, {:.1f} in use", static_cast<double>(total) / kGiB, static_cast<double>(used) / kGiB),
         "weights that are swapped out stall every token: sudo swapoff -a, or sudo sysctl vm.swappiness=1");
  }

  void transparent_huge_pages() {
    const std::string text = line_of(root_ / "sys/kernel/mm/transparent_hugepage/enabled");
    const size_t open = text.find('['), close = text.find(']');
    const std::string mode = open < close && close != std::string::npos ? text.substr(open + 1, close - open - 1) : "";
    if (mode == "never")
      return warn("transparent huge pages", mode,
                  "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled: pages of 4 KiB cost every "
                  "weight a look-up");
    ok("transparent huge pages", mode.empty() ? "not shown" : mode);
  }

  void reserved_huge_pages() {
    std::string found;
    for (const fs::path& size : entries(root_ / "sys/kernel/mm/hugepages")) {
      const int64_t count = number_of(size / "nr_hugepages", 0), free = number_of(size / "free_hugepages", 0);
      std::string name = size.filename().string();
      if (name.starts_with("hugepages-")) name.erase(0, 10);
      if (count > 0) found += fmt::format("{}{} of {}, {} free", found.empty() ? "" : "; ", count, name, free);
    }
    ok("reserved huge pages", found.empty() ? "none; transparent ones serve" : found);
  }

  void numa_balancing() {
    const size_t nodes = m_.topology.nodes.size();
    const bool on = number_of(root_ / "proc/sys/kernel/numa_balancing", 0) > 0;
    const std::string found = fmt::format("{}, {} node{}", on ? "on" : "off", nodes, nodes == 1 ? "" : "s");
    if (!on || nodes == 1) return ok("NUMA balancing", found);
    warn("NUMA balancing", found, "it moves weights that lie right already: sudo sysctl kernel.numa_balancing=0");
  }

  // "Max locked memory  8388608  8388608  bytes"
  void locked_memory() {
    std::ifstream in(root_ / "proc/self/limits");
    constexpr std::string_view kName = "Max locked memory";
    std::string soft;
    for (std::string line; std::getline(in, line);)
      if (line.starts_with(kName)) std::istringstream(line.substr(kName.size())) >> soft;
    int64_t bytes = -1;
    const auto [end, error] = std::from_chars(soft.data(), soft.data() + soft.size(), bytes);
    if (soft.empty()) return ok("locked memory", "not shown");
    if (error != std::errc()) return ok("locked memory", soft);
    const std::string found = fmt::format("{:.0f} MiB", static_cast<double>(bytes) / (1 << 20));
    if (bytes >= 64 << 20) return ok("locked memory", found);
    warn("locked memory", found,
         "ulimit -l unlimited, or LimitMEMLOCK=infinity of the service: disk buffers are registered with the kernel "
         "once");
  }

  void io_uring() {
    const int64_t disabled = number_of(root_ / "proc/sys/kernel/io_uring_disabled", 0);
    const bool real = root_ == "/";
    if (disabled == 0 && (!real || io_uring_allowed())) return ok("io_uring", "allowed");
    warn("io_uring",
         disabled > 0 ? fmt::format("kernel.io_uring_disabled = {}", disabled) : "refused, as containers do by default",
         "threads read the disk instead, slower: sudo sysctl kernel.io_uring_disabled=0, or a seccomp profile that "
         "allows it");
  }

  void disk() {
    std::error_code error;
    const fs::space_info space = fs::space(o_.folder, error);
    if (error)
      return warn("disk", o_.folder.string() + ": " + error.message(), "name a folder that is there with --dir");
    const std::string found =
        fmt::format("{:.1f} GiB free in {}", static_cast<double>(space.available) / kGiB, o_.folder.string());
    if (space.available >= uint64_t{10} << 30) return ok("disk", found);
    warn("disk", found, "a KV cache on the disk wants more: name another with --dir, or free some");
  }

  bool nvidia_card_on_bus() const {
    for (const fs::path& device : entries(root_ / "sys/bus/pci/devices"))
      if (line_of(device / "vendor") == "0x10de" && line_of(device / "class").starts_with("0x03")) return true;
    return false;
  }

  void nvidia() {
    const bool driver = fs::exists(root_ / "proc/driver/nvidia/version");
    std::vector<std::string> closed;
    int cards = 0;
    for (const fs::path& device : entries(root_ / "dev")) {
      const std::string name = device.filename();
      if (!name.starts_with("nvidia")) continue;
      const bool card = name.size() > 6 && std::isdigit(static_cast<unsigned char>(name[6]));
      if (!card && name != "nvidiactl" && name != "nvidia-uvm") continue;
      cards += card;
      if (access(device.c_str(), R_OK | W_OK) != 0) closed.push_back("/dev/" + name);
    }
    if (!driver && cards == 0) {
      if (!nvidia_card_on_bus()) return ok("NVIDIA", "no card");
      return warn("NVIDIA", "a card without its driver", "install the NVIDIA driver, or use --device none");
    }
    if (!driver) return problem("NVIDIA", "device files without a driver", "load it: sudo modprobe nvidia nvidia_uvm");
    if (cards == 0)
      return problem("NVIDIA", "a driver, and no /dev/nvidia0",
                     "start the container with --gpus all, or run nvidia-smi once as root");
    if (!closed.empty())
      return problem("NVIDIA", fmt::format("{} may not be opened", fmt::join(closed, ", ")),
                     "join the group that owns it");
    const std::string found =
        fmt::format("{} card{}, {}", cards, cards == 1 ? "" : "s", line_of(root_ / "proc/driver/nvidia/version"));
    if (gpu::cuda_version().empty())
      return warn("NVIDIA", found, "this program was built without CUDA: cmake --preset cuda");
    ok("NVIDIA", found);
  }

  void calibration() {
    const fs::path folder = o_.profiles.empty() ? profile_folder() : o_.profiles;
    const Result<std::optional<sched::MachineProfile>> profile = stored_profile(m_, folder);
    if (!profile) return problem("calibration", profile.error().message, "thermocline calibrate");
    if (*profile) return ok("calibration", profile_path(folder, (*profile)->fingerprint).string());
    warn("calibration", "none for this machine, these workers and this version", "thermocline calibrate");
  }

  const MachineInfo& m_;
  const DoctorOptions& o_;
  const fs::path root_;
  std::vector<Check> checks_;
};

}  // namespace

// Structures one after the other: type, length of its fields, handle, fields, then strings up to two zeros. Type 17 is
// a slot; at 12 its size (0: empty), at 21 the speed. Source: SMBIOS 3.7, 6.1 and 7.18.
MemoryModules parse_memory_modules(std::string_view dmi) {
  constexpr int kMemoryDevice = 17, kEnd = 127;
  MemoryModules modules;
  for (size_t at = 0; at + 4 <= dmi.size();) {
    const auto byte = [&](size_t i) { return static_cast<unsigned char>(dmi[at + i]); };
    const size_t length = byte(1);
    if (length < 4 || at + length > dmi.size() || byte(0) == kEnd) break;
    if (byte(0) == kMemoryDevice && length >= 14) {
      const bool filled = byte(12) + byte(13) > 0;
      const int speed = length >= 23 ? byte(21) | byte(22) << 8 : 0;
      ++modules.slots;
      modules.filled += filled;
      if (filled && speed > 0 && (modules.slowest_mts == 0 || speed < modules.slowest_mts)) modules.slowest_mts = speed;
    }
    const size_t end = dmi.find(std::string_view("\0\0", 2), at + length);
    if (end == std::string_view::npos) break;
    at = end + 2;
  }
  return modules;
}

std::vector<Check> check_machine(const MachineInfo& machine, const DoctorOptions& options) {
  return Doctor(machine, options).run();
}

}  // namespace thermocline
