// `thermocline bench step`: prefill (pp) and decode (tg) speed of a model, each against what this machine bounds it to.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "runtime/base/timing.h"
#include "runtime/cli/bench_step_report.h"
#include "runtime/cli/command.h"
#include "runtime/cli/model_folder.h"
#include "runtime/engine/model_costs.h"
#include "runtime/engine/stored_profile.h"
#include "runtime/io/file.h"
#include "runtime/kv/synthetic_rows.h"
#include "runtime/model/deepseek_v4/config.h"
#include "scheduler/cost/cost_model.h"

namespace thermocline::cli {
namespace {

struct BenchOptions {
  ModelOptions model;
  std::vector<int64_t> prefill = {512}, decode = {64}, batch = {1}, fill_kv;
  int64_t chunk = 512;
  int repetitions = 3, full_layers = 0;
  bool layers_only = false;
  std::string json_path, profile_path;
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

using Sequences = std::vector<std::unique_ptr<SequenceKv>>;

// Each of them a content of its own.
Result<Sequences> synthetic_sequences(Engine& engine, int64_t count, int64_t tokens) {
  Sequences sequences;
  for (int64_t s = 0; s < count; ++s) {
    TC_ASSIGN(std::unique_ptr<SequenceKv> sequence,
              synthetic_sequence(engine.driver().kv(), engine.geometry(), engine.pool(), tokens,
                                 static_cast<uint32_t>(1000 * s + 1)));
    sequences.push_back(std::move(sequence));
  }
  return sequences;
}

// Chunks of a prompt, or a token of every sequence a step, each with a text of its own and after a prompt of one token,
// which does not count; behind a context of synthetic rows if any. Logits are made of every sequence's last token.
Result<StepSample> run_once(Engine& engine, const StepRow& row) {
  const int64_t prompt = row.prefill() ? 0 : 1, end = prompt + row.tokens,
                filled = row.context > 0 ? row.context - end : 0;
  const std::vector<int32_t> ids = random_ids(end * row.batch, engine.geometry().vocab_size);
  TC_ASSIGN(const Sequences sequences, synthetic_sequences(engine, row.batch, filled));
  std::vector<SequenceKv*> kv;
  for (const std::unique_ptr<SequenceKv>& sequence : sequences) kv.push_back(sequence.get());
  StepSample sample;
  Clock::time_point start;
  for (int64_t done = 0; done < end;) {
    if (done == prompt) start = Clock::now();
    const int64_t count = row.prefill() ? std::min(engine.options().max_chunk, end - done) : 1;
    sched::Batch batch;
    for (int64_t s = 0; s < row.batch; ++s) {
      batch.add(static_cast<int>(s), filled + done, &ids[static_cast<size_t>(done * row.batch + s)], count);
      batch.logit_rows.push_back(static_cast<int32_t>(batch.size()) - 1);
    }
    TC_ASSIGN(const StepReport report, engine.step().run({batch, kv}));
    if (done >= prompt) sample.add(report, engine.step().traffic());
    done += count;
  }
  sample.seconds = seconds_since(start);
  return sample;
}

// Multiplications of weights: every token's, but the vocabulary only where logits are made, once a chunk.
void count_macs(const Engine& engine, StepRow& row) {
  const ModelGeometry& g = engine.geometry();
  const double head = static_cast<double>(g.vocab_size * g.dim), tokens = static_cast<double>(row.tokens),
               chunk = row.prefill() ? static_cast<double>(engine.options().max_chunk) : 1,
               batch = static_cast<double>(row.batch);
  row.head_macs = batch * head * std::ceil(tokens / chunk);
  row.macs = batch * (static_cast<double>(engine.weights().macs_per_token(g)) - head) * tokens + row.head_macs;
}

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

// With a device the CPU's part is its bytes; what the device does is not of these peaks.
void count_needs(Engine& engine, StepRow& row) {
  row.step_tokens = row.prefill() ? std::min(engine.options().max_chunk, row.tokens) : row.batch;
  if (engine.gpu_step()) return;
  count_macs(engine, row);
  if (row.context > 0) row.kv = kv_need(engine, row.context);
  if (row.prefill()) row.kv.bytes = 0;  // a chunk's tokens share them
}

// Every repetition measures the peaks again first, and is judged by those: both see the same neighbours.
Status measure(Engine& engine, int repetitions, PeakMeter& meter, StepRow& row, Peaks& peaks) {
  count_needs(engine, row);
  TC_RETURN_IF_ERROR(run_once(engine, row));  // warm-up: page faults, caches
  const ForecastStats before = engine.forecast();
  for (int repetition = 0; repetition < repetitions; ++repetition) {
    const Peaks now = meter.measure();
    TC_ASSIGN(StepSample sample, run_once(engine, row));
    sample.peaks = now;
    row.samples.push_back(std::move(sample));
    peaks.raise(now);
  }
  row.forecast = engine.forecast().since(before);
  return {};
}

// --- what the cost model says ---

// A prompt's chunks or an answer's steps, each attending to the middle of what it passes.
double predicted_tokens_per_second(const sched::CostModel& model, const StepRow& row, int64_t chunk, StepPart part) {
  const double tokens = static_cast<double>(row.tokens),
               begin = row.context > 0 ? static_cast<double>(row.context) - tokens : 0;
  const auto ns_of = [&](const sched::StepQuestion& question) {
    const sched::StepTime time = model.step(question);
    // The CPU does one phase after another.
    return part == StepPart::whole ? time.total : time.total - time[sched::Phase::head];
  };
  const auto batch = static_cast<double>(row.batch);
  if (!row.prefill()) return 1e9 * batch / ns_of({.tokens = batch, .context = begin + tokens / 2});
  double ns = 0;
  for (int64_t done = 0; done < row.tokens; done += chunk) {
    const auto count = static_cast<double>(std::min(chunk, row.tokens - done));
    ns += ns_of({.tokens = count, .prefill = true, .context = begin + static_cast<double>(done) + count / 2});
  }
  return 1e9 * tokens / ns;
}

// Where what the machine can do is known, and holds: of the CPU alone, of exact kernels.
void predict_rows(Engine& engine, StepBench& bench) {
  const EngineOptions& o = engine.options();
  if (!engine.predictable() || engine.gpu_step()) return;
  sched::MachineProfile machine = *o.machine;
  machine.gpus.clear();
  const sched::ModelCosts costs = model_costs(engine.geometry(), engine.step().options().fp8_rows);
  const sched::CostModel model(costs, machine);
  for (StepRow& row : bench.rows)
    row.predicted_tokens_per_second = predicted_tokens_per_second(model, row, o.max_chunk, bench.part);
}

// A device's layers and head are not timed apart.
Status refuse_parts(const BenchOptions& o) {
  if (o.layers_only) return invalid("--layers-only needs the whole step on the CPU: --device none");
  if (o.full_layers != 0) return invalid("--full-layers needs the whole step on the CPU: --device none");
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

Status write_document(const std::string& text, const std::string& path) {
  if (path != "-") return write_text_file(path, text);
  fmt::print("{}", text);
  return {};
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
  StepBench bench{.part = o.layers_only ? StepPart::layers : StepPart::whole, .repetitions = o.repetitions};
  TC_ASSIGN(const ModelGeometry geometry, of_model(deepseek_v4::read_config(options.model)));
  TC_ASSIGN(bench.whole, whole_model(geometry, o.full_layers));
  TC_ASSIGN(const std::unique_ptr<Engine> engine, of_model(Engine::open(options)));
  if (engine->gpu_step()) TC_RETURN_IF_ERROR(refuse_parts(o));
  TC_ASSIGN(bench.rows, rows_of(o, engine->max_context()));
  TC_ASSIGN(PeakMeter meter, PeakMeter::create(engine->pool(), engine->kernels()));
  for (StepRow& row : bench.rows) TC_RETURN_IF_ERROR(measure(*engine, o.repetitions, meter, row, bench.peaks));
  predict_rows(*engine, bench);
  if (o.json_path != "-") print_step_bench(*engine, bench);
  if (o.json_path.empty()) return {};
  return write_document(dump_json(step_bench_json(*engine, o.model.model(), bench), 2) + "\n", o.json_path);
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
  command->add_option("--repetitions,-r", o->repetitions, "Repetitions; the middle one counts")->capture_default_str();
  command->add_flag(
      "--layers-only", o->layers_only,
      "Leave the head out of rates, bounds and shares: it is computed, its time and bytes are subtracted");
  command
      ->add_option("--full-layers", o->full_layers,
                   "Layers of the whole model, for the projection of a slice; 0: of the published model it begins")
      ->capture_default_str();
  command->add_option("--json", o->json_path, "Also a JSON document: a file, or - for standard output alone");
  command->add_option("--profile", o->profile_path,
                      "Predict from this machine profile instead of the one that calibrate stored for this box");
  command->callback([o, &outcome] { outcome.exit_code = exit_code_of(bench_step(*o)); });
}

}  // namespace thermocline::cli
