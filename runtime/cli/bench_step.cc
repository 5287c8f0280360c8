// `thermocline bench step`: prefill (pp) and decode (tg) speed of a model, each against what this machine bounds it to.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "runtime/cli/bench_peaks.h"
#include "runtime/cli/command.h"
#include "runtime/cli/model_folder.h"
#include "runtime/cli/prediction.h"
#include "runtime/engine/machine_info.h"
#include "runtime/engine/model_costs.h"
#include "runtime/engine/stored_profile.h"
#include "runtime/io/file.h"
#include "runtime/kv/synthetic_rows.h"
#include "scheduler/cost/cost_model.h"

namespace thermocline::cli {
namespace {

using Clock = std::chrono::steady_clock;

struct BenchOptions {
  ModelOptions model;
  std::vector<int64_t> prefill = {512}, decode = {64}, batch = {1}, fill_kv;
  int64_t chunk = 512;
  int repetitions = 3;
  std::string json_path, profile_path;
};

struct StepRow {
  const char* kind;
  int64_t tokens = 0;                // of each sequence
  int64_t batch = 1;                 // sequences of a step
  int64_t context = 0;               // tokens that a sequence ends with; 0: its own alone
  std::vector<double> seconds = {};  // one per repetition
  std::vector<double> shares = {};   // of the bound measured right before that repetition
  double bytes_per_token = 0;        // of weights
  double kv_bytes_per_token = 0;     // read of the KV cache, at the end of a long context
  double bound_tokens_per_second = 0;
  double predicted_tokens_per_second = 0;  // by the cost model; 0: there is no profile of this box
  ForecastStats forecast = {};             // of the repetitions' steps
};

/// Seconds and weight bytes of one repetition.
struct Sample {
  double seconds = 0, bytes = 0;
};

// Token ids from a fixed generator: routing should see the variety of a text, not one token.
std::vector<int32_t> random_ids(int64_t count, int64_t vocab) {
  std::vector<int32_t> ids;
  uint64_t state = 42;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    ids.push_back(static_cast<int32_t>((state >> 33) % static_cast<uint64_t>(vocab)));
  }
  return ids;
}

// One token of every sequence a step, each of them with a text of its own, behind a context of synthetic rows if any.
Result<Sample> decode_together(Engine& engine, const StepRow& row) {
  const int64_t vocab = engine.geometry().vocab_size, filled = row.context > 0 ? row.context - row.tokens - 1 : 0;
  const std::vector<int32_t> ids = random_ids((row.tokens + 1) * row.batch, vocab);
  std::vector<std::unique_ptr<SequenceKv>> sequences;
  std::vector<SequenceKv*> kv;
  for (int64_t s = 0; s < row.batch; ++s) {
    TC_ASSIGN(std::unique_ptr<SequenceKv> sequence,
              synthetic_sequence(engine.driver().kv(), engine.geometry(), engine.pool(), filled,
                                 static_cast<uint32_t>(1000 * s)));
    kv.push_back(sequence.get());
    sequences.push_back(std::move(sequence));
  }
  Sample sample;
  Clock::time_point start;
  for (int64_t t = 0; t <= row.tokens; ++t) {
    if (t == 1) start = Clock::now();  // the first token is their prompt
    sched::Batch batch;
    for (int64_t s = 0; s < row.batch; ++s) {
      batch.add(static_cast<int>(s), filled + t, &ids[static_cast<size_t>(t * row.batch + s)], 1);
      batch.logit_rows.push_back(static_cast<int32_t>(s));
    }
    TC_RETURN_IF_ERROR(engine.step().run({batch, kv}));
    if (t > 0) sample.bytes += static_cast<double>(engine.step().traffic().total_bytes());
  }
  sample.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  return sample;
}

Result<Sample> run_once(Engine& engine, const StepRow& row) {
  const bool prefill = std::string_view(row.kind) == "prefill";
  if (!prefill && (row.batch > 1 || row.context > 0)) return decode_together(engine, row);
  const std::vector<int32_t> ids = random_ids(row.tokens + 1, engine.geometry().vocab_size);
  TC_ASSIGN(const std::unique_ptr<SequenceKv> sequence,
            synthetic_sequence(engine.driver().kv(), engine.geometry(), engine.pool(),
                               row.context > 0 ? row.context - row.tokens : 0));
  if (!prefill) TC_RETURN_IF_ERROR(engine.driver().decode(*sequence, ids[0]));
  Sample sample;
  const auto start = Clock::now();
  for (int64_t done = 0; done < row.tokens;) {
    const int64_t count = prefill ? std::min(engine.options().max_chunk, row.tokens - done) : 1;
    TC_RETURN_IF_ERROR(engine.driver().prefill(
        *sequence, std::span(ids).subspan(static_cast<size_t>(done + 1), static_cast<size_t>(count))));
    sample.bytes += static_cast<double>(engine.step().traffic().total_bytes());
    done += count;
  }
  sample.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  return sample;
}

// Multiplications of weights: every token's, but the vocabulary only where logits are made, once a chunk.
double macs_of(const Engine& engine, const StepRow& row) {
  const ModelGeometry& g = engine.geometry();
  const double head = static_cast<double>(g.vocab_size * g.dim), tokens = static_cast<double>(row.tokens),
               chunk = std::string_view(row.kind) == "prefill" ? static_cast<double>(engine.options().max_chunk) : 1;
  return static_cast<double>(row.batch) *
         ((static_cast<double>(engine.weights().macs_per_token(g)) - head) * tokens + head * std::ceil(tokens / chunk));
}

/// What one token reads and multiplies of the KV cache at the end of a context.
struct KvNeed {
  double bytes = 0, flops = 0, int8_ops = 0;
  double seconds(const Peaks& peaks) const {
    return std::max(bytes / peaks.read_bandwidth, flops / peaks.flops + int8_ops / peaks.int8_ops);
  }
};

KvNeed kv_need(Engine& engine, int64_t context) {
  const ModelGeometry& g = engine.geometry();
  const KvLayout& layout = engine.driver().kv().layout();
  KvNeed need;
  for (int layer = 0; layer < g.n_layers; ++layer) {
    const LayerKind kind = g.kind(layer);
    int64_t rows = std::min(context, g.window_size);
    if (kind != LayerKind::swa) {
      const int64_t compressed = context / g.compress_ratios[static_cast<size_t>(layer)];
      const bool scans = kind == LayerKind::csa && compressed > g.index_topk;
      rows += kind == LayerKind::csa ? std::min(compressed, g.index_topk) : compressed;
      if (scans) {
        need.bytes += static_cast<double>(compressed * layout.index_group_bytes() / cpu::kKeyGroup);
        need.int8_ops += 2.0 * static_cast<double>(compressed * g.index_n_heads * g.index_head_dim);
      }
    }
    need.bytes += static_cast<double>(rows * layout.row_bytes());
    need.flops += 4.0 * static_cast<double>(rows * g.n_heads * g.head_dim);
  }
  return need;
}

// Every repetition measures the peaks again first, and is judged by those: both see the same neighbours.
Status measure(Engine& engine, const BenchOptions& o, PeakMeter& meter, StepRow& row, Peaks& peaks) {
  TC_RETURN_IF_ERROR(run_once(engine, row));  // warm-up: page faults, caches
  std::vector<double> bounds;
  const ForecastStats before = engine.forecast();
  for (int repetition = 0; repetition < o.repetitions; ++repetition) {
    const Peaks now = meter.measure();
    TC_ASSIGN(const Sample sample, run_once(engine, row));
    const double tokens = static_cast<double>(row.tokens * row.batch);
    // With a device the CPU's part is its bytes; what the device does is not of these peaks.
    double bound_seconds =
        std::max(sample.bytes / now.read_bandwidth, engine.gpu_step() ? 0.0 : 2 * macs_of(engine, row) / now.flops);
    if (row.context > 0 && !engine.gpu_step()) {  // layers wait for their attention: its time comes on top
      KvNeed need = kv_need(engine, row.context);
      if (std::string_view(row.kind) == "prefill") need.bytes = 0;  // a chunk's tokens share them
      bound_seconds += tokens * need.seconds(now);
      row.kv_bytes_per_token = need.bytes;
    }
    row.bytes_per_token = sample.bytes / tokens;
    row.seconds.push_back(sample.seconds);
    row.shares.push_back(bound_seconds / sample.seconds);
    bounds.push_back(bound_seconds > 0 ? tokens / bound_seconds : 0);
    peaks.raise(now);
  }
  row.forecast = engine.forecast().since(before);
  row.bound_tokens_per_second = median(bounds);
  return {};
}

double tokens_per_second(const StepRow& row) {
  return static_cast<double>(row.tokens * row.batch) / median(row.seconds);
}

// --- what the cost model says ---

// A prompt's chunks or an answer's steps, each attending to the middle of what it passes.
double predicted_tokens_per_second(const sched::CostModel& model, const StepRow& row, int64_t chunk) {
  const double tokens = static_cast<double>(row.tokens),
               begin = row.context > 0 ? static_cast<double>(row.context) - tokens : 0;
  const auto batch = static_cast<double>(row.batch);
  if (row.kind[0] == 'd') return 1e9 * batch / model.step({.tokens = batch, .context = begin + tokens / 2}).total;
  double ns = 0;
  for (int64_t done = 0; done < row.tokens; done += chunk) {
    const auto count = static_cast<double>(std::min(chunk, row.tokens - done));
    ns +=
        model.step({.tokens = count, .prefill = true, .context = begin + static_cast<double>(done) + count / 2}).total;
  }
  return 1e9 * tokens / ns;
}

// Where what the machine can do is known, and holds: of the CPU alone, of exact kernels.
void predict_rows(Engine& engine, std::vector<StepRow>& rows) {
  const EngineOptions& o = engine.options();
  if (!engine.predictable() || engine.gpu_step()) return;
  sched::MachineProfile machine = *o.machine;
  machine.gpus.clear();
  const sched::ModelCosts costs = model_costs(engine.geometry(), engine.step().options().fp8_rows);
  const sched::CostModel model(costs, machine);
  for (StepRow& row : rows) row.predicted_tokens_per_second = predicted_tokens_per_second(model, row, o.max_chunk);
}

// How far the prediction is above what was measured, in percent.
double off_by(const StepRow& row) { return 100 * (row.predicted_tokens_per_second / tokens_per_second(row) - 1); }

double share_of(int64_t part, int64_t whole) {
  return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0;
}

std::string name_of(const StepRow& row) {
  return (row.kind[0] == 'p' ? "pp" : "tg") + std::to_string(row.tokens) +
         (row.batch > 1 ? " x" + std::to_string(row.batch) : "") +
         (row.context > 0 ? " @" + std::to_string(row.context) : "");
}

void print_table(Engine& engine, const BenchOptions& o, const std::vector<StepRow>& rows, const Peaks& peaks) {
  for (const std::string& line : engine.weights().placement) fmt::print("{}\n", line);
  fmt::print("{}\nSTREAM read {:.1f} GB/s, multiply-add peak {:.0f} GFLOP/s, both measured between the rows\n\n",
             machine_line(machine_of(engine)), peaks.read_bandwidth / 1e9, peaks.flops / 1e9);
  const bool predicted = rows[0].predicted_tokens_per_second > 0;
  fmt::print(
      "| {:<9} | {:<18} | {:>12} | {:>14} | {:>12} | {:>14} |{}\n| {:-<9} | {:-<18} | {:-<11}: | {:-<13}: | {:-<11}: | "
      "{:-<13}: |{}\n",
      "numerics", "test", "t/s", "MB a token", "bound t/s", "share of bound",
      predicted ? " predicted t/s |  off by |" : "", "", "", "", "", "", "",
      predicted ? " ------------: | ------: |" : "");
  for (const StepRow& row : rows)
    fmt::print(
        "| {:<9} | {:<18} | {:>12.2f} | {:>14.2f} | {:>12.2f} | {:>12.0f} % |{}\n",
        kNumericsNames[static_cast<int>(engine.options().numerics)], name_of(row), tokens_per_second(row),
        (row.bytes_per_token + row.kv_bytes_per_token) / 1e6, row.bound_tokens_per_second, 100 * median(row.shares),
        predicted ? fmt::format(" {:>13.2f} | {:>+5.0f} % |", row.predicted_tokens_per_second, off_by(row)) : "");
  fmt::print(
      "\nmedian of {}; bound: weight bytes at the STREAM-read rate, or multiplications at the peak, whichever takes "
      "longer\n",
      o.repetitions);
  if (predicted)
    fmt::print("predicted: by the cost model from the machine's profile, with uniform routing (docs/calibration.md)\n");
  for (const StepRow& row : rows)
    if (const std::string line = forecast_line(row.forecast); !line.empty()) fmt::print("{}: {}\n", name_of(row), line);
  if (!o.fill_kv.empty())
    fmt::print(
        "@N: rows of a context of N tokens are synthetic; the bound has on top what a token reads or multiplies of "
        "them\n");
  if (DeepseekV4GpuStep* const step = engine.gpu_step()) {
    const DeepseekV4GpuStep::Counters& c = step->counters();
    for (const std::string& line : step->describe()) fmt::print("{}\n", line);
    fmt::print(
        "{:.0f} % of (token, expert) pairs on the CPU, {:.0f} % of layers without one; the bound is that of the CPU's "
        "bytes alone\n",
        100 * share_of(c.cpu_pairs, c.pairs), 100 * share_of(c.zero_miss_layers, c.layers));
  }
}

Status write_json(Engine& engine, const BenchOptions& o, const std::vector<StepRow>& rows, const Peaks& peaks) {
  Json results = Json::array();
  for (const StepRow& row : rows) {
    results.push_back({{"kind", row.kind},
                       {"tokens", row.tokens},
                       {"batch", row.batch},
                       {"context", row.context},
                       {"tokens_per_second", tokens_per_second(row)},
                       {"bytes_per_token", row.bytes_per_token},
                       {"kv_bytes_per_token", row.kv_bytes_per_token},
                       {"bound_tokens_per_second", row.bound_tokens_per_second},
                       {"share_of_bound", median(row.shares)},
                       {"repetitions", row.seconds.size()}});
    if (row.predicted_tokens_per_second > 0) {
      results.back()["predicted_tokens_per_second"] = row.predicted_tokens_per_second;
      results.back()["predicted_off_by_percent"] = off_by(row);
      Json phases = Json::object();
      for (size_t i = 0; i < sched::kPhaseNames.size(); ++i)
        if (row.forecast.measured.phases[i] > 0)
          phases[sched::kPhaseNames[i]] = {{"ms", row.forecast.measured.phases[i] / 1e6},
                                           {"predicted_ms", row.forecast.predicted.phases[i] / 1e6}};
      results.back()["steps"] = row.forecast.steps;
      results.back()["phases"] = std::move(phases);
    }
  }
  Json document = {{"model", o.model.model()},
                   {"numerics", kNumericsNames[static_cast<int>(engine.options().numerics)]},
                   {"machine", machine_json(machine_of(engine))},
                   {"weights", engine.weights().placement},
                   {"build", build_json()},
                   {"stream_read_bytes_per_second", peaks.read_bandwidth},
                   {"peak_flops", peaks.flops},
                   {"peak_resident_bytes", peak_resident_bytes()},
                   {"results", results}};
  if (DeepseekV4GpuStep* const step = engine.gpu_step()) {
    const DeepseekV4GpuStep::Counters& c = step->counters();
    document["devices"] = step->describe();
    document["cpu_pair_share"] = share_of(c.cpu_pairs, c.pairs);
    document["zero_miss_layer_share"] = share_of(c.zero_miss_layers, c.layers);
  }
  const std::string text = dump_json(document, 2) + "\n";
  if (o.json_path != "-") return write_text_file(o.json_path, text);
  fmt::print("{}", text);
  return {};
}

// The longest test; an error when there is none. What can be said before the model is loaded.
Result<int64_t> check(const BenchOptions& o) {
  if (o.repetitions < 1 || o.chunk < 1) return invalid("--repetitions and --chunk should be at least 1");
  int64_t longest = 0;
  for (const std::vector<int64_t>* const lengths : {&o.prefill, &o.decode})
    for (const int64_t tokens : *lengths) {
      if (tokens < 0) return invalid("a test of " + std::to_string(tokens) + " tokens: lengths should not be negative");
      longest = std::max(longest, tokens);
    }
  for (const int64_t batch : o.batch)
    if (batch < 1 || batch > 1024) return invalid("--batch " + std::to_string(batch) + " is outside 1..1024");
  for (const int64_t context : o.fill_kv)
    for (const int64_t tokens : o.decode)
      if (context < tokens + 2)
        return invalid("--fill-kv " + std::to_string(context) + " has no room for a context and an answer of " +
                       std::to_string(tokens) + " tokens");
  if (longest == 0) return invalid("nothing to measure: give --prefill or --decode a length above 0");
  return longest;
}

Result<std::vector<StepRow>> rows_of(const BenchOptions& o, int64_t max_context) {
  std::vector<StepRow> rows;
  for (const auto& [kind, lengths] : {std::pair("prefill", &o.prefill), std::pair("decode", &o.decode)})
    for (const int64_t tokens : *lengths) {
      if (tokens >= max_context)  // a decode row has a token before it
        return invalid("a test of " + std::to_string(tokens) + " tokens does not fit the context of " +
                       std::to_string(max_context));
      if (tokens == 0) continue;
      if (kind[0] == 'p') rows.push_back({kind, tokens});
      for (const int64_t batch : o.batch)
        if (kind[0] == 'd') rows.push_back({kind, tokens, batch});
      for (const int64_t context : o.fill_kv) {
        if (kind[0] == 'p' && context > tokens) rows.push_back({kind, tokens, 1, context});
        for (const int64_t batch : o.batch)
          if (kind[0] == 'd') rows.push_back({kind, tokens, batch, context});
      }
    }
  return rows;
}

Status bench_step(const BenchOptions& o) {
  TC_ASSIGN(const int64_t longest, check(o));
  TC_ASSIGN(EngineOptions options, o.model.engine_options());
  options.max_chunk = std::min(o.chunk, longest);  // buffers are no larger than a test needs
  options.max_sequences = static_cast<int>(*std::max_element(o.batch.begin(), o.batch.end()));
  if (options.max_sequences > 1 && options.max_context == 0) options.max_context = longest + 1;
  if (!o.fill_kv.empty())
    options.max_context = std::max(options.max_context, *std::max_element(o.fill_kv.begin(), o.fill_kv.end()));
  options.calibrated = o.profile_path.empty();
  if (!options.calibrated) {
    TC_ASSIGN(options.machine, read_profile(o.profile_path));
  }
  TC_ASSIGN(const std::unique_ptr<Engine> engine, of_model(Engine::open(options)));
  TC_ASSIGN(std::vector<StepRow> rows, rows_of(o, engine->max_context()));
  TC_ASSIGN(PeakMeter meter, PeakMeter::create(engine->pool(), engine->kernels()));
  Peaks peaks;
  for (StepRow& row : rows) TC_RETURN_IF_ERROR(measure(*engine, o, meter, row, peaks));
  predict_rows(*engine, rows);
  if (o.json_path != "-") print_table(*engine, o, rows, peaks);
  return o.json_path.empty() ? Status() : write_json(*engine, o, rows, peaks);
}

}  // namespace

