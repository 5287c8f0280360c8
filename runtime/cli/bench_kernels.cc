// `thermocline bench kernels`: one row a target of the CPU path, each a share of what this machine bounds it to. Google
// Benchmark runs them; the peaks are measured right before and after every repetition, in the same process.
#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <chrono>
#include <functional>
#include <random>

#include "runtime/cli/bench_load.h"
#include "runtime/cli/bench_peaks.h"
#include "runtime/cli/command.h"
#include "runtime/cli/model_folder.h"
#include "runtime/engine/context_rigs.h"
#include "runtime/engine/machine_info.h"
#include "runtime/io/file.h"
#include "runtime/model/deepseek_v4/synthesize.h"

namespace thermocline::cli {
namespace {

double bound_seconds(const KernelWork& work, const Peaks& p) {
  return std::max({work.bytes / p.read_bandwidth, work.flops / p.flops, work.int8_ops / p.int8_ops});
}

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
  void measure(KernelRow row, const std::function<KernelWork()>& run, double compute_target = 0) {
    fmt::print(stderr, "measuring: {}\n", row.name);
    const WorkerPool::StepScope scope(cpu_.pool);
    benchmark::RegisterBenchmark(row.name.c_str(),
                                 [&](benchmark::State& state) {
                                   const Clock::time_point warm_up = Clock::now();
                                   run();
                                   const int runs = std::max(1, static_cast<int>(0.04 / seconds_since(warm_up)));
                                   Peaks before = meter_.measure();
                                   for (auto _ : state) {
                                     KernelWork need;
                                     const Clock::time_point start = Clock::now();
                                     for (int i = 0; i < runs; ++i) need += run();
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
  static void record(KernelRow& row, const KernelWork& need, const Peaks& now, double seconds, double compute_target) {
    const double bound = bound_seconds(need, now);
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

Status bench_moe(Bench& bench) {
  const cpu::Activation exact = bench.cpu().table.activation;
  const auto run = [&](const char* model) -> Status {
    TC_ASSIGN(const ModelGeometry g, deepseek_v4::published_geometry(model, 0));
    TC_ASSIGN(
        MoeRig moe,
        MoeRig::create(bench.cpu(), {g.dim, g.moe_inter_dim, g.n_routed_experts, g.n_activated_experts, g.swiglu_limit},
                       uint64_t{4} << 30));
    const auto measure = [&](KernelRow row, int64_t tokens, cpu::Activation activation,
                             double compute_target) -> Status {
      row.name = model + row.name;
      TC_RETURN_IF_ERROR(moe.prepare(tokens, activation));
      bench.measure(
          std::move(row), [&] { return moe.run_uniform(); }, compute_target);
      return {};
    };
    TC_RETURN_IF_ERROR(measure({" MoE layer, MXFP4, M = 1", 0.90}, 1, exact, 0));
    for (const int64_t tokens : {8, 16})
      TC_RETURN_IF_ERROR(measure({" MoE layer, MXFP4, M = " + std::to_string(tokens), 0.85}, tokens, exact, 0.70));
    TC_RETURN_IF_ERROR(measure({" MoE layer, MXFP4, M = 512", 0.65}, 512, exact, 0));
    TC_RETURN_IF_ERROR(measure({" MoE layer, MXFP4, INT8 activations, M = 1", 0.90}, 1, cpu::Activation::int8, 0));
    return measure({" MoE layer, MXFP4, INT8 activations, M = 512", 0.60}, 512, cpu::Activation::int8, 0);
  };
  TC_RETURN_IF_ERROR(run("v4-flash"));
  return run("v4-pro");
}

Status bench_fp8_gemv(Bench& bench) {
  const cpu::PackedShape shape = fp8_shape(4096, 32768);
  TC_ASSIGN(GemmRig gemv, GemmRig::create(bench.cpu(), {shape}, uint64_t{1} << 30));
  TC_RETURN_IF_ERROR(gemv.prepare(1));
  bench.measure({"FP8 GEMV 4096 x 32768, M = 1", 0.90}, [&] { return gemv.run(); });
  return {};
}

Status bench_index_scan(Bench& bench) {
  TC_ASSIGN(IndexRig index, IndexRig::create(bench.cpu(), 256 << 10, 1));
  bench.measure({"index scan, 256 K rows x 64 heads", 0.80}, [&] { return index.scan(); });
  return {};
}

Status bench_attention(Bench& bench, int64_t tokens) {
  const std::string name = "attention, 128 + 512 rows, 64 heads of 512, M = " + std::to_string(tokens);
  for (const bool fp8 : {true, false}) {
    TC_ASSIGN(AttentionRig attention, AttentionRig::create(bench.cpu(), tokens, fp8));
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
  TC_ASSIGN(const std::unique_ptr<Engine> engine, of_model(Engine::open(options)));
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
    KernelWork need;
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
    return KernelWork{static_cast<double>(engine->step().traffic().total_bytes()), 2 * (macs * 512 + head), 0};
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
      "{}\n{}\nSTREAM read {:.1f} GB/s, BF16 peak {:.0f} GFLOP/s, INT8 peak {:.0f} GOP/s, measured around every "
      "repetition\n\n",
      machine_line(machine), bench.cpu().table.to_string(), p.read_bandwidth / 1e9, p.flops / 1e9, p.int8_ops / 1e9);
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
                         {"kernels", bench.cpu().table.to_string()},
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
  add_bench_server(*bench, outcome);
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
