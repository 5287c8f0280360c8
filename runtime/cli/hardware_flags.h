// Hardware as users write it: "5090,32GiB", "12x6000", "64 cores, avx512", "7GB/s". Every error says what would be
// right.
#pragma once

#include <string_view>

#include "runtime/base/result.h"
#include "scheduler/cost/hardware_presets.h"

namespace thermocline::cli {

/// "384GiB", "32 GB", "1.5TiB": bytes, above 0 and at most 1 PiB. Errors: invalid_argument.
Result<double> parse_bytes(std::string_view text);
/// "7GB/s", "500 MB/s": bytes a second, above 0 and at most 1 PB. Errors: invalid_argument.
Result<double> parse_rate(std::string_view text);
/// "131072", "128k" (x 1,024), "1M" (x 2^20): tokens, from 1 to 2^30. Errors: invalid_argument.
Result<int64_t> parse_tokens(std::string_view text);
/// A card of the list, its memory another one if said: "5090", "h100", "4090,48GiB". Errors: invalid_argument.
Result<sched::GpuSheet> parse_gpu(std::string_view text);

struct RamFlag {
  int channels = 0;
  double megatransfers = 0;
};
/// "12x6000": channels of all sockets and MT/s. Errors: invalid_argument.
Result<RamFlag> parse_ram(std::string_view text);

struct CpuFlag {
  int cores = 0;
  sched::CpuKernels kernels = sched::CpuKernels::avx512;
};
/// "64 cores, avx512", "64,amx", "16": AVX-512 unless said. Errors: invalid_argument.
Result<CpuFlag> parse_cpu(std::string_view text);

}  // namespace thermocline::cli
