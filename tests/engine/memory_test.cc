// Engine::open and memory: sizes are known before anything is read, what does not fit is refused by then, and what is
// planned is what is taken.
#include "runtime/engine/engine_memory.h"

#include "kernels_gpu/open_device.h"
#include "runtime/hw/host_memory.h"
#include "runtime/model/deepseek_v4/config.h"
#include "scheduler/cost/hardware_presets.h"
#include "tests/support/long_demo.h"
#include "tests/support/models.h"

namespace thermocline {
namespace {

constexpr int kHost = sched::MemoryPlan::kHost;
constexpr uint64_t kGiB = uint64_t{1} << 30;

/// What Engine::open knows when it plans.
struct Known {
  explicit Known(int sequences, const std::string& topology = "node:1 core:2 pu:1")
      : pool(read_topology(topology).value(), 2) {
    options.max_context = 1024;
    options.max_chunk = 64;
    options.max_sequences = sequences;
    exec.max_tokens = options.max_chunk;
    exec.max_context = options.max_context;
  }
  Result<EngineMemory> plan(uint64_t host_bytes) {
    return plan_engine_memory(options, g, loader, {pool, table}, exec, {}, {host_bytes, "a test"});
  }
  const ModelGeometry g = deepseek_v4::read_config(test::demo_model()).value();
  WorkerPool pool;
  const cpu::KernelTable table = cpu::scalar::table();
  const deepseek_v4::WeightLoader loader =
      deepseek_v4::WeightLoader::open(test::demo_model(), g, {.quiet = true, .threads = 1}).value();
  EngineOptions options;
  ExecOptions exec;
};

TEST(EngineMemory, ThePlanIsWhatIsTaken) {
  Known known(3);
  const EngineMemory memory = known.plan(64 * kGiB).value();
  const HostMemoryLedger ledger;
  const auto kv = KvStore::create(known.g, memory.kv).value();
  EXPECT_EQ(ledger.bytes(), KvStore::bytes(known.g, memory.kv));
  const uint64_t pages = ledger.bytes();
  EXPECT_GT(pages, 0u);
  const StepBuffers buffers = StepBuffers::allocate(known.g, known.exec, known.pool.size()).value();
  EXPECT_EQ(ledger.bytes() - pages, StepBuffers::bytes(known.g, known.exec, known.pool.size()));
  const uint64_t weights = known.loader.arena_bytes() + known.loader.buffer_bytes();
  const uint64_t fixed = ledger.bytes() + weights + (128 << 20);
  EXPECT_GT(memory.prefix_cache_bytes, 0);
  EXPECT_EQ(memory.plan.planned_bytes(kHost), fixed + static_cast<uint64_t>(memory.prefix_cache_bytes));
  // Checkpoints take what is left over, and never what others need.
  known.options.kv_tokens = memory.kv.max_tokens;
  EXPECT_EQ(known.plan(fixed + 800).value().prefix_cache_bytes, 100);
  EXPECT_EQ(known.plan(fixed).value().prefix_cache_bytes, 0);
  known.options.prefix_cache_bytes = 1 << 20;
  EXPECT_FALSE(known.plan(fixed + (1 << 20) - 1)) << "asked for, it is not lowered";
  EXPECT_EQ(known.plan(fixed + (1 << 20)).value().prefix_cache_bytes, 1 << 20);
}

// Compressed pages are one buffer a node, each in whole pages of the system.
TEST(EngineMemory, ThePlanIsWhatIsTakenOnSeveralNodes) {
  Known one(3), two(3, "node:2 core:1 pu:1");
  for (const int64_t tokens : {1024, 5 * 256, 40'000, 200'000}) {
    one.options.kv_tokens = two.options.kv_tokens = tokens;
    const EngineMemory memory = two.plan(64 * kGiB).value();
    EXPECT_EQ(memory.kv.nodes, std::vector<int>(2, -1));
    const HostMemoryLedger ledger;
    const auto kv = KvStore::create(two.g, memory.kv).value();
    EXPECT_EQ(ledger.bytes(), memory.plan.owner_bytes(KvStore::kPlanOwner)) << tokens << " tokens";
    const uint64_t whole = one.plan(64 * kGiB).value().plan.owner_bytes(KvStore::kPlanOwner);
    EXPECT_NEAR(static_cast<double>(ledger.bytes()), static_cast<double>(whole), 2 << 20);
  }
}

TEST(EngineMemory, TheCacheShrinksToWhatFitsButNotBelowOneContext) {
  Known known(64);
  known.options.prefix_cache_bytes = 0;
  const EngineMemory all = known.plan(64 * kGiB).value();
  EXPECT_EQ(all.kv.max_tokens, 64 * 1024);
  known.options.kv_tokens = 1024;
  const uint64_t least = known.plan(64 * kGiB).value().plan.planned_bytes(kHost);
  known.options.kv_tokens = 0;
  const uint64_t most = all.plan.planned_bytes(kHost);
  const EngineMemory half = known.plan((least + most) / 2).value();
  EXPECT_GT(half.kv.max_tokens, 1024);
  EXPECT_LT(half.kv.max_tokens, 64 * 1024);
  EXPECT_LE(half.plan.planned_bytes(kHost), (least + most) / 2);
  known.options.kv_tokens = half.kv.max_tokens + kPageTokens;
  EXPECT_FALSE(known.plan((least + most) / 2)) << "a page more would have fit";
  known.options.kv_tokens = 0;
  const EngineMemory one = known.plan(least).value();  // buffers are mapped in whole 2 MiB, where a page more may fit
  EXPECT_EQ(one.plan.planned_bytes(kHost), least);
  EXPECT_GE(one.kv.max_tokens, 1024);

  const auto refused = known.plan(least - 1);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::out_of_memory);
  for (const char* part : {"weights", "KV pages", "step buffers", "<- does not fit", "--max-model-len", "a test"})
    EXPECT_NE(refused.error().message.find(part), std::string::npos) << part << " in\n" << refused.error().message;
  known.options.kv_tokens = 64 * 1024;  // asked for, it is not lowered
  EXPECT_FALSE(known.plan((least + most) / 2));
  known.options.kv_tokens = 1023;
  EXPECT_EQ(known.plan(64 * kGiB).error().code, ErrorCode::invalid_argument);
  known.options.kv_tokens = int64_t{1} << 62;
  EXPECT_EQ(known.plan(64 * kGiB).error().code, ErrorCode::invalid_argument);
}

/// Bytes of a plan that a KV budget pays for.
uint64_t kv_bytes(const EngineMemory& m) {
  return m.plan.owner_bytes(KvStore::kPlanOwner) + static_cast<uint64_t>(m.prefix_cache_bytes);
}

TEST(EngineMemory, AByteBudgetIsFilledAndNotPassed) {
  constexpr uint64_t kRounding = 2 << 20;  // of a large mapping
  for (const int64_t checkpoints : {int64_t{-1}, int64_t{0}, int64_t{3} << 20})
    for (const uint64_t budget : {uint64_t{8} << 20, uint64_t{12345678}, uint64_t{30} << 20}) {
      Known known(64);
      known.options.prefix_cache_bytes = checkpoints;
      known.options.kv_below_context = true;
      known.options.kv_host_bytes = budget;
      known.options.max_context = known.exec.max_context = int64_t{1} << 20;
      const EngineMemory m = known.plan(64 * kGiB).value();
      const uint64_t page = static_cast<uint64_t>(KvLayout(known.g, m.kv).compressed_page_bytes());
      EXPECT_LE(kv_bytes(m), budget);
      EXPECT_GT(kv_bytes(m) + page + kRounding, budget) << checkpoints << " bytes of checkpoints in " << budget;
      EXPECT_GE(m.kv.max_sequences, 1);
      EXPECT_EQ(m.exec.max_context, (m.kv.max_tokens / kPageTokens + m.kv.max_sequences) * kPageTokens);
      known.options.max_sequences = m.kv.max_sequences;
      known.options.kv_tokens = m.kv.max_tokens;
      EXPECT_EQ(kv_bytes(known.plan(64 * kGiB).value()), kv_bytes(m));
      known.options.kv_tokens += kPageTokens + static_cast<int64_t>(kRounding / page) * kPageTokens;
      EXPECT_EQ(known.plan(64 * kGiB).error().code, ErrorCode::invalid_argument) << "so much more would have fit";
    }
}

TEST(EngineMemory, ALargeBudgetTakesNoMoreThanContextsNeed) {
  Known known(3);
  const EngineMemory whole = known.plan(64 * kGiB).value();
  known.options.kv_host_bytes = 8 * kGiB;
  const EngineMemory m = known.plan(64 * kGiB).value();
  EXPECT_EQ(m.kv.max_tokens, 3 * 1024);
  EXPECT_EQ(m.kv.max_sequences, 3);
  EXPECT_EQ(m.plan.owner_bytes(KvStore::kPlanOwner), whole.plan.owner_bytes(KvStore::kPlanOwner));
  EXPECT_EQ(m.exec.max_context, 1024);
  known.options.kv_host_bytes = 100 << 10;
  EXPECT_EQ(known.plan(64 * kGiB).error().code, ErrorCode::invalid_argument);
}

TEST(EngineMemory, RowsMoveToHostMemoryWhereTheDeviceCannotHoldThem) {
  const auto plan = [](KvOffload offload, uint64_t gpu_bytes, uint64_t host_budget = 0, int experts = 0) {
    Known known(2);
    known.options.max_context = known.exec.max_context = 16384;
    known.options.kv_below_context = true;
    known.options.kv_offload = offload;
    known.options.kv_gpu_bytes = gpu_bytes;
    known.options.kv_host_bytes = host_budget;
    known.options.gpu.experts = experts;
    known.options.prefix_cache_bytes = 0;
    const auto devices = gpu::open_devices(gpu::parse_device("simt:1").value(), uint64_t{256} << 20).value();
    return plan_engine_memory(known.options, known.g, known.loader, {known.pool, known.table}, known.exec, devices,
                              {64 * kGiB, "a test"});
  };
  constexpr uint64_t kMiB = 1 << 20;
  const auto host_rows = [](const EngineMemory& m) { return m.plan.owner_bytes(KvStore::kPlanHostRows); };
  const EngineMemory all = plan(KvOffload::off, 64 * kMiB).value();
  EXPECT_EQ(all.kv.max_tokens, 2 * 16384);
  EXPECT_EQ(all.exec.hot_rows, 0);
  EXPECT_EQ(host_rows(all), 0u);
  EXPECT_EQ(plan(KvOffload::automatic, 64 * kMiB).value().exec.hot_rows, 0) << "all of it fits";
  const EngineMemory on = plan(KvOffload::on, 64 * kMiB).value();
  const ModelGeometry g = deepseek_v4::read_config(test::demo_model()).value();
  EXPECT_EQ(on.exec.hot_rows, 4 * g.index_topk);
  const int64_t pages = pages_of(on.kv.max_tokens, kPageTokens) + on.kv.max_sequences;
  EXPECT_EQ(host_rows(on), static_cast<uint64_t>(pages * KvLayout(g, on.kv).selected_page_bytes()));
  EXPECT_LT(on.plan.owner_bytes(KvStore::kPlanOwner), all.plan.owner_bytes(KvStore::kPlanOwner));

  const uint64_t little = on.plan.owner_bytes(KvStore::kPlanOwner) + kMiB / 8;
  ASSERT_LT(little, all.plan.owner_bytes(KvStore::kPlanOwner));
  const EngineMemory less = plan(KvOffload::off, little).value();
  EXPECT_LT(less.kv.max_tokens, all.kv.max_tokens);
  const EngineMemory moved = plan(KvOffload::automatic, little).value();
  EXPECT_EQ(moved.kv.max_tokens, all.kv.max_tokens);
  EXPECT_GT(moved.exec.hot_rows, 0);
  EXPECT_LE(moved.plan.owner_bytes(KvStore::kPlanOwner), little);
  // What host memory is given is kept too.
  const EngineMemory both = plan(KvOffload::on, little, host_rows(moved) / 2).value();
  EXPECT_LE(host_rows(both), host_rows(moved) / 2);
  EXPECT_LT(both.kv.max_tokens, moved.kv.max_tokens);
  const auto refused = plan(KvOffload::on, little, 1000);
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().message.find("--kv-host-memory"), std::string::npos) << refused.error().message;
}

