// `thermocline bench kernels`: one row a target of the CPU path, each a share of what this machine bounds it to. Google
// Benchmark runs them; the peaks are measured right before and after every repetition, in the same process.
#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <random>

#include "kernels_cpu/attention.h"
#include "kernels_cpu/indexer.h"
#include "kernels_cpu/moe.h"
#include "runtime/base/number_formats.h"
#include "runtime/cli/bench_load.h"
#include "runtime/cli/bench_peaks.h"
#include "runtime/cli/command.h"
#include "runtime/engine/machine_info.h"
#include "runtime/io/file.h"
#include "runtime/model/deepseek_v4/synthesize.h"

namespace thermocline::cli {
namespace {

using Clock = std::chrono::steady_clock;
using cpu::Activation;
using cpu::PackedMatrix;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// What one run of a kernel needs of the machine.
struct Need {
  double bytes = 0, flops = 0, int8_ops = 0;
  double bound_seconds(const Peaks& p) const {
    return std::max({bytes / p.read_bandwidth, flops / p.flops, int8_ops / p.int8_ops});
  }
};

/// One line of the table.
struct KernelRow {
  std::string name;
  double target = 0;  // of the share; `at_most`: the share must not exceed it
  bool at_most = false;
  std::string unit = {}, bound = {};  // of value; what bounds it
  std::vector<double> values = {}, shares = {};
  std::string skipped = {};  // why there is no number

  bool measured() const { return !shares.empty(); }
  bool pass() const { return at_most ? median(shares) <= target : median(shares) >= target; }
};

/// The kernels under test and the machine they run on.
class Bench {
 public:
  Bench(WorkerPool& pool, const cpu::KernelTable& table, PeakMeter meter, int repetitions)
      : cpu_{pool, table}, meter_(std::move(meter)), repetitions_(repetitions) {}

  const cpu::CpuContext& cpu() const { return cpu_; }
  Peaks& peaks() { return peaks_; }
  std::vector<KernelRow>& rows() { return rows_; }

  /// A row that has nothing to measure.
  void skip(const char* name) {
    KernelRow row{name};
    row.skipped = "needs --model (synth --like v4-flash --layers 3)";
    rows_.push_back(std::move(row));
  }

  /// Measures `run`, which returns what it needed, by Google Benchmark. compute_target: the share asked for where
  /// multiplications are the bound and not bytes.
  void measure(KernelRow row, const std::function<Need()>& run, double compute_target = 0) {
    fmt::print(stderr, "measuring: {}\n", row.name);
    const WorkerPool::StepScope scope(cpu_.pool);
    benchmark::RegisterBenchmark(row.name.c_str(),
                                 [&](benchmark::State& state) {
                                   const Clock::time_point warm_up = Clock::now();
                                   run();
                                   const int runs = std::max(1, static_cast<int>(0.04 / seconds_since(warm_up)));
                                   Peaks before = meter_.measure();
                                   for (auto _ : state) {
                                     Need need;
                                     const Clock::time_point start = Clock::now();
                                     for (int i = 0; i < runs; ++i) {
                                       const Need one = run();
                                       need.bytes += one.bytes;
                                       need.flops += one.flops;
                                       need.int8_ops += one.int8_ops;
                                     }
                                     const double seconds = seconds_since(start);
                                     state.SetIterationTime(seconds);
                                     const Peaks after = meter_.measure();
                                     Peaks now = before;
                                     now.raise(after);
                                     before = after;
                                     peaks_.raise(now);
                                     record(row, need, now, seconds, compute_target);
                                   }
                                 })
        ->UseManualTime()
        ->Iterations(repetitions_);
    struct : benchmark::BenchmarkReporter {
      bool ReportContext(const Context&) override { return true; }
      void ReportRuns(const std::vector<Run>&) override {}
    } quiet;
    benchmark::RunSpecifiedBenchmarks(&quiet);
    benchmark::ClearRegisteredBenchmarks();
    rows_.push_back(std::move(row));
  }

