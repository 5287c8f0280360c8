// MachineProfile: what a box can do, in the numbers that a prediction needs. Measured by `thermocline calibrate`, or
// made up from a data sheet for a box that nobody has bought yet. Source: spec/scheduler.md 2.2 and 4.1.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace thermocline::sched {

/// Formats that weights are read in.
enum class WeightFormat { bf16, fp8, mxfp4 };
constexpr std::array<const char*, 3> kWeightFormatNames = {"bf16", "fp8", "mxfp4"};
constexpr std::array<double, 3> kBytesPerWeight = {2, 1 + 1.0 / (128 * 128), 0.5 + 1.0 / 32};

/// What a matrix costs by the number of tokens it is multiplied with: nanoseconds a byte of its weights, at measured
/// points, log-linear between them. Beyond the last point in proportion to the tokens.
class KernelCurve {
 public:
  static constexpr std::array<int, 10> kTokens = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512};
  using Points = std::array<double, kTokens.size()>;
  KernelCurve() = default;
  explicit KernelCurve(const Points& ns_per_byte) : ns_(ns_per_byte) {}
  /// A roof: the bytes at one rate, or the multiplications at another, whichever takes longer.
  ///   flops_per_byte  of one token
  static KernelCurve roof(double bytes_per_second, double flops_per_second, double flops_per_byte);

  /// Nanoseconds a byte for n tokens; n may lie between whole numbers (an average), at least 1.
  double ns_per_byte(double n) const;
  const Points& points() const { return ns_; }

 private:
  Points ns_{};
};

/// Work on a token's elements between products, by all workers: nanoseconds an element of the first token of a step,
/// which shares its regions out badly, and of every further one.
struct ElementCost {
  double first_ns = 0, next_ns = 0;
  double ns(double tokens) const { return first_ns + (tokens > 1 ? tokens - 1 : 0) * next_ns; }
};

/// The processor and its memory.
struct CpuProfile {
  std::string name;
  int nodes = 1, cores = 0;
  double memory_bytes = 0;
  double read_bytes_per_second = 0;                          // of all nodes, each reading its own
  std::array<KernelCurve, 3> weights;                        // by WeightFormat
  double attention_flops_one = 0, attention_flops_many = 0;  // a second: of one token's heads, of a prefill chunk's
  double index_ops_one = 0, index_ops_many = 0;              // integer operations a second over index keys
  ElementCost streams, rows;                                 // by LayerCosts::stream_elements, row_elements
  double region_ns = 0;                                      // what a parallel region costs beyond its work
};

/// One device, and the bus to it.
struct GpuProfile {
  std::string name;
  double memory_bytes = 0;
  std::array<KernelCurve, 3> weights;
  double attention_flops = 0, index_ops = 0, bytes_per_second = 0;
  double kernel_ns = 0;                         // of a launch in a graph
  double h2d_bytes_per_second = 0, h2d_ns = 0;  // pinned copies: rate, and what one costs beyond it
  double cpu_read_share_beside_h2d = 1;         // of CpuProfile::read_bytes_per_second while copies run flat out
  double sync_ns = 0;                           // handing a layer to the CPU and back, without its work
};

struct DiskProfile {
  double read_bytes_per_second = 0;  // at the queue depth we use
  double free_bytes = 0;
};

struct MachineProfile {
  std::string fingerprint;  // of the hardware it was measured on; empty: from a data sheet
  CpuProfile cpu;
  std::vector<GpuProfile> gpus;
  DiskProfile disk;
};

}  // namespace thermocline::sched