// Rows and experts want the same bytes: what a CPU takes for what it reads of experts decides.
TEST(EngineMemory, RowsMoveToHostMemoryWhereExpertsMakeMoreOfTheirBytes) {
  Known known(2);
  known.options.max_context = known.exec.max_context = 16384;
  known.options.kv_below_context = true;
  known.options.kv_gpu_bytes = 64 << 20;
  known.options.prefix_cache_bytes = 0;
  known.options.gpu.experts = -1;
  const auto plan = [&](uint64_t device_bytes, KvOffload offload, double cpu_bytes_per_second) {
    known.options.kv_offload = offload;
    known.options.machine = sched::modest_server();
    known.options.machine->cpu = sched::cpu_profile({.cores = 1 << 20, .read_bytes_per_second = cpu_bytes_per_second});
    known.options.machine->gpus[0].sync_ns = 0;
    const auto devices = gpu::open_devices(gpu::parse_device("simt:1").value(), device_bytes).value();
    return plan_engine_memory(known.options, known.g, known.loader, {known.pool, known.table}, known.exec, devices,
                              {64 * kGiB, "a test"})
        .value();
  };
  const uint64_t without_experts = plan(uint64_t{256} << 20, KvOffload::off, 1e9).plan.planned_bytes(0);
  const uint64_t some = without_experts + (2 << 20), all = uint64_t{256} << 20;
  EXPECT_GT(plan(some, KvOffload::automatic, 1e8).exec.hot_rows, 0) << "a slow CPU";
  EXPECT_EQ(plan(some, KvOffload::automatic, 1e14).exec.hot_rows, 0) << "experts are free";
  EXPECT_EQ(plan(all, KvOffload::automatic, 1e8).exec.hot_rows, 0) << "all experts are there";
}