 private:
  static void record(KernelRow& row, const Need& need, const Peaks& now, double seconds, double compute_target) {
    const double bound = need.bound_seconds(now);
    row.shares.push_back(bound / seconds);
    if (bound == need.bytes / now.read_bandwidth) {
      row.unit = "GB/s";
      row.bound = "STREAM read";
      row.values.push_back(need.bytes / seconds / 1e9);
    } else {
      const bool integer = need.int8_ops > 0;
      row.unit = integer ? "GOP/s" : "GFLOP/s";
      row.bound = integer ? "INT8 peak" : "BF16 peak";
      row.values.push_back((need.flops + need.int8_ops) / seconds / 1e9);
      if (compute_target > 0) row.target = compute_target;
    }
  }

  const cpu::CpuContext cpu_;
  PeakMeter meter_;
  const int repetitions_;
  Peaks peaks_;
  std::vector<KernelRow> rows_;
};

// --- weights and activations of the true shapes, random codes ---

void fill_random(std::byte* data, uint64_t bytes, uint8_t lowest, uint8_t count) {
  constexpr uint64_t kPattern = 1 << 16;
  static const std::vector<uint8_t> pattern = [] {
    std::vector<uint8_t> random_bytes(kPattern);
    std::mt19937 random(1);
    for (uint8_t& b : random_bytes) b = static_cast<uint8_t>(random());
    return random_bytes;
  }();
  for (uint64_t at = 0; at < bytes; ++at) data[at] = static_cast<std::byte>(lowest + pattern[at % kPattern] % count);
}

PackedMatrix mxfp4(int64_t n, int64_t k) {
  PackedMatrix m;
  m.format = cpu::WeightFormat::mxfp4;
  m.scale = cpu::ScaleFormat::e8m0_rows;
  m.n = n;
  m.k = k;
  return m;
}

void place(PackedMatrix& m, std::byte*& at) {
  m.tiles = reinterpret_cast<const uint8_t*>(at);
  m.scales = m.tiles + m.tile_plane_bytes();
  fill_random(at, static_cast<uint64_t>(m.tile_plane_bytes()), 0, 126);  // e4m3 without NaN; any nibbles
  fill_random(at + m.tile_plane_bytes(), static_cast<uint64_t>(m.scale_plane_bytes()), 118, 4);
  at += (m.bytes() + 63) / 64 * 64;
}

std::vector<float> random_rows(int64_t count) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(count));
  for (float& v : x) v = round_bf16(normal(random));
  return x;
}

/// A routed MoE layer: as many distinct experts as kWeightBytes hold; ids beyond share them.
class MoeBench {
 public:
  static constexpr uint64_t kWeightBytes = uint64_t{4} << 30;

  static Result<MoeBench> create(const ModelGeometry& g) {
    MoeBench moe(g);
    cpu::ExpertWeights shape{mxfp4(g.moe_inter_dim, g.dim), mxfp4(g.moe_inter_dim, g.dim),
                             mxfp4(g.dim, g.moe_inter_dim)};
    const int distinct = std::min<int>(g.n_routed_experts, static_cast<int>(kWeightBytes / shape.bytes()));
    TC_ASSIGN(moe.arena_, NumaBuffer::allocate(static_cast<uint64_t>(distinct) * (shape.bytes() + 192)));
    std::byte* at = moe.arena_.data();
    for (int e = 0; e < distinct; ++e) {
      cpu::ExpertWeights expert = shape;
      for (PackedMatrix* m : {&expert.w1, &expert.w3, &expert.w2}) place(*m, at);
      moe.experts_.push_back(expert);
    }
    for (int e = distinct; e < g.n_routed_experts; ++e)
      moe.experts_.push_back(moe.experts_[static_cast<size_t>(e % distinct)]);
    return moe;
  }

  /// Runs layers of `tokens` tokens, each with its own top_k experts drawn uniformly.
  Status measure(Bench& bench, KernelRow row, int64_t tokens, Activation activation, double compute_target) {
    const cpu::CpuContext& c = bench.cpu();
    const int top_k = g_.n_activated_experts;
    TC_ASSIGN(cpu::GemmInput x, cpu::GemmInput::allocate(tokens, g_.dim));
    TC_ASSIGN(cpu::MoeWorkspace workspace,
              cpu::MoeWorkspace::allocate(c.pool.size(), tokens, top_k, g_.n_routed_experts, g_.dim, g_.moe_inter_dim));
    const std::vector<float> rows = random_rows(tokens * g_.dim);
    const cpu::InputFormat format{activation, activation != Activation::int8};
    cpu::prepare(c, TensorView<const float, 2>(rows.data(), {tokens, g_.dim}), format, x);
    std::vector<float> out(static_cast<size_t>(tokens * g_.dim)), weights(static_cast<size_t>(tokens * top_k), 0.25f);
    std::vector<int32_t> ids(weights.size());
    const cpu::MoeOptions options{g_.swiglu_limit, true, format, format};
    bench.measure(
        row,
        [&] {
          Need need;
          need.bytes = static_cast<double>(route(ids, top_k)) * static_cast<double>(experts_[0].bytes());
          const double ops = 2.0 * static_cast<double>(tokens * top_k * 3 * g_.dim * g_.moe_inter_dim);
          (activation == Activation::int8 ? need.int8_ops : need.flops) = ops;
          cpu::moe(c, experts_, nullptr, x, x, {ids.data(), {tokens, top_k}}, {weights.data(), {tokens, top_k}},
                   options, workspace, out.data());
          return need;
        },
        compute_target);
    return {};
  }

