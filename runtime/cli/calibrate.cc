// `thermocline calibrate`: takes this machine's measure, prints it, and keeps it for predictions.
#include "runtime/engine/calibrate.h"

#include <fmt/format.h>
#include <unistd.h>

#include "kernels_gpu/open_device.h"
#include "runtime/cli/command.h"
#include "runtime/cli/machine_checks.h"
#include "runtime/engine/stored_profile.h"
#include "scheduler/cost/hardware_presets.h"

namespace thermocline::cli {
namespace {

struct CalibrateFlags {
  std::string out, max_isa = "amx", topology, disk_folder, device = "auto";
  int threads = 0;
  bool quick = false;
};

// On a terminal one line that changes; elsewhere a line for each thing, once.
class CalibrateProgress {
 public:
  void operator()(const std::string& what, double share) {
    if (terminal_)
      fmt::print(stderr, "\rcalibrating: {:>3.0f} % {}\033[K", 100 * share, what);
    else if (share == 0 || static_cast<int>(10 * share) != tenth_)
      fmt::print(stderr, "calibrating: {:.0f} % {}\n", 100 * share, what);
    tenth_ = static_cast<int>(10 * share);
  }
  void end() const {
    if (terminal_) fmt::print(stderr, "\r\033[K");
  }

 private:
  const bool terminal_ = isatty(STDERR_FILENO) == 1;
  int tenth_ = 0;
};

void print_rates(const Calibration& c) {
  const sched::CpuProfile& cpu = c.profile.cpu;
  fmt::print("memory, STREAM read   {:.1f} GB/s", cpu.read_bytes_per_second / 1e9);
  for (const ThreadRate& rate : c.by_threads)
    if (rate.threads < cpu.cores)
      fmt::print("; {} thread{} {:.1f}", rate.threads, rate.threads == 1 ? "" : "s", rate.bytes_per_second / 1e9);
  fmt::print("; 95 % of the best from {} on\n", c.saturated_by());
  for (size_t node = 0; node < c.by_node.size(); ++node)
    fmt::print("  node {:<3} alone        {:.1f} GB/s\n", node, c.by_node[node] / 1e9);
  fmt::print("instructions          {:.0f} GFLOP/s, {:.0f} GOP/s in INT8\n", c.peak_flops / 1e9, c.peak_int8_ops / 1e9);
  if (c.profile.disk.read_bytes_per_second > 0)
    fmt::print("disk                  {:.2f} GB/s, {:.0f} GB free\n", c.profile.disk.read_bytes_per_second / 1e9,
               c.profile.disk.free_bytes / 1e9);
}

// A curve's points: the rate its bytes come at, and the share of what bounds it.
void print_curves(const std::array<sched::KernelCurve, 3>& weights, double bytes_per_second, double flops) {
  fmt::print("\n| {:<22} |", "GB/s of weights");
  for (const int n : sched::KernelCurve::kTokens) fmt::print(" {:>6} |", n);
  fmt::print("\n| {:-<22} |", "");
  for (size_t i = 0; i < sched::KernelCurve::kTokens.size(); ++i) fmt::print(" {:->5}: |", "");
  constexpr const char* kNames[] = {"BF16 matrices", "FP8 matrices", "experts, MXFP4"};
  for (const size_t f : {size_t{2}, size_t{1}, size_t{0}}) {
    fmt::print("\n| {:<22} |", kNames[f]);
    for (const double ns : weights[f].points()) fmt::print(" {:>6.1f} |", 1 / ns);
    fmt::print("\n| {:<22} |", "  % of what bounds it");
    for (size_t i = 0; i < sched::KernelCurve::kTokens.size(); ++i) {
      const double flops_per_byte = 2 * sched::KernelCurve::kTokens[i] / sched::kBytesPerWeight[f];
      const double bound_ns = 1e9 * std::max(1 / bytes_per_second, flops_per_byte / flops);
      fmt::print(" {:>6.0f} |", 100 * bound_ns / weights[f].points()[i]);
    }
  }
  fmt::print("\n\n");
}

void print_rest(const Calibration& c) {
  const sched::CpuProfile& cpu = c.profile.cpu;
  const auto rate = [](const char* name, double one, double many, double peak, const char* unit) {
    fmt::print("{:<22}{:.0f} {} for one token, {:.0f} for a chunk: {:.0f} and {:.0f} % of the peak\n", name, one / 1e9,
               unit, many / 1e9, 100 * one / peak, 100 * many / peak);
  };
  rate("attention", cpu.attention_flops_one, cpu.attention_flops_many, c.peak_flops, "GFLOP/s");
  rate("index", cpu.index_ops_one, cpu.index_ops_many, c.peak_int8_ops, "GOP/s");
  fmt::print("{:<22}{:.2f} ns an element, {:.2f} of every further token; rows {:.2f}, {:.2f}\n", "residual streams",
             cpu.streams.first_ns, cpu.streams.next_ns, cpu.rows.first_ns, cpu.rows.next_ns);
  fmt::print("{:<22}{:.2f} us, {:.1f} us when workers sleep\n", "parallel region", cpu.region_ns / 1e3,
             c.parked_region_ns / 1e3);
}

// ", 85 % of the 3350 GB/s of its data sheet" where that is known.
std::string share_of(double value, double nominal, const char* unit, double scale, const char* whose) {
  return nominal > 0
             ? fmt::format(", {:.0f} % of the {:.0f} {} {}", 100 * value / nominal, nominal / scale, unit, whose)
             : "";
}

void print_device(const DeviceCalibration& d) {
  const sched::GpuProfile& gpu = d.profile;
  const sched::GpuSheet* const known = sched::gpu_sheet_of_device(gpu.name);
  const sched::GpuSheet sheet = known ? *known : sched::GpuSheet{};
  const auto us = [](double ns) { return ns / 1e3; };
  fmt::print("\n{}, {:.1f} GiB\n", gpu.name, gpu.memory_bytes / (1 << 30));
  fmt::print("{:<22}{:.1f} GB/s{}\n", "its memory", gpu.bytes_per_second / 1e9,
             share_of(gpu.bytes_per_second, sheet.bytes_per_second, "GB/s", 1e9, "of its data sheet"));
  fmt::print("{:<22}{:.2f} GB/s, each {:.1f} us besides{}\n", "copies to it", gpu.h2d_bytes_per_second / 1e9,
             us(gpu.h2d_ns),
             share_of(gpu.h2d_bytes_per_second, sheet.h2d_bytes_per_second, "GB/s", 1e9, "its PCIe lets through"));
  fmt::print("{:<22}{:.0f} % of what they read alone\n", "CPU reads beside them", 100 * gpu.cpu_read_share_beside_h2d);
  fmt::print("{:<22}{:.1f} us, p99 {:.1f}; {:.1f} us when workers sleep, p99 {:.1f}\n", "to the CPU and back",
             us(gpu.sync_ns), us(d.sync_p99_ns), us(d.parked_sync_ns), us(d.parked_sync_p99_ns));
  fmt::print("{:<22}{:.2f} us in a graph\n", "a launch", us(gpu.kernel_ns));
  const auto rate = [&](const char* name, double value, const char* unit) {
    fmt::print("{:<22}{:.3f} {}{}\n", name, value / 1e12, unit,
               share_of(value, sheet.flops, "TFLOP/s", 1e12, "assumed of long steps"));
  };
  rate("attention", gpu.attention_flops, "TFLOP/s");
  rate("index", gpu.index_ops, "TOP/s");
  print_curves(gpu.weights, gpu.bytes_per_second, known ? sheet.flops : 1e18);
}

// Returns what became of the numbers. The interpreter's are no profile of the machine: in a file that was asked for
// they have no fingerprint, so that they count for what names them alone.
Result<std::string> store(const std::filesystem::path& path, Calibration& measured, const MachineInfo& machine,
                          bool asked) {
  const bool interpreted = std::any_of(measured.devices.begin(), measured.devices.end(),
                                       [](const DeviceCalibration& device) { return device.interpreted; });
  if (interpreted && !asked)
    return std::string("not stored: the SIMT interpreter's numbers are those of no card (--out writes them to a file)");
  if (!interpreted) measured.profile.fingerprint = fingerprint_of(machine);
  TC_RETURN_IF_ERROR(store_profile(path, measured.profile, hardware_line(machine)));
  return fmt::format("stored in {}{}", path.string(),
                     interpreted ? ", of no machine: the SIMT interpreter's numbers are those of no card" : "");
}

Result<std::vector<std::unique_ptr<gpu::Device>>> devices_of(const std::string& flag) {
  TC_ASSIGN(const gpu::DeviceChoice choice, gpu::parse_device(flag));
  return gpu::open_devices(choice, 0);
}

Status run_calibrate(const CalibrateFlags& flags) {
  TC_ASSIGN(const Isa max_isa, parse_isa(flags.max_isa));
  if (flags.threads < 0 || flags.threads > 4096)
    return invalid("a thread count of " + std::to_string(flags.threads) + " is outside 0..4096");
  TC_ASSIGN(const Topology topology, read_topology(flags.topology));
  const CpuFeatures features = detect_cpu_features();
  const cpu::KernelTable table = cpu::make_kernel_table(features, max_isa);
  WorkerPool pool(topology, flags.threads);
  const MachineInfo machine{features, topology, table.isa, pool.size()};
  std::filesystem::path path = flags.out;
  if (path.empty()) {
    if (profile_folder().empty())
      return invalid("neither HOME nor XDG_CACHE_HOME is set: say where to write with --out");
    path = profile_path(profile_folder(), fingerprint_of(machine));
  }
  // What cannot work is said before a minute is spent.
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return invalid("--out " + path.string() + " is a folder, not a file");
  if (!flags.disk_folder.empty() && !std::filesystem::is_directory(flags.disk_folder, error))
    return invalid("--dir " + flags.disk_folder + " is no folder");
  TC_ASSIGN(const std::vector<std::unique_ptr<gpu::Device>> devices, devices_of(flags.device));

  auto progress = std::make_shared<CalibrateProgress>();
  CalibrateOptions options{.quick = flags.quick, .disk_folder = flags.disk_folder, .devices = devices};
  options.progress = [progress](const std::string& what, double share) { (*progress)(what, share); };
  Result<Calibration> measured = calibrate(topology, features.model, {pool, table}, options);
  progress->end();
  if (!measured) return std::move(measured).error();
  TC_ASSIGN(const std::string stored, store(path, *measured, machine, !flags.out.empty()));

  fmt::print("{}\n", hardware_line(machine));
  print_rates(*measured);
  print_curves(measured->profile.cpu.weights, measured->profile.cpu.read_bytes_per_second, measured->peak_flops);
  print_rest(*measured);
  for (const DeviceCalibration& device : measured->devices) print_device(device);
  if (flags.quick) fmt::print("quick: small shapes, measured once; rough\n");
  fmt::print("{}\n", stored);
  for (const std::string& note : measured->notes) fmt::print("warning: {}\n", note);
  print_checks(check_machine(machine), false);
  return {};
}

}  // namespace

void add_calibrate(CLI::App& app, Outcome& outcome) {
  auto flags = std::make_shared<CalibrateFlags>();
  CLI::App* command =
      app.add_subcommand("calibrate",
                         "Measure this machine and its cards, for predictions (docs/calibration.md); less "
                         "than two minutes");
  command->add_option("--out", flags->out, "The file to write instead of one in ~/.cache/thermocline");
  command->add_flag("--quick", flags->quick, "Small shapes, measured once: seconds, and rough");
  command->add_option("--dir", flags->disk_folder, "Also the disk of this folder, such as serve's --kv-disk-dir");
  command
      ->add_option(
          "--device", flags->device,
          "What is measured beside the CPU: auto (the cards there are), cuda, cuda:2 for two cards, none; simt "
          "shows that all works, and is stored only with --out")
      ->capture_default_str();
  command->add_option("--threads", flags->threads, "Worker threads; 0: one per core")->capture_default_str();
  command->add_option("--max-isa", flags->max_isa, "Highest instruction set to use")->capture_default_str();
  command->add_option("--topology", flags->topology, "An hwloc description instead of this machine");
  command->callback([flags, &outcome] { outcome.exit_code = exit_code_of(run_calibrate(*flags)); });
}

}  // namespace thermocline::cli