TEST(EngineMemory, ASmallBudgetHoldsFewerSequences) {
  Known known(64);
  known.options.kv_below_context = true;
  int sequences = 0;
  for (const uint64_t budget : {4 << 20, 12 << 20, 96 << 20}) {
    known.options.kv_host_bytes = budget;
    const EngineMemory m = known.plan(64 * kGiB).value();
    EXPECT_GT(m.kv.max_sequences, sequences) << budget;
    sequences = m.kv.max_sequences;
  }
  EXPECT_EQ(sequences, 64);
}

TEST(EngineMemory, TooSmallABudgetIsRefusedWithTheSmallestThatDoes) {
  for (const int64_t checkpoints : {int64_t{-1}, int64_t{0}, int64_t{3} << 20}) {
    Known known(64);
    known.options.prefix_cache_bytes = checkpoints;
    known.options.kv_below_context = true;
    known.options.kv_host_bytes = 100 << 10;
    const auto refused = known.plan(64 * kGiB);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, ErrorCode::invalid_argument);
    const std::string& text = refused.error().message;
    EXPECT_EQ(text.find("--kv-host-memory is 0.1 MiB, and a KV cache of 256 tokens and 1 sequence takes "), 0u) << text;
    const size_t at = text.find("give at least ");
    ASSERT_NE(at, std::string::npos) << text;
    const uint64_t least = std::stoull(text.substr(at + 14));
    known.options.kv_host_bytes = least << 20;
    EXPECT_TRUE(known.plan(64 * kGiB)) << text;
    known.options.kv_host_bytes = (least - 1) << 20;
    EXPECT_TRUE(least == 1 || !known.plan(64 * kGiB)) << text;
  }
  Known known(2);
  known.options.kv_host_bytes = 512 << 20;
  EXPECT_EQ(known.plan(64 << 20).error().code, ErrorCode::out_of_memory) << "asked for, it is not lowered";
}