 private:
  explicit MoeBench(const ModelGeometry& g) : g_(g) {}

  // Distinct experts a token; returns how many the batch names.
  int64_t route(std::vector<int32_t>& ids, int top_k) {
    std::vector<bool> seen(experts_.size());
    int64_t count = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
      const auto token =
          ids.begin() + static_cast<ptrdiff_t>(i / static_cast<size_t>(top_k) * static_cast<size_t>(top_k));
      const auto at = ids.begin() + static_cast<ptrdiff_t>(i);
      do *at = static_cast<int32_t>(random_() % experts_.size());
      while (std::find(token, at, *at) != at);
      count += !seen[static_cast<size_t>(*at)];
      seen[static_cast<size_t>(*at)] = true;
    }
    return count;
  }

  ModelGeometry g_;
  NumaBuffer arena_;
  std::vector<cpu::ExpertWeights> experts_;
  std::mt19937 random_{3};
};

Status bench_moe(Bench& bench) {
  const Activation exact = bench.cpu().table.activation;
  const auto run = [&](const char* model) -> Status {
    TC_ASSIGN(const ModelGeometry g, deepseek_v4::published_geometry(model, 0));
    TC_ASSIGN(MoeBench moe, MoeBench::create(g));
    const std::string name = std::string(model) + " MoE layer, MXFP4, ";
    TC_RETURN_IF_ERROR(moe.measure(bench, {name + "M = 1", 0.90}, 1, exact, 0));
    for (const int64_t tokens : {8, 16})
      TC_RETURN_IF_ERROR(moe.measure(bench, {name + "M = " + std::to_string(tokens), 0.85}, tokens, exact, 0.70));
    TC_RETURN_IF_ERROR(moe.measure(bench, {name + "M = 512", 0.65}, 512, exact, 0));
    TC_RETURN_IF_ERROR(moe.measure(bench, {name + "INT8 activations, M = 1", 0.90}, 1, Activation::int8, 0));
    return moe.measure(bench, {name + "INT8 activations, M = 512", 0.60}, 512, Activation::int8, 0);
  };
  TC_RETURN_IF_ERROR(run("v4-flash"));
  return run("v4-pro");
}

Status bench_fp8_gemv(Bench& bench) {
  PackedMatrix w;
  w.format = cpu::WeightFormat::fp8;
  w.scale = cpu::ScaleFormat::f32_blocks;
  w.scale_tiles = 4;
  w.n = 4096;
  w.k = 32768;
  std::vector<PackedMatrix> copies(2, w);
  TC_ASSIGN(const NumaBuffer arena, NumaBuffer::allocate(static_cast<uint64_t>(copies.size() * (w.bytes() + 64))));
  std::byte* at = arena.data();
  for (PackedMatrix& copy : copies) {
    place(copy, at);
    for (int64_t i = 0; i < w.scale_plane_bytes() / 4; ++i)
      reinterpret_cast<float*>(const_cast<uint8_t*>(copy.scales))[i] = 0x1p-7f;
  }
  TC_ASSIGN(cpu::GemmInput x, cpu::GemmInput::allocate(1, w.k));
  const std::vector<float> row = random_rows(w.k);
  cpu::prepare(bench.cpu(), TensorView<const float, 2>(row.data(), {1, w.k}), {bench.cpu().table.activation, true}, x);
  std::vector<float> y(static_cast<size_t>(w.n));
  size_t next = 0;
  bench.measure({"FP8 GEMV 4096 x 32768, M = 1", 0.90}, [&] {
    cpu::gemm(bench.cpu(), copies[next++ % copies.size()], x, y.data(), true);
    return Need{static_cast<double>(w.bytes()), 2.0 * static_cast<double>(w.n * w.k), 0};
  });
  return {};
}

