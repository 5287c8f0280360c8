#include "runtime/hw/cpu_features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace thermocline {
namespace {

constexpr std::string_view kIsaNames[] = {"scalar", "avx2", "avx512", "amx", "amx-emulated"};

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

uint64_t saved_states() {  // XCR0: which register files the OS saves on a context switch
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

bool request_amx_permission() {
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

bool is_intel() {
  const Registers r = cpuid(0);
  char vendor[12];
  std::memcpy(vendor, &r.ebx, 4);
  std::memcpy(vendor + 4, &r.edx, 4);
  std::memcpy(vendor + 8, &r.ecx, 4);
  return std::string_view(vendor, sizeof vendor) == "GenuineIntel";
}

std::string brand_string() {
  char text[49] = {};
  for (uint32_t i = 0; i < 3; ++i) {
    const Registers r = cpuid(0x80000002u + i);
    std::memcpy(text + 16 * i, &r, 16);
  }
  std::string brand = text;
  const size_t first = brand.find_first_not_of(' ');
  return first == std::string::npos ? "unknown x86-64" : brand.substr(first, brand.find_last_not_of(" \0") - first + 1);
}

}  // namespace

std::string_view isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

Result<Isa> parse_isa(std::string_view name) {
  for (int i = 0; i < 5; ++i)
    if (kIsaNames[i] == name) return static_cast<Isa>(i);
  return invalid("unknown instruction set '" + std::string(name) + "': use scalar, avx2, avx512, amx or amx-emulated");
}

std::string CpuFeatures::to_string() const {
  std::string text = "x86-64";
  if (avx2) text += " avx2";
  if (avx512) text += " avx512-vnni";
  if (avx512_bf16) text += " avx512-bf16";
  if (amx) text += " amx";
  return text;
}

CpuFeatures detect_cpu_features() {
  CpuFeatures features;
  features.model = brand_string();
  features.intel = is_intel();
  const Registers leaf1 = cpuid(1), leaf7 = cpuid(7), leaf7_1 = cpuid(7, 1);
  if (!bit(leaf1.ecx, 27)) return features;  // OSXSAVE
  const uint64_t states = saved_states();
  const bool ymm = (states & 0x6u) == 0x6u, zmm = (states & 0xe6u) == 0xe6u, tiles = (states & 0x60000u) == 0x60000u;
  features.avx2 = ymm && bit(leaf7.ebx, 5) && bit(leaf1.ecx, 12) && bit(leaf1.ecx, 29);
  const bool avx512_base = bit(leaf7.ebx, 16) && bit(leaf7.ebx, 17) && bit(leaf7.ebx, 30) && bit(leaf7.ebx, 31);
  features.avx512 = features.avx2 && zmm && avx512_base && bit(leaf7.ecx, 1) && bit(leaf7.ecx, 11);
  features.avx512_bf16 = features.avx512 && bit(leaf7_1.eax, 5);
  const bool amx_cpu = bit(leaf7.edx, 22) && bit(leaf7.edx, 24) && bit(leaf7.edx, 25);
  features.amx = features.avx512_bf16 && tiles && amx_cpu && request_amx_permission();
  return features;
}

}  // namespace thermocline