TEST(EngineMemory, BelowAContextTheCacheShrinksToAStep) {
  Known known(64);
  known.options.prefix_cache_bytes = 0;
  known.options.kv_below_context = true;
  known.options.kv_tokens = kPageTokens;
  const uint64_t least = known.plan(64 * kGiB).value().plan.planned_bytes(kHost);
  known.options.kv_tokens = 0;
  EXPECT_EQ(known.plan(least).value().plan.planned_bytes(kHost), least);
  EXPECT_EQ(known.plan(least - 1).error().code, ErrorCode::out_of_memory);
  known.options.kv_tokens = kPageTokens - 1;
  EXPECT_EQ(known.plan(64 * kGiB).error().code, ErrorCode::invalid_argument);
}

// On a small machine nothing that is allocated for steps is as long as a context that the cache cannot hold.
TEST(EngineMemory, StepBuffersAreAsLongAsTheCacheAllows) {
  Known known(64);
  known.options.kv_below_context = true;
  known.options.max_context = known.exec.max_context = int64_t{1} << 20;
  known.options.kv_host_bytes = 16 << 20;
  const EngineMemory m = known.plan(64 * kGiB).value();
  EXPECT_LT(m.exec.max_context, known.exec.max_context);
  EXPECT_LT(StepBuffers::bytes(known.g, m.exec, known.pool.size()),
            StepBuffers::bytes(known.g, known.exec, known.pool.size()));
}