void add_bench_step(CLI::App& bench, Outcome& outcome) {
  auto o = std::make_shared<BenchOptions>();
  CLI::App* command = bench.add_subcommand("step", "Prefill and decode speed of a model");
  o->model.add_to(*command);
  command->add_option("--prefill,-p", o->prefill, "Prompt lengths")->delimiter(',')->capture_default_str();
  command->add_option("--decode,-n", o->decode, "Answer lengths")->delimiter(',')->capture_default_str();
  command->add_option("--batch,-b", o->batch, "Sequences that decode together")->delimiter(',')->capture_default_str();
  command
      ->add_option("--fill-kv", o->fill_kv,
                   "Also prefill and decode up to these contexts, behind synthetic rows instead of a long prefill")
      ->delimiter(',');
  command->add_option("--chunk", o->chunk, "Tokens of a prefill step")->capture_default_str();
  command->add_option("--repetitions,-r", o->repetitions, "Repetitions; the median counts")->capture_default_str();
  command->add_option("--json", o->json_path, "Also a JSON document: a file, or - for standard output alone");
  command->add_option("--profile", o->profile_path,
                      "Predict from this machine profile instead of the one that calibrate stored for this box");
  command->callback([o, &outcome] { outcome.exit_code = exit_code_of(bench_step(*o)); });
}

}  // namespace thermocline::cli