Status bench_index_scan(Bench& bench) {
  constexpr int64_t kRows = 256 << 10, kHeads = 64, kDim = 128, kTiles = kDim / 32;
  const int64_t group_bytes = cpu::key_group_bytes(kTiles), groups = kRows / cpu::kKeyGroup;
  TC_ASSIGN(const NumaBuffer keys, NumaBuffer::allocate(static_cast<uint64_t>(groups * group_bytes)));
  std::vector<const uint8_t*> pointers;
  for (int64_t g = 0; g < groups; ++g) {
    std::byte* at = keys.data() + g * group_bytes;
    fill_random(at, kTiles * 256, 0, 255);
    fill_random(at + kTiles * 256, kTiles * 16, 124, 2);
    pointers.push_back(reinterpret_cast<const uint8_t*>(at));
  }
  std::vector<float> q = random_rows(kHeads * kDim), gates = random_rows(kHeads), scores(kRows);
  std::vector<cpu::Int8Chunk> query(kHeads * kTiles);
  for (int64_t h = 0; h < kHeads; ++h) {
    for (int64_t d = 0; d < kDim; ++d)
      q[static_cast<size_t>(h * kDim + d)] = kE2m1[static_cast<size_t>(h * 7 + d * 3) % 16];
    cpu::pack_index_query(&q[static_cast<size_t>(h * kDim)], kDim, &query[static_cast<size_t>(h * kTiles)]);
  }
  bench.measure({"index scan, 256 K rows x 64 heads", 0.80}, [&] {
    bench.cpu().pool.split(groups, [&](int64_t begin, int64_t end, int) {
      bench.cpu().table.index_scores_fp4(query.data(), gates.data(), kHeads, &pointers[static_cast<size_t>(begin)],
                                         end - begin, kTiles, &scores[static_cast<size_t>(begin * cpu::kKeyGroup)]);
    });
    return Need{static_cast<double>(groups * group_bytes), 0, 2.0 * static_cast<double>(kRows * kHeads * kDim)};
  });
  return {};
}

/// Attention as a step does it: FP8 rows are unpacked once a token, by all workers where they are more than the tokens.
class AttentionBench {
 public:
  static Result<AttentionBench> create(const cpu::CpuContext& c, int64_t tokens, bool fp8) {
    AttentionBench a(c, tokens, fp8);
    TC_ASSIGN(a.cache_, NumaBuffer::allocate(static_cast<uint64_t>(kCached * a.row_bytes_)));
    const std::vector<float> values = random_rows(1 << 16);
    for (int64_t r = 0; r < kCached; ++r) {
      const float* row = &values[static_cast<size_t>(r * kDim) % values.size()];
      std::byte* at = a.cache_.data() + r * a.row_bytes_;
      if (fp8) cpu::store_fp8_row(row, kDim - kRope, kRope, reinterpret_cast<uint8_t*>(at));
      for (int64_t d = 0; !fp8 && d < kDim; ++d) reinterpret_cast<bf16*>(at)[d] = float_to_bf16(row[d]);
    }
    a.list_rows();
    return a;
  }

