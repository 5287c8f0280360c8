// What this CPU can execute, by cpuid, xgetbv and the kernel's AMX permission. Asked once, at start-up.
#pragma once

#include <string>
#include <string_view>

#include "runtime/base/result.h"

namespace thermocline {

/// The instruction-set levels a kernel can be written for, in rising order. The last one runs the AMX kernels on
/// emulated tiles: never chosen by itself, slow, for tests.
enum class Isa { scalar, avx2, avx512, amx, amx_emulated };

std::string_view isa_name(Isa isa);
/// Errors: invalid_argument for anything but scalar, avx2, avx512, amx, amx-emulated.
Result<Isa> parse_isa(std::string_view name);

struct CpuFeatures {
  std::string model;         // the brand string, e.g. "AMD EPYC 9654"
  bool avx2 = false;         // AVX2 + FMA + F16C, with the OS saving ymm
  bool avx512 = false;       // AVX-512 F BW DQ VL + VBMI + VNNI, with the OS saving zmm: what kernels_cpu/avx512 needs
  bool avx512_bf16 = false;  // and vdpbf16ps
  bool amx = false;          // AMX TILE + BF16 + INT8, and Linux granted this process the tile state
  bool intel = false;        // GenuineIntel: some choices go by who made the core

  /// Whether vdpbf16ps is there and faster than two multiply-adds: an Intel core takes twice as long for it.
  bool fast_bf16_dots() const { return avx512_bf16 && !intel; }
  Isa best() const { return amx ? Isa::amx : avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::scalar; }
  /// The instruction sets as one word list, for logs and the bench document.
  std::string to_string() const;
};

/// Reads the features of the CPU this runs on. Asks Linux for the AMX tile state where the CPU has it.
CpuFeatures detect_cpu_features();

}  // namespace thermocline
