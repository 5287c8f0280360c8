// The machine's measure: its file, where it is kept, and the checks of `doctor` over trees as Linux shows them. Nothing
// here looks at how long something took. A device is the SIMT interpreter.
#include "runtime/engine/calibrate.h"

#include <sys/stat.h>

#include <cmath>
#include <fstream>

#include "kernels_gpu/open_device.h"
#include "runtime/engine/doctor.h"
#include "runtime/engine/machine_profile_json.h"
#include "runtime/engine/stored_profile.h"
#include "tests/support/fixtures.h"

namespace thermocline {
namespace {

using sched::KernelCurve;
using sched::MachineProfile;

MachineProfile some_profile() {
  MachineProfile profile;
  profile.fingerprint = "0123456789abcdef";
  sched::CpuProfile& cpu = profile.cpu;
  cpu.name = "a processor";
  cpu.nodes = 2;
  cpu.cores = 48;
  cpu.memory_bytes = 512e9;
  cpu.read_bytes_per_second = 610e9;
  for (size_t f = 0; f < 3; ++f) cpu.weights[f] = KernelCurve::roof(550e9, 9e12, 2 / sched::kBytesPerWeight[f]);
  cpu.attention_flops_one = 1e12;
  cpu.attention_flops_many = 4e12;
  cpu.index_ops_one = 8e12;
  cpu.index_ops_many = 9e12;
  cpu.streams = {0.01, 0.001};
  cpu.rows = {0.02, 0.002};
  cpu.region_ns = 1500;
  sched::GpuProfile gpu;
  gpu.name = "a card";
  gpu.memory_bytes = 80e9;
  for (size_t f = 0; f < 3; ++f) gpu.weights[f] = KernelCurve::roof(2850e9, 400e12, 2 / sched::kBytesPerWeight[f]);
  gpu.attention_flops = 100e12;
  gpu.index_ops = 90e12;
  gpu.bytes_per_second = 2850e9;
  gpu.kernel_ns = 2000;
  gpu.h2d_bytes_per_second = 52e9;
  gpu.h2d_ns = 9000;
  gpu.cpu_read_share_beside_h2d = 0.9;
  gpu.sync_ns = 21000;
  profile.gpus.push_back(gpu);
  profile.disk = {6e9, 1e12};
  return profile;
}

TEST(MachineProfileJson, GivesBackWhatItWasGiven) {
  const Json json = machine_profile_json(some_profile());
  const Result<MachineProfile> read = parse_machine_profile(dump_json(json, 2));
  ASSERT_TRUE(read) << read.error().message;
  EXPECT_EQ(machine_profile_json(*read), json);
  EXPECT_EQ(read->cpu.weights[2].points(), some_profile().cpu.weights[2].points());
  EXPECT_EQ(read->gpus.size(), 1u);
}

/// The numbers of a card, to be compared one by one: what a file forgets would otherwise compare equal as 0.
std::vector<double> numbers_of(const sched::GpuProfile& gpu) {
  std::vector<double> numbers = {
      gpu.memory_bytes, gpu.attention_flops,      gpu.index_ops, gpu.bytes_per_second,
      gpu.kernel_ns,    gpu.h2d_bytes_per_second, gpu.h2d_ns,    gpu.cpu_read_share_beside_h2d,
      gpu.sync_ns};
  for (const KernelCurve& curve : gpu.weights)
    numbers.insert(numbers.end(), curve.points().begin(), curve.points().end());
  return numbers;
}

TEST(MachineProfileJson, KeepsEveryFieldOfACard) {
  const MachineProfile written = some_profile();
  const MachineProfile read = parse_machine_profile(dump_json(machine_profile_json(written))).value();
  EXPECT_EQ(read.gpus[0].name, "a card");
  EXPECT_EQ(numbers_of(read.gpus[0]), numbers_of(written.gpus[0]));
  const Json whole = machine_profile_json(written);
  for (const auto& [key, value] : whole["gpus"][0].items()) {
    Json json = whole;
    json["gpus"][0].erase(key);
    EXPECT_EQ(parse_machine_profile(dump_json(json)).error().message, "gpus[0]." + key + " is missing");
  }
}

TEST(MachineProfileJson, ErrorsNameTheField) {
  const auto refused = [](const char* pointer, const Json& value, const std::string& words) {
    Json json = machine_profile_json(some_profile());
    json[Json::json_pointer(pointer)] = value;
    const Result<MachineProfile> read = parse_machine_profile(dump_json(json));
    ASSERT_FALSE(read) << pointer;
    EXPECT_EQ(read.error().code, ErrorCode::corrupt);
    EXPECT_NE(read.error().message.find(words), std::string::npos) << read.error().message;
  };
  refused("/version", 2, "version 2 is unknown");
  refused("/tokens", {1, 2}, "tokens should be [1,2,4");
  refused("/fingerprint", 5, "fingerprint should be a string");
  refused("/cpu", Json::array(), "cpu should be an object");
  refused("/cpu/cores", 0, "cpu.cores should be a whole number");
  refused("/cpu/cores", 1.5, "cpu.cores should be a whole number");
  refused("/cpu/region_ns", -1, "cpu.region_ns should be a number from 1e-12 to 1e18");
  refused("/cpu/region_ns", "x", "cpu.region_ns should be a number from 1e-12 to 1e18");
  refused("/cpu/read_bytes_per_second", nullptr, "cpu.read_bytes_per_second");
  refused("/cpu/streams/next_ns", 0, "cpu.streams.next_ns should be a number from 1e-12 to 1e18");
  refused("/cpu/ns_per_byte/fp8/3", -1, "cpu.ns_per_byte.fp8[3] should be");
  refused("/cpu/ns_per_byte/mxfp4", {1, 2, 3}, "cpu.ns_per_byte.mxfp4 should have 10 numbers");
  refused("/gpus", 1, "gpus should be an array");
  refused("/gpus/0/cpu_read_share_beside_h2d", 1.1, "gpus[0].cpu_read_share_beside_h2d should be at most 1");
  refused("/disk/free_bytes", -1, "disk.free_bytes should be 0, or a number from 1e-12 to 1e18");
  Json json = machine_profile_json(some_profile());
  json["cpu"].erase("index_ops_one");
  EXPECT_EQ(parse_machine_profile(dump_json(json)).error().message, "cpu.index_ops_one is missing");
  EXPECT_FALSE(parse_machine_profile("[]"));
  EXPECT_FALSE(parse_machine_profile("{"));
}

/// A machine that is described, not measured.
struct SomeMachine {
  CpuFeatures cpu{.model = "a processor", .avx2 = true, .avx512 = true, .amx = false};
  Topology topology{.nodes = {{}, {1, 0}}, .cores = std::vector<Core>(4), .quota_source = {}, .note = {}};
  MachineInfo info() const { return {cpu, topology, Isa::avx512, 4}; }
};

TEST(StoredProfile, IsFoundByItsOwnMachineOnly) {
  const test::TempDir dir;
  const std::filesystem::path folder = dir.path() / "cache" / "thermocline";
  SomeMachine machine;
  EXPECT_FALSE(stored_profile(machine.info(), folder).value()) << "nothing stored yet";
  MachineProfile profile = some_profile();
  profile.fingerprint = fingerprint_of(machine.info());
  const std::filesystem::path path = profile_path(folder, profile.fingerprint);
  ASSERT_TRUE(store_profile(path, profile, hardware_line(machine.info())));
  struct stat info {};
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600u);
  ASSERT_EQ(stat(folder.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0700u);
  EXPECT_EQ(stored_profile(machine.info(), folder).value()->cpu.read_bytes_per_second, 610e9);

  MachineInfo fewer = machine.info();
  fewer.threads = 2;
  EXPECT_FALSE(stored_profile(fewer, folder).value()) << "fewer workers measure otherwise";
  std::filesystem::copy(path, profile_path(folder, fingerprint_of(fewer)));
  EXPECT_EQ(stored_profile(fewer, folder).error().code, ErrorCode::corrupt) << "a copy under another name";
  ASSERT_TRUE(write_text_file(path, "{}"));
  EXPECT_NE(stored_profile(machine.info(), folder).error().message.find(path.string()), std::string::npos);
}

TEST(Calibrate, MeasuresAllOfAProfile) {
  const test::TempDir dir;
  const Topology topology = read_topology("node:2 core:1 pu:1").value();  // slices on two nodes
  WorkerPool pool(topology);
  const CpuFeatures features = detect_cpu_features();
  const cpu::KernelTable table = cpu::make_kernel_table(features, Isa::avx2);
  double share = -1;
  const std::vector<std::unique_ptr<gpu::Device>> devices =
      gpu::open_devices(gpu::parse_device("simt:2").value(), size_t{256} << 20).value();
  CalibrateOptions options{.quick = true, .disk_folder = dir.path(), .devices = devices};
  options.progress = [&](const std::string&, double now) {
    EXPECT_GE(now, share);
    share = now;
  };
  const Result<Calibration> measured = calibrate(topology, "a processor", {pool, table}, options);
  ASSERT_TRUE(measured) << measured.error().message;
  EXPECT_EQ(measured->profile.cpu.cores, 2);
  EXPECT_EQ(measured->by_node.size(), 2u);
  EXPECT_EQ(measured->by_threads.back().threads, 2);
  EXPECT_GE(measured->saturated_by(), 1);
  EXPECT_GT(measured->parked_region_ns, 0);
  EXPECT_GT(measured->profile.disk.read_bytes_per_second, 0);
  EXPECT_TRUE(parse_machine_profile(dump_json(machine_profile_json(measured->profile)))) << "every number makes sense";
  EXPECT_TRUE(std::filesystem::is_empty(dir.path())) << "the disk's file is gone";
  ASSERT_EQ(measured->profile.gpus.size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    const sched::GpuProfile& gpu = measured->profile.gpus[i];
    const DeviceCalibration& device = measured->devices[i];
    EXPECT_EQ(gpu.name, "SIMT interpreter " + std::to_string(i));
    EXPECT_EQ(numbers_of(gpu), numbers_of(device.profile));
    for (const double number : numbers_of(gpu)) EXPECT_TRUE(std::isfinite(number) && number > 0) << number;
    EXPECT_EQ(gpu.memory_bytes, size_t{256} << 20);
    EXPECT_LE(gpu.cpu_read_share_beside_h2d, 1);
    for (const KernelCurve& curve : gpu.weights) {
      EXPECT_GE(gpu.bytes_per_second, 0.999e9 / curve.points()[0]) << "no kernel reads faster than the memory";
      EXPECT_GT(curve.points()[9], curve.points()[0]) << "512 tokens against one";
    }
    EXPECT_GE(device.sync_p99_ns, gpu.sync_ns);
    EXPECT_GE(device.parked_sync_p99_ns, device.parked_sync_ns);
    EXPECT_GT(device.parked_sync_ns, 0);
    EXPECT_TRUE(device.interpreted);
    EXPECT_EQ(device.rounds, 1);
  }
}

/// A /proc, /sys and /dev of our own.
class DoctorTree : public ::testing::Test {
 protected:
  DoctorTree() {
    write("proc/meminfo", "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB");
    write("proc/self/limits", "Max locked memory         unlimited            unlimited            bytes");
    write("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never");
  }
  void write(const std::string& name, const std::string& text) {
    std::filesystem::create_directories((dir_.path() / name).parent_path());
    std::ofstream(dir_.path() / name) << text << "\n";
  }
  Check check(const std::string& name) {
    for (const Check& c : check_machine(machine_.info(), {dir_.path(), dir_.path(), dir_.path() / "profiles"}))
      if (c.name == name) return c;
    ADD_FAILURE() << "no check is called " << name;
    return {};
  }
  void expect(const std::string& name, CheckLevel level, const std::string& found) {
    const Check c = check(name);
    EXPECT_EQ(c.level, level) << name << ": " << c.found;
    EXPECT_NE(c.found.find(found), std::string::npos) << name << ": " << c.found;
    EXPECT_EQ(c.advice.empty(), level == CheckLevel::ok) << "what is not fine says what to do";
  }
  test::TempDir dir_;
  SomeMachine machine_;
};

TEST_F(DoctorTree, AQuietMachineHasNothingButACalibrationToDo) {
  for (const Check& c : check_machine(machine_.info(), {dir_.path(), dir_.path(), dir_.path() / "profiles"})) {
    if (c.name == "disk") continue;  // this machine's
    EXPECT_EQ(c.level, c.name == "calibration" ? CheckLevel::warning : CheckLevel::ok) << c.name << ": " << c.found;
  }
}

TEST_F(DoctorTree, SettingsThatCostSpeedAreWarnings) {
  write("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]");
  expect("transparent huge pages", CheckLevel::warning, "never");
  write("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance");
  expect("CPU governor", CheckLevel::ok, "performance");
  write("sys/devices/system/cpu/cpu1/cpufreq/scaling_governor", "powersave");
  expect("CPU governor", CheckLevel::warning, "performance, powersave");
  write("proc/sys/kernel/numa_balancing", "1");
  expect("NUMA balancing", CheckLevel::warning, "on, 2 nodes");
  machine_.topology.nodes.resize(1);
  expect("NUMA balancing", CheckLevel::ok, "on, 1 node");
  write("proc/self/limits", "Max locked memory         8388608              8388608              bytes");
  expect("locked memory", CheckLevel::warning, "8 MiB");
  write("proc/sys/kernel/io_uring_disabled", "2");
  expect("io_uring", CheckLevel::warning, "io_uring_disabled = 2");
  write("sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "100");
  write("sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages", "40");
  expect("reserved huge pages", CheckLevel::ok, "100 of 1048576kB, 40 free");
  write("proc/cpuinfo", "processor : 0\nflags\t\t: fpu avx512f amx_tile amx_int8");
  expect("AMX", CheckLevel::warning, "does not let");
  machine_.cpu.amx = true;
  expect("AMX", CheckLevel::ok, "allowed");
}

TEST_F(DoctorTree, MemoryThatIsShort) {
  write("proc/meminfo", "MemTotal: 67108864 kB\nMemAvailable: 524288 kB\nSwapTotal: 2097152 kB\nSwapFree: 1048576 kB");
  expect("swap", CheckLevel::warning, "2.0 GiB, 1.0 in use");
  expect("memory", CheckLevel::problem, "0.5 GiB free of 64.0");
}

TEST_F(DoctorTree, LimitsOfTheGroup) {
  write("proc/self/cgroup", "0::/");
  write("proc/self/mountinfo", "30 23 0:28 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw");
  write("sys/fs/cgroup/memory.max", "8589934592");
  write("sys/fs/cgroup/cpu.max", "250000 100000");
  expect("memory limit", CheckLevel::warning, "8.0 GiB by the limit in");
  expect("CPU limit", CheckLevel::warning, "2.5 CPUs for 4 cores");
  write("sys/fs/cgroup/cpu.max", "50000 100000");
  expect("CPU limit", CheckLevel::problem, "0.5 CPUs");
  write("sys/fs/cgroup/cpu.max", "800000 100000");
  expect("CPU limit", CheckLevel::ok, "8 CPUs");
}

TEST_F(DoctorTree, Cards) {
  expect("NVIDIA", CheckLevel::ok, "no card");
  write("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de");
  write("sys/bus/pci/devices/0000:01:00.0/class", "0x030200");
  expect("NVIDIA", CheckLevel::warning, "without its driver");
  write("proc/driver/nvidia/version", "NVRM version: 570.1");
  expect("NVIDIA", CheckLevel::problem, "no /dev/nvidia0");
  write("dev/nvidia0", "");
  write("dev/nvidiactl", "");
  EXPECT_NE(check("NVIDIA").level, CheckLevel::problem);
}

TEST_F(DoctorTree, ACalibrationIsFoundAndADamagedOneIsAProblem) {
  MachineProfile profile = some_profile();
  profile.fingerprint = fingerprint_of(machine_.info());
  const std::filesystem::path path = profile_path(dir_.path() / "profiles", profile.fingerprint);
  ASSERT_TRUE(store_profile(path, profile, ""));
  expect("calibration", CheckLevel::ok, path.string());
  ASSERT_TRUE(write_text_file(path, "{"));
  expect("calibration", CheckLevel::problem, path.string());
}

// Two slots, one of them filled, at 4800 MT/s.
TEST_F(DoctorTree, MemoryModules) {
  const auto slot = [](uint16_t size, uint16_t speed) {
    std::string s(0x20, '\0');
    s[0] = 17;
    s[1] = 0x20;
    s[12] = static_cast<char>(size & 255);
    s[13] = static_cast<char>(size >> 8);
    s[21] = static_cast<char>(speed & 255);
    s[22] = static_cast<char>(speed >> 8);
    return s + std::string("DIMM_A\0\0", 8);
  };
  std::string table = slot(0x7fff, 4800) + slot(0, 0);
  MemoryModules modules = parse_memory_modules(table);
  EXPECT_EQ(modules.slots, 2);
  EXPECT_EQ(modules.filled, 1);
  EXPECT_EQ(modules.slowest_mts, 4800);
  table += slot(0, 0) + std::string("\x7f\x04\0\0\0\0", 6) + slot(1, 1);
  EXPECT_EQ(parse_memory_modules(table).slots, 3) << "nothing counts behind the end";
  for (size_t cut = 0; cut < table.size(); ++cut) (void)parse_memory_modules(table.substr(0, cut));
  write("sys/firmware/dmi/tables/DMI", table);
  expect("memory modules", CheckLevel::warning, "1 of 3 slots filled, 4800 MT/s");
}

}  // namespace
}  // namespace thermocline