  Need run() {
    read_rows_ = lists_[next_++ % kLists];
    const int64_t workers = c_.pool.size(), units = kHeads / kUnit;
    const bool together = tokens_ <= workers;
    if (fp8_ && together)
      c_.pool.split(tokens_ * kRows, [&](int64_t begin, int64_t end, int) { unpack(begin, end, begin); });
    c_.pool.split(tokens_ * units, [&](int64_t begin, int64_t end, int worker) {
      int64_t unpacked = -1;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t token = i / units, at = (token * kHeads + i % units * kUnit) * kDim;
        if (fp8_ && !together && token != unpacked) unpack(token * kRows, (token + 1) * kRows, worker * kRows);
        unpacked = token;
        float* s = &scratch_[static_cast<size_t>(worker * kUnit * (kRows + kDim))];
        cpu::attention(c_.table,
                       {&q_[static_cast<size_t>(at)], kUnit, &read_rows_[static_cast<size_t>(token * kRows)], kRows,
                        kDim, true, 0.04f, true},
                       sinks_.data(), s, s + kUnit * kRows, &out_[static_cast<size_t>(at)]);
      }
    });
    return Need{0, 4.0 * static_cast<double>(tokens_ * kRows * kHeads * kDim), 0};
  }

 private:
  static constexpr int64_t kRows = 128 + 512, kHeads = 64, kDim = 512, kRope = 64, kUnit = 8, kCached = 1 << 16;
  static constexpr size_t kLists = 8;

  AttentionBench(const cpu::CpuContext& c, int64_t tokens, bool fp8)
      : c_(c),
        tokens_(tokens),
        fp8_(fp8),
        row_bytes_(fp8 ? fp8_row_bytes(kDim, kRope) : kDim * 2),
        q_(random_rows(tokens * kHeads * kDim)),
        sinks_(kHeads, 0.0f),
        out_(q_.size()),
        scratch_(static_cast<size_t>(c.pool.size() * kUnit * (kRows + kDim))),
        unpacked_(static_cast<size_t>(fp8 ? std::max<int64_t>(c.pool.size(), tokens) * kRows * kDim : 0)) {}

  // 128 neighbours, then rows from all over the context in rising order; another choice every run.
  void list_rows() {
    std::mt19937 random(4);
    lists_.assign(kLists, std::vector<const void*>(static_cast<size_t>(tokens_ * kRows)));
    for (auto& rows : lists_)
      for (size_t i = 0; i < rows.size(); ++i) {
        const int64_t r = static_cast<int64_t>(i % kRows);
        const int64_t at =
            r < 128 ? kCached - 128 + r : (r - 128) * (kCached / 512) + static_cast<int64_t>(random() % 100);
        rows[i] = cache_.data() + at * row_bytes_;
      }
  }

  void unpack(int64_t begin, int64_t end, int64_t to) {
    bf16* out = &unpacked_[static_cast<size_t>(to * kDim)];
    const void** rows = &read_rows_[static_cast<size_t>(begin)];
    c_.table.unpack_fp8_rows(rows, end - begin, kDim - kRope, kRope, out);
    for (int64_t i = 0; i < end - begin; ++i) rows[i] = out + i * kDim;
  }

  const cpu::CpuContext c_;
  const int64_t tokens_;
  const bool fp8_;
  const int64_t row_bytes_;
  NumaBuffer cache_;
  std::vector<float> q_, sinks_, out_, scratch_;
  std::vector<bf16> unpacked_;
  std::vector<std::vector<const void*>> lists_;
  std::vector<const void*> read_rows_;  // a list, its rows unpacked
  size_t next_ = 0;
};

Status bench_attention(Bench& bench, int64_t tokens) {
  const std::string name = "attention, 128 + 512 rows, 64 heads of 512, M = " + std::to_string(tokens);
  for (const bool fp8 : {true, false}) {
    TC_ASSIGN(AttentionBench attention, AttentionBench::create(bench.cpu(), tokens, fp8));
    bench.measure({fp8 ? name : name + ", bf16 rows", 0.60}, [&] { return attention.run(); });
  }
  return {};
}

// --- a whole model ---

struct KernelsOptions {
  std::string model, load_model, max_isa = "amx", json_path, topology, filter;
  int threads = 0, repetitions = 7;
  bool check = false;
};