// Sequences that are as long as they may be, decoding and prefilling in every mixture, never lack a window page.
TEST(EngineMemory, WindowPagesSufficeForEveryStep) {
  Known known(5);
  const EngineMemory memory = known.plan(64 * kGiB).value();
  const auto cache = KvStore::create(known.g, memory.kv).value();
  std::vector<std::unique_ptr<SequenceKv>> sequences;
  for (int i = 0; i < 5; ++i) sequences.push_back(cache->new_sequence().value());
  std::mt19937 random(3);
  for (int step = 0; step < 400; ++step) {
    int64_t budget = memory.kv.max_chunk;
    std::vector<std::pair<SequenceKv*, int64_t>> rows;
    for (auto& kv : sequences) {
      if (kv->length() == 1024) {
        kv.reset();
        kv = cache->new_sequence().value();
      }
      const int64_t count =
          std::min({budget, 1024 - kv->length(), random() % 2 ? 1 : static_cast<int64_t>(random() % 64)});
      ASSERT_TRUE(kv->reserve(count).ok()) << "step " << step << " of length " << kv->length();
      budget -= count;
      rows.emplace_back(kv.get(), count);
    }
    for (const auto& [kv, count] : rows) kv->commit(count);
  }
}

TEST(EngineOpen, KvMemoryOfDevicesIsABudgetOfItsOwn) {
  EngineOptions options;
  options.model = test::long_demo();
  options.device = "simt:2";
  options.max_context = int64_t{1} << 20;
  options.max_chunk = 32;
  options.max_sequences = 4;
  options.threads = 1;
  options.quiet = true;
  options.gpu.experts = 0;
  options.kv_below_context = true;
  options.kv_offload = KvOffload::off;
  options.kv_gpu_bytes = 1 << 10;
  const auto refused = Engine::open(options);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::invalid_argument);
  EXPECT_NE(refused.error().message.find("--kv-gpu-memory is 0.0 MiB"), std::string::npos) << refused.error().message;
  options.kv_gpu_bytes = 2 << 20;
  options.kv_host_bytes = 1 << 20;
  const auto engine = Engine::open(options);
  ASSERT_TRUE(engine) << engine.error().message;
  EXPECT_LT((*engine)->max_context(), 10000);
  EXPECT_EQ((*engine)->max_context() % kPageTokens, 0);
  EXPECT_LT((*engine)->options().max_sequences, 4);
  EXPECT_EQ((*engine)->options().prefix_cache_bytes, 1 << 20) << "the host's part is for checkpoints alone";
  options.kv_offload = KvOffload::automatic;
  const auto offloaded = Engine::open(options);
  ASSERT_TRUE(offloaded) << offloaded.error().message;
  EXPECT_EQ((*offloaded)->options().prefix_cache_bytes, 1 << 17) << "of the host's part most is for rows";
  options.kv_offload = KvOffload::off;
  options.prefix_cache_bytes = 2 << 20;
  EXPECT_EQ(Engine::open(options).error().code, ErrorCode::invalid_argument);
}

TEST(EngineOpen, RefusesBeforeItReads) {
  EngineOptions options;
  options.model = test::demo_model();
  options.max_context = 512;
  options.threads = 1;
  options.quiet = true;
  int told = 0;
  options.progress = [&](double) { ++told; };
  EngineOptions other = options;
  other.device = "simt";
  other.int8_activations = true;
  EXPECT_EQ(Engine::open(other).error().code, ErrorCode::unsupported);
  other = options;
  other.device = "simt";
  other.gpu_memory = 1 << 20;
  const auto small = Engine::open(other);
  ASSERT_FALSE(small);
  EXPECT_EQ(small.error().code, ErrorCode::out_of_memory);
  EXPECT_NE(small.error().message.find("what does not fit: dense weights"), std::string::npos) << small.error().message;
  other = options;
  other.kv_tokens = int64_t{1} << 38;
  EXPECT_EQ(Engine::open(other).error().code, ErrorCode::out_of_memory);
  EXPECT_EQ(told, 0) << "weights were read";
  std::atomic<bool> cancel{true};
  options.cancel = &cancel;
  EXPECT_EQ(Engine::open(options).error().code, ErrorCode::cancelled);
  cancel = false;
  EXPECT_TRUE(Engine::open(options));
  EXPECT_GT(told, 0);
}

}  // namespace
}  // namespace thermocline
