// Loaded models for tests: everything a step needs, with the table, threads and numerics of the test's choice.
#pragma once

#include "runtime/engine/engine.h"
#include "tests/support/fixtures.h"

namespace thermocline::test {

/// What whole models run on: the best there is. In sanitizer builds, which do not optimise all of AVX-512, AVX2.
#ifdef TC_SANITIZED
constexpr Isa kModelIsa = Isa::avx2;
#else
constexpr Isa kModelIsa = Isa::amx;
#endif

struct ModelSetup {
  std::filesystem::path folder = demo_model();
  Numerics numerics = Numerics::published;
  Isa isa = kModelIsa;
  int threads = 2;
  int64_t chunk = 512;
  int sequences = 1;
  bool mtp = false;
  std::string topology = {};
  bool int8 = false;
  int64_t context = 1024;
  int64_t kv_tokens = 0;
  bool kv_below_context = false;
  int64_t prefix_cache_bytes = 0;  // off, so that what is asked twice is computed twice
  std::string device = "none";
  KvDtype kv_dtype = KvDtype::automatic;
  std::filesystem::path kv_disk = {};
  int64_t hot_rows = 0;  // CSA rows of a device in host memory, so many of a layer also on it
};

inline std::unique_ptr<Engine> open_engine(const ModelSetup& setup) {
  EngineOptions options;
  options.model = setup.folder;
  options.numerics = setup.numerics;
  options.max_isa = setup.isa;
  options.threads = setup.threads;
  options.topology = setup.topology;
  options.max_context = setup.context;
  options.max_chunk = options.max_logit_rows = setup.chunk;
  options.max_sequences = setup.sequences;
  options.kv_tokens = setup.kv_tokens;
  options.kv_below_context = setup.kv_below_context;
  options.prefix_cache_bytes = setup.prefix_cache_bytes;
  options.device = setup.device;
  if (setup.device != "none") options.gpu.experts = 60;
  options.kv_dtype = setup.kv_dtype;
  options.kv_offload = setup.hot_rows > 0 ? KvOffload::on : KvOffload::off;
  options.gpu.hot_rows = setup.hot_rows;
  options.kv_disk = {.folder = setup.kv_disk, .space_bytes = 256 << 20};
  options.mtp = setup.mtp;
  options.int8_activations = setup.int8;
  options.quiet = true;
  Result<std::unique_ptr<Engine>> engine = Engine::open(options);
  TC_CHECK(engine.has_value(), engine ? "" : engine.error().message);
  return std::move(*engine);
}

/// The instruction sets this CPU has, and emulated AMX, for suites that run on each.
inline std::vector<Isa> isas() {
  const CpuFeatures cpu = detect_cpu_features();
  std::vector<Isa> list = {Isa::scalar};
  if (cpu.avx2) list.push_back(Isa::avx2);
  if (cpu.avx512) list.push_back(Isa::avx512);
  if (cpu.amx) list.push_back(Isa::amx);
  if (cpu.avx2) list.push_back(Isa::amx_emulated);
  return list;
}

/// Those that suites of whole models run on: all of them, but in sanitizer builds, ten times slower, only kModelIsa.
/// Every kernel runs there by itself on each.
inline std::vector<Isa> model_isas() {
  std::vector<Isa> list = isas();
#ifdef TC_SANITIZED
  list = {list.size() > 1 ? kModelIsa : list[0]};
#endif
  return list;
}

/// isa_name without what a test name cannot hold.
inline std::string isa_test_name(Isa isa) {
  std::string name(isa_name(isa));
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

/// Logits [T, V] of all tokens: prefill in chunks up to `decode_from`, then one at a time.
struct RunLogits {
  std::vector<float> logits, mtp;
};
inline RunLogits run_logits(Engine& engine, const std::vector<int32_t>& ids, int64_t chunk, int64_t decode_from = -1,
                            bool mtp = false) {
  RunLogits out;
  auto sequence = engine.driver().new_sequence().value();
  const int64_t total = static_cast<int64_t>(ids.size()), prefill = decode_from < 0 ? total : decode_from;
  while (sequence->length() < total) {
    const int64_t pos = sequence->length(), count = pos < prefill ? std::min(chunk, prefill - pos) : 1;
    sched::Batch batch;
    batch.add(0, pos, ids.data() + pos, count);
    std::vector<int32_t> next;
    for (int32_t i = 0; i < count; ++i) {
      batch.logit_rows.push_back(i);
      if (mtp) next.push_back(pos + i + 1 < total ? ids[static_cast<size_t>(pos + i + 1)] : -1);
    }
    SequenceKv* const kv = sequence.get();
    const Result<StepReport> status = engine.step().run({batch, std::span(&kv, 1), next});
    TC_CHECK(status.ok(), status.ok() ? "" : status.error().message);
    const auto logits = engine.step().logits(), mtp_logits = engine.step().mtp_logits();
    out.logits.insert(out.logits.end(), logits.data, logits.data + logits.size());
    out.mtp.insert(out.mtp.end(), mtp_logits.data, mtp_logits.data + mtp_logits.size());
  }
  return out;
}

/// The largest |a - b|.
inline double max_difference(const std::vector<float>& a, const std::vector<float>& b, size_t count) {
  double worst = 0;
  for (size_t i = 0; i < count; ++i) worst = std::max(worst, std::fabs(static_cast<double>(a[i]) - b[i]));
  return worst;
}

}  // namespace thermocline::test
