// Hardware that nobody has measured: a MachineProfile from figures of data sheets and the shares of them that kernels
// and copies reach. Source: spec/scheduler.md 4.1; rates of a core from docs/performance.md.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "scheduler/cost/machine_profile.h"

namespace thermocline::sched {

/// Of the memory bandwidth of a data sheet, what is reached: of a card, and of DRAM.
inline constexpr double kGpuMemoryShare = 0.85, kDramShare = 0.85;
/// Of a measured STREAM read, what a decode step reaches (docs/performance.md).
inline constexpr double kStreamShare = 0.9;

/// A card by its data sheet.
struct GpuSheet {
  const char* name;   // as users write it: "5090"
  const char* title;  // "RTX 5090"
  double memory_bytes;
  double bytes_per_second;      // of its memory, at best
  double h2d_bytes_per_second;  // reached by pinned copies over its PCIe
  double flops;                 // reached by long prefill steps
};

/// By falling age, as error messages list them.
std::span<const GpuSheet> gpu_sheets();
/// By the name that users write, upper and lower case alike; null: none of these.
const GpuSheet* find_gpu_sheet(std::string_view name);
/// By the name a driver gives, such as "NVIDIA GeForce RTX 5090"; null: none of these.
const GpuSheet* gpu_sheet_of_device(std::string_view driver_name);
/// Memory sizes that cards are sold with, rising, in bytes; the first above `bytes`, 0 beyond the last.
double next_gpu_memory(double bytes);

/// Kernels of a processor, by what a core does with them.
enum class CpuKernels { scalar, avx2, avx512, amx };
constexpr std::array<const char*, 4> kCpuKernelNames = {"scalar", "avx2", "avx512", "amx"};
/// Floating-point operations a second of a core in long prefill steps.
double core_flops(CpuKernels kernels);

/// A processor and its memory by their data sheets, or with a bandwidth that was measured.
struct CpuSheet {
  int cores = 1;
  CpuKernels kernels = CpuKernels::avx512;
  int channels = 0;                  // of DDR memory, of all sockets together; 0: the bandwidth was measured
  double megatransfers = 0;          // a second and channel
  double read_bytes_per_second = 0;  // of weights, reached
  double memory_bytes = 0;           // 0: as much as is needed
};
/// Channels x MT/s x 8 bytes x kDramShare.
double dram_bytes_per_second(int channels, double megatransfers);

CpuProfile cpu_profile(const CpuSheet& sheet);
/// The card in a box whose processor reads its memory at this rate.
GpuProfile gpu_profile(const GpuSheet& sheet, double cpu_read_bytes_per_second);
/// What stands for a box of which nothing is known: its CPU reads 100 GB/s, copies to its card reach 25.
MachineProfile modest_server();

}  // namespace thermocline::sched