Status bench_model(Bench& bench, const KernelsOptions& o) {
  EngineOptions options;
  options.model = o.model;
  TC_ASSIGN(options.max_isa, parse_isa(o.max_isa));
  options.threads = o.threads;
  options.max_context = 2048;
  TC_ASSIGN(const std::unique_ptr<Engine> engine, Engine::open(options));
  const ModelGeometry& g = engine->geometry();
  const double head = static_cast<double>(g.vocab_size * g.dim),
               macs = static_cast<double>(engine->weights().macs_per_token(g)) - head;
  std::vector<int32_t> ids;
  std::mt19937 random(5);
  for (int i = 0; i < 512; ++i) ids.push_back(static_cast<int32_t>(random() % static_cast<uint64_t>(g.vocab_size)));
  TC_ASSIGN(std::unique_ptr<SequenceKv> sequence, engine->driver().new_sequence());
  Status failed;
  std::vector<double> other;
  bench.measure({"step, decode, batch 1", 0.85}, [&] {
    constexpr int kTokens = 16;
    Need need;
    double reading = 0;
    const Clock::time_point start = Clock::now();
    for (int i = 0; i < kTokens && failed.ok(); ++i) {
      if (sequence->length() >= 1024) {
        sequence.reset();
        sequence = engine->driver().new_sequence().value();
      }
      failed = engine->driver().decode(*sequence, ids[random() % ids.size()]);
      need.bytes += static_cast<double>(engine->step().traffic().total_bytes());
      need.flops += 2 * (macs + head);
      reading += engine->step().traffic().seconds();
    }
    other.push_back(1 - reading / seconds_since(start));
    return need;
  });
  KernelRow rest{"step, decode: what reads no weights", 0.08, true, "%", "of the step"};
  rest.shares = other;
  for (const double share : other) rest.values.push_back(100 * share);
  bench.rows().push_back(std::move(rest));
  bench.measure({"step, prefill 512", 0.60}, [&] {
    sequence.reset();
    sequence = engine->driver().new_sequence().value();
    if (failed.ok()) failed = engine->driver().prefill(*sequence, ids);
    return Need{static_cast<double>(engine->step().traffic().total_bytes()), 2 * (macs * 512 + head), 0};
  });
  return failed;
}

Status bench_loading(Bench& bench, const std::string& folder) {
  for (const bool warm : {false, true}) {
    KernelRow row{std::string("load, page cache ") + (warm ? "warm" : "cold"), 0.70, false, "GB/s", "plain read"};
    fmt::print(stderr, "measuring: {}\n", row.name);
    TC_ASSIGN(const LoadComparison result, compare_loading(folder, warm, bench.cpu().pool.size()));
    row.skipped = result.skipped;
    for (size_t i = 0; i < result.load.size(); ++i) {
      row.values.push_back(result.load[i] / 1e9);
      row.shares.push_back(result.load[i] / result.read[i]);
    }
    bench.rows().push_back(std::move(row));
  }
  return {};
}

// --- output ---

void print_table(const MachineInfo& machine, Bench& bench) {
  const Peaks& p = bench.peaks();
  fmt::print(
      "{}\nSTREAM read {:.1f} GB/s, BF16 peak {:.0f} GFLOP/s, INT8 peak {:.0f} GOP/s, measured around every "
      "repetition\n\n",
      machine_line(machine), p.read_bandwidth / 1e9, p.flops / 1e9, p.int8_ops / 1e9);
  fmt::print("| {:<50} | {:>16} | {:<11} | {:>6} | {:>7} | {:<4} |\n", "bench", "value", "bound", "share", "target",
             "");
  fmt::print("| {:-<50} | {:->15}: | {:-<11} | {:->5}: | {:->6}: | {:-<4} |\n", "", "", "", "", "", "");
  for (const KernelRow& row : bench.rows()) {
    if (!row.measured()) {
      fmt::print("| {:<50} | {:>16} | {:<11} | {:>6} | {:>7} | skip |   {}\n", row.name, "-", row.bound, "-", "-",
                 row.skipped);
      continue;
    }
    fmt::print("| {:<50} | {:>8.1f} {:<7} | {:<11} | {:>4.0f} % | {} {:>3.0f} % | {} |\n", row.name, median(row.values),
               row.unit, row.bound, 100 * median(row.shares), row.at_most ? "<" : ">", 100 * row.target,
               row.pass() ? "pass" : "FAIL");
  }
}

Status write_json(const MachineInfo& machine, Bench& bench, const KernelsOptions& o) {
  Json results = Json::array();
  for (const KernelRow& row : bench.rows()) {
    Json line = {{"name", row.name}, {"target", row.target}, {"at_most", row.at_most}, {"bound", row.bound}};
    if (row.measured()) {
      line["value"] = median(row.values);
      line["unit"] = row.unit;
      line["share"] = median(row.shares);
      line["shares"] = row.shares;
      line["pass"] = row.pass();
    } else {
      line["skipped"] = row.skipped;
    }
    results.push_back(std::move(line));
  }
  const Json document = {{"machine", machine_json(machine)},
                         {"build", build_json()},
                         {"stream_read_bytes_per_second", bench.peaks().read_bandwidth},
                         {"peak_flops", bench.peaks().flops},
                         {"peak_int8_ops", bench.peaks().int8_ops},
                         {"results", results}};
  const std::string text = dump_json(document, 2) + "\n";
  if (o.json_path != "-") return write_text_file(o.json_path, text);
  fmt::print("{}", text);
  return {};
}

