#include "scheduler/cost/hardware_presets.h"

#include <algorithm>
#include <cctype>

namespace thermocline::sched {
namespace {

constexpr double kMiB = 1 << 20, kGiB = 1 << 30;
// Pinned copies over sixteen lanes; 64 and 32 GB/s less headers and flow control.
constexpr double kGen5 = 52e9, kGen4 = 25e9;

// Memory as the driver counts it. Rates: H100 SXM, 5090 and 4090 as in the spec; other data-centre cards half of their
// dense BF16 peak, as an H100 SXM (989 TFLOPS), workstation cards too.
constexpr GpuSheet kSheets[] = {
    {"a6000", "RTX A6000", 49140 * kMiB, 768e9, kGen4, 77e12},
    {"a100-80", "A100 80 GB", 81920 * kMiB, 2039e9, kGen4, 156e12},
    {"4090", "RTX 4090", 24564 * kMiB, 1008e9, kGen4, 120e12},
    {"rtx-6000-ada", "RTX 6000 Ada", 49140 * kMiB, 960e9, kGen4, 180e12},
    {"h100-pcie", "H100 PCIe", 81559 * kMiB, 2039e9, kGen5, 380e12},
    {"h100", "H100 SXM", 81559 * kMiB, 3350e9, kGen5, 500e12},
    {"h200", "H200", 143771 * kMiB, 4800e9, kGen5, 500e12},
    {"5090", "RTX 5090", 32607 * kMiB, 1792e9, kGen5, 200e12},
    {"rtx-pro-6000", "RTX PRO 6000", 97887 * kMiB, 1792e9, kGen5, 250e12},
    {"b200", "B200", 180e9, 8000e9, kGen5, 1125e12},
};

// What drivers call them; the longer name first where one holds another.
struct DriverName {
  const char *part, *sheet;
};
constexpr DriverName kDriverNames[] = {
    {"RTX A6000", "a6000"},
    {"RTX 6000 Ada", "rtx-6000-ada"},
    {"RTX PRO 6000", "rtx-pro-6000"},
    {"A100-SXM4-80", "a100-80"},
    {"A100 80GB", "a100-80"},
    {"A100-PCIE-80", "a100-80"},
    {"H100 PCIe", "h100-pcie"},
    {"H100 80GB HBM3", "h100"},
    {"H200", "h200"},
    {"RTX 4090 Laptop", nullptr},
    {"RTX 5090 Laptop", nullptr},
    {"RTX 4090", "4090"},
    {"RTX 5090", "5090"},
    {"B200", "b200"},
};

// Of a core: in long steps (379 GFLOP/s on two cores with AVX-512; 21 TFLOPS of a socket of 60 with AMX; half the peak
// of AVX2), and of MXFP4 weights at one token.
struct CoreRates {
  double flops, bytes_per_second;
};
constexpr CoreRates kCores[] = {{2e9, 0.5e9}, {45e9, 12e9}, {190e9, 24e9}, {350e9, 24e9}};

// Assumed, none of our kernels has met a card: a launch in a graph, a copy's start, a layer to the CPU and back.
constexpr double kKernelNs = 1000, kCopyNs = 10'000, kSyncNs = 25'000;
constexpr double kRegionNs = 3000;  // to wake some dozens of workers and meet again

const CoreRates& rates(CpuKernels kernels) { return kCores[static_cast<size_t>(kernels)]; }

// Operations of a token on a byte of weights in a format.
double flops_per_byte(size_t format) { return 2 / kBytesPerWeight[format]; }

bool same_name(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](unsigned char x, unsigned char y) { return std::tolower(x) == std::tolower(y); });
}

}  // namespace

std::span<const GpuSheet> gpu_sheets() { return kSheets; }

const GpuSheet* find_gpu_sheet(std::string_view name) {
  for (const GpuSheet& sheet : kSheets)
    if (same_name(sheet.name, name) || same_name(sheet.title, name)) return &sheet;
  return nullptr;
}

const GpuSheet* gpu_sheet_of_device(std::string_view driver_name) {
  for (const DriverName& known : kDriverNames)
    if (driver_name.find(known.part) != std::string_view::npos)
      return known.sheet ? find_gpu_sheet(known.sheet) : nullptr;
  return nullptr;
}

double next_gpu_memory(double bytes) {
  for (const double size : {12 * kGiB, 16 * kGiB, 24 * kGiB, 32 * kGiB, 48 * kGiB, 80 * kGiB, 96 * kGiB, 141e9, 180e9})
    if (size > bytes * 1.05) return size;
  return 0;
}

double core_flops(CpuKernels kernels) { return rates(kernels).flops; }

double dram_bytes_per_second(int channels, double megatransfers) {
  return channels * megatransfers * 1e6 * 8 * kDramShare;
}

CpuProfile cpu_profile(const CpuSheet& sheet) {
  CpuProfile cpu;
  cpu.cores = sheet.cores;
  cpu.memory_bytes = sheet.memory_bytes;
  cpu.read_bytes_per_second =
      std::min(sheet.read_bytes_per_second, sheet.cores * rates(sheet.kernels).bytes_per_second);
  const double flops = sheet.cores * core_flops(sheet.kernels);
  for (size_t f = 0; f < cpu.weights.size(); ++f)
    cpu.weights[f] = KernelCurve::roof(cpu.read_bytes_per_second, flops, flops_per_byte(f));
  // 353 and 259 GFLOP/s, 718 GOP/s where long steps make 379.
  cpu.attention_flops_one = 0.93 * flops;
  cpu.attention_flops_many = 0.68 * flops;
  cpu.index_ops_one = cpu.index_ops_many = 1.9 * flops;
  cpu.region_ns = kRegionNs;
  return cpu;
}

GpuProfile gpu_profile(const GpuSheet& sheet, double cpu_read_bytes_per_second) {
  GpuProfile gpu;
  gpu.name = sheet.title;
  gpu.memory_bytes = sheet.memory_bytes;
  gpu.bytes_per_second = kGpuMemoryShare * sheet.bytes_per_second;
  for (size_t f = 0; f < gpu.weights.size(); ++f)
    gpu.weights[f] = KernelCurve::roof(gpu.bytes_per_second, sheet.flops, flops_per_byte(f));
  gpu.attention_flops = gpu.index_ops = sheet.flops;
  gpu.kernel_ns = kKernelNs;
  gpu.h2d_bytes_per_second = sheet.h2d_bytes_per_second;
  gpu.h2d_ns = kCopyNs;
  gpu.sync_ns = kSyncNs;
  // A copy reads the same memory.
  const double left = cpu_read_bytes_per_second - sheet.h2d_bytes_per_second;
  gpu.cpu_read_share_beside_h2d = std::clamp(left / std::max(cpu_read_bytes_per_second, 1.0), 0.2, 1.0);
  return gpu;
}

MachineProfile modest_server() {
  MachineProfile box;
  box.cpu = cpu_profile({.cores = 16, .read_bytes_per_second = 100e9});
  box.gpus.push_back(gpu_profile(*find_gpu_sheet("4090"), box.cpu.read_bytes_per_second));
  return box;
}

}  // namespace thermocline::sched
