#include "kernels_cpu/kernel_table.h"

namespace thermocline::cpu {

KernelTable make_kernel_table(const CpuFeatures& cpu, Isa max_isa) {
  KernelTable table = scalar::table();
  if (cpu.avx2 && max_isa >= Isa::avx2) avx2::fill(table);
  if (cpu.avx512 && max_isa >= Isa::avx512) avx512::fill(table);
  if (cpu.avx512 && !cpu.fast_bf16_dots() && max_isa >= Isa::avx512) avx512::fill_intel(table);
  if (cpu.amx && max_isa == Isa::amx) amx::fill(table);
  if (cpu.avx2 && max_isa == Isa::amx_emulated) amx_emulated::fill(table);
  return table;
}

GemmKind gemm_kind(const PackedShape& shape) {
  switch (shape.format) {
    case WeightFormat::mxfp4:
      return shape.scale == ScaleFormat::e8m0_rows ? GemmKind::mxfp4_e8m0 : GemmKind::mxfp4_f32;
    case WeightFormat::fp8:
      return GemmKind::fp8_f32;
    case WeightFormat::int8:
      return GemmKind::int8_f32;
    case WeightFormat::int4:
      return GemmKind::int4_f32;
    case WeightFormat::bf16:
      break;
  }
  return GemmKind::bf16;
}

std::string KernelTable::to_string() const {
  return "kernels: " + std::string(isa_name(isa)) +
         (activation == Activation::bf16        ? ", bf16 inputs"
          : activation == Activation::wide_bf16 ? ", bf16 inputs as f32"
                                                : ", f32 inputs") +
         (prefetch ? std::string(", weights asked for ") + prefetch + " ahead" : "");
}

}  // namespace thermocline::cpu