Result<int> bench_kernels(const KernelsOptions& o) {
  TC_ASSIGN(const Isa max_isa, parse_isa(o.max_isa));
  if (o.repetitions < 1) return invalid("--repetitions should be at least 1");
  if (o.threads < 0 || o.threads > 4096)
    return invalid("a thread count of " + std::to_string(o.threads) + " is outside 0..4096");
  TC_ASSIGN(const Topology topology, read_topology(o.topology));
  const CpuFeatures cpu = detect_cpu_features();
  const cpu::KernelTable table = cpu::make_kernel_table(cpu, max_isa);
  WorkerPool pool(topology, o.threads);
  TC_ASSIGN(PeakMeter meter, PeakMeter::create(pool, table));
  Bench bench(pool, table, std::move(meter), o.repetitions);
  const auto wanted = [&](std::string_view group) {
    return o.filter.empty() || o.filter.find(group) != std::string::npos;
  };
  if (wanted("moe")) TC_RETURN_IF_ERROR(bench_moe(bench));
  if (wanted("gemv")) TC_RETURN_IF_ERROR(bench_fp8_gemv(bench));
  if (wanted("index")) TC_RETURN_IF_ERROR(bench_index_scan(bench));
  if (wanted("attention"))
    for (const int64_t tokens : {1, 16}) TC_RETURN_IF_ERROR(bench_attention(bench, tokens));
  if (wanted("step")) {
    if (!o.model.empty()) {
      TC_RETURN_IF_ERROR(bench_model(bench, o));
    } else {
      for (const char* name : {"step, decode, batch 1", "step, decode: what reads no weights", "step, prefill 512"})
        bench.skip(name);
    }
  }
  const std::string& load_model = o.load_model.empty() ? o.model : o.load_model;
  if (wanted("load")) {
    if (!load_model.empty()) {
      TC_RETURN_IF_ERROR(bench_loading(bench, load_model));
    } else {
      for (const char* name : {"load, page cache cold", "load, page cache warm"}) bench.skip(name);
    }
  }
  const MachineInfo machine{cpu, topology, table.isa, pool.size()};
  if (o.json_path != "-") print_table(machine, bench);
  if (!o.json_path.empty()) TC_RETURN_IF_ERROR(write_json(machine, bench, o));
  bool missed = false;
  for (const KernelRow& row : bench.rows()) missed |= row.measured() && !row.pass();
  return o.check && missed ? 1 : 0;
}

}  // namespace

void add_bench(CLI::App& app, Outcome& outcome) {
  CLI::App* bench = app.add_subcommand("bench", "Benchmarks");
  bench->require_subcommand(1);
  add_bench_step(*bench, outcome);
  add_bench_kernels(*bench, outcome);
  add_bench_kv(*bench, outcome);
  add_bench_sched(*bench, outcome);
  add_bench_gpu(*bench, outcome);
}

void add_bench_kernels(CLI::App& bench, Outcome& outcome) {
  auto o = std::make_shared<KernelsOptions>();
  CLI::App* command = bench.add_subcommand("kernels", "The CPU kernels, each against its target");
  command->add_option("--model", o->model,
                      "Also whole steps and loading: a checkpoint of V4-Flash's layers, from synth");
  command->add_option("--load-model", o->load_model, "Another checkpoint for loading: one that fits the memory twice");
  command->add_option("--max-isa", o->max_isa, "Highest instruction set to use")->capture_default_str();
  command->add_option("--threads", o->threads, "Worker threads; 0: one per core")->capture_default_str();
  command->add_option("--topology", o->topology, "An hwloc description instead of this machine");
  command->add_option("--only", o->filter, "Some of moe,gemv,index,attention,step,load");
  command->add_option("--repetitions,-r", o->repetitions, "Repetitions; the median counts")->capture_default_str();
  command->add_flag("--check", o->check, "Exit with 1 if a target is missed");
  command->add_option("--json", o->json_path, "Also a JSON document: a file, or - for standard output alone");
  command->callback([o, &outcome] {
    const Result<int> code = bench_kernels(*o);
    outcome.exit_code = code ? *code : exit_code_of(code.error());
  });
}

}  // namespace thermocline::cli
