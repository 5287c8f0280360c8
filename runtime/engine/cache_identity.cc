#include "runtime/engine/cache_identity.h"

#include <fmt/format.h>

#include "runtime/io/file.h"
#include "runtime/kv/kv_log_format.h"

namespace thermocline {
namespace {

constexpr uint64_t kChunk = 16 << 20;

KvSum sum_of(std::span<const std::byte> bytes, WorkerPool& pool) {
  std::vector<KvSum> sums((bytes.size() + kChunk - 1) / kChunk);
  pool.split(static_cast<int64_t>(sums.size()), [&](int64_t begin, int64_t end, int) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i)
      sums[i] = kv_sum(bytes.subspan(i * kChunk, std::min<size_t>(kChunk, bytes.size() - i * kChunk)));
  });
  return kv_sum(std::as_bytes(std::span(sums)));
}

}  // namespace

Result<std::string> cache_identity(const EngineOptions& options, const deepseek_v4::Weights& weights,
                                   const cpu::CpuContext& cpu, const KvLayout& layout, const std::string& devices) {
  TC_ASSIGN(const MappedFile program, MappedFile::open("/proc/self/exe"));
  TC_ASSIGN(const std::string config, read_text_file(options.model / "config.json"));
  KvSum sum = sum_of(program.bytes(), cpu.pool);
  std::string text = fmt::format("program {:x}-{:x} ", sum[0], sum[1]);
  sum = kv_sum(std::as_bytes(std::span(config)));
  text += fmt::format("config {:x}-{:x} ", sum[0], sum[1]);
  for (const NumaBuffer& arena : weights.arenas) {
    sum = sum_of({arena.data(), arena.size()}, cpu.pool);
    text += fmt::format("weights {:x}-{:x} ", sum[0], sum[1]);
  }
  return text + fmt::format("numerics {} int8 {} kernels {} device {} {} rows {} pages {} {} rings {}",
                            static_cast<int>(options.numerics), options.int8_activations, cpu.table.to_string(),
                            devices, static_cast<int>(options.gpu.prefill), layout.row_bytes(),
                            layout.window_page_bytes(), layout.compressed_page_bytes(), layout.ring_floats());
}

}  // namespace thermocline
