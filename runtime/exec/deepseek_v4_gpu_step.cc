#include "runtime/exec/deepseek_v4_gpu_step.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include <fmt/format.h>

#include "kernels_cpu/ref/ops.h"
#include "runtime/exec/handover.h"
#include "runtime/hw/host_memory.h"

namespace thermocline {
namespace ref = cpu::ref;
using sched::Phase;
using sched::PrefillExperts;
using sched::Segment;

namespace {

static_assert(sched::Referee::kMostTokens <= DevicePart::kAskTokens, "whoever prefetches asks");

constexpr int kLayersAhead = 4;  // queued before the CPU answers: some 120 launches; CUDA takes about 1,000

}  // namespace

DeepseekV4GpuStep::DeepseekV4GpuStep(const ModelGeometry& geometry, const deepseek_v4::Weights& weights,
                                     cpu::CpuContext cpu, Numerics numerics, const ExecOptions& options,
                                     const GpuOptions& gpu)
    : StepExecutor(options),
      g_(geometry),
      w_(weights),
      traffic_(cpu.pool.size(), cpu.pool.nodes()),
      cpu_{cpu.pool, cpu.table, &traffic_},
      round_(rounding_of(numerics)),
      gpu_(gpu),
      prefetch_(gpu.prefetch, geometry.n_routed_experts),
      distinct_(geometry.n_routed_experts) {
  frequencies_[0] = ref::rope_frequencies(g_.rope_head_dim, g_.rope_theta);
  frequencies_[1] = ref::rope_frequencies(g_.rope_head_dim, g_.compress_rope_theta, g_.rope_factor, g_.original_seq_len,
                                          g_.beta_fast, g_.beta_slow);
  routed_ids_.resize(static_cast<size_t>(g_.n_layers));
  layer_cpu_pairs_.resize(routed_ids_.size());
}

Result<std::unique_ptr<DeepseekV4GpuStep>> DeepseekV4GpuStep::create(
    const ModelGeometry& geometry, const deepseek_v4::Weights& weights, cpu::CpuContext cpu, Numerics numerics,
    const ExecOptions& options, const GpuOptions& gpu, const KvStore& kv,
    std::vector<std::unique_ptr<gpu::Device>> devices) {
  TC_RETURN_IF_ERROR(supported(geometry, weights, numerics, options));
  std::unique_ptr<DeepseekV4GpuStep> step(new DeepseekV4GpuStep(geometry, weights, cpu, numerics, options, gpu));
  const ModelGeometry& g = geometry;
  const std::vector<PartOptions> parts = part_options(g, weights, numerics, options, gpu, devices.size());
  const int count = static_cast<int>(parts.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    const PartOptions& o = parts[i];
    TC_ASSIGN(std::unique_ptr<DevicePart> part, DevicePart::create(std::move(devices[i]), g, weights, kv, o));
    TC_ASSIGN(std::unique_ptr<sched::SlotScheduler> scheduler,
              sched::SlotScheduler::create({.policy = gpu.policy,
                                            .of = step->policy_options(*part),
                                            .max_fills = gpu.max_fills,
                                            .fill_ns = gpu.idle_copies.fill_ns}));
    step->schedulers_.push_back(std::move(scheduler));
    step->parts_.push_back(std::move(part));
  }
  // Copies from pageable memory would go through a bounce buffer, and not beside kernels.
  for (const NumaBuffer& arena : weights.arenas)
    TC_RETURN_IF_ERROR(step->parts_[0]->device().pin(arena.data(), arena.size()));
  TC_RETURN_IF_ERROR(step->allocate_host_side(parts[0].max_tokens));
  step->costs_ = gpu.costs;
  if (gpu.prefill == PrefillExperts::hybrid && gpu.costs.h2d_ns <= 0) TC_RETURN_IF_ERROR(step->measure_experts());
  // The slots are full before the first step; what a policy does later runs beside steps.
  for (int i = 0; i < count; ++i) {
    DevicePart& part = *step->parts_[static_cast<size_t>(i)];
    SlotPool& slots = part.slots();
    for (const sched::Admission& a : step->schedulers_[static_cast<size_t>(i)]->first(slots.residency()))
      slots.fill(a.fill);
    TC_RETURN_IF_ERROR(slots.settle());
  }
  if (count == 1 && gpu.graphs) {
    DevicePart& part = *step->parts_[0];
    for (const auto& [scores, asks] : {std::pair(false, false), {true, false}, {false, true}, {true, true}})
      for (int64_t tokens = 1; tokens <= decode_bucket(std::min(options.max_tokens, kDecodeTokens)); tokens *= 2) {
        if (asks && (!part.options().ask_ahead || tokens > DevicePart::kAskTokens)) continue;
        StepShape shape{tokens, std::min(tokens, part.options().max_logit_rows), 0, scores, asks};
        part.host_tables(shape);
        part.stream().begin_capture();
        part.begin(shape);
        step->queue_decode(part);
        TC_ASSIGN(std::unique_ptr<gpu::Graph> graph, part.stream().end_capture());
        step->buckets_.push_back({shape, std::move(graph)});
      }
  }
  for (const std::unique_ptr<DevicePart>& part : step->parts_) part->device().seal();
  return step;
}

// Of a part, whose layers count from 0; an MTP block's is the last, without a profile.
sched::PolicyOptions DeepseekV4GpuStep::policy_options(const DevicePart& part) const {
  const PartOptions& o = part.options();
  sched::PolicyOptions options{.layers = o.last_layer - o.first_layer + (o.mtp ? 1 : 0),
                               .experts = g_.n_routed_experts,
                               .slots = part.slots().slots()};
  if (gpu_.costs.h2d_ns > 0) options.costs = &gpu_.costs;
  if (gpu_.profile.empty()) return options;
  const int64_t experts = g_.n_routed_experts;
  options.profile.assign(gpu_.profile.begin() + o.first_layer * experts, gpu_.profile.begin() + o.last_layer * experts);
  options.profile.resize(static_cast<size_t>(options.layers * experts));
  return options;
}

ExpertTraffic DeepseekV4GpuStep::expert_traffic() const {
  ExpertTraffic traffic{.pairs = counters_.pairs,
                        .device_pairs = counters_.pairs - counters_.cpu_pairs,
                        .layers = counters_.layers,
                        .zero_miss_layers = counters_.zero_miss_layers,
                        .staged = prefetch_.staged(),
                        .staged_whole = prefetch_.staged_whole(),
                        .staged_right = prefetch_.right(),
                        .prefetch = prefetch_name()};
  for (const std::unique_ptr<DevicePart>& part : parts_) {
    const SlotPool::Counters& slots = part->slots().counters();
    traffic.slots += part->slots().slots();
    traffic.fills += slots.fills;
    traffic.evictions += slots.evictions;
    traffic.fill_bytes += slots.h2d_bytes;
  }
  for (const std::unique_ptr<sched::SlotScheduler>& scheduler : schedulers_)
    if (scheduler->moves()) traffic.fill_budget += scheduler->fills_within(gpu_.idle_copies.idle(1));
  return traffic;
}

std::span<const int32_t> DeepseekV4GpuStep::expert_slots(int layer) const {
  for (const std::unique_ptr<DevicePart>& part : parts_)
    if (const PartOptions& o = part->options(); layer >= o.first_layer && layer < o.last_layer)
      return part->slots().step_table(layer - o.first_layer);
  return {};
}

std::string_view DeepseekV4GpuStep::prefetch_name() const {
  if (gpu_.prefetch.mode != ExpertPrefetch::Mode::automatic)
    return gpu_.prefetch.mode == ExpertPrefetch::Mode::on ? "on" : "off";
  const sched::Referee::State verdict = prefetch_.verdict();
  return verdict == sched::Referee::State::testing ? "testing" : verdict == sched::Referee::State::on ? "on" : "off";
}

DevicePart& DeepseekV4GpuStep::part_of(int layer) {
  for (const std::unique_ptr<DevicePart>& part : parts_)
    if (layer < part->options().last_layer) return *part;
  return *parts_.back();
}

// A greedy request never asks: V floats a row stay where they are.
TensorView<const float, 2> DeepseekV4GpuStep::logits() const {
  if (!logits_fetched_ && logit_rows_ > 0) {
    parts_.back()->fetch_logits(logit_rows_);
    (void)parts_.back()->stream().synchronize();  // a fault sticks, and fails the next step
    logits_fetched_ = true;
  }
  return {parts_.back()->logits(), {logit_rows_, g_.vocab_size}};
}
TensorView<const float, 2> DeepseekV4GpuStep::mtp_logits() const {
  return {parts_.back()->mtp_logits(), {mtp_rows_, g_.vocab_size}};
}

std::vector<std::string> DeepseekV4GpuStep::describe() const {
  std::vector<std::string> lines;
  for (const std::unique_ptr<DevicePart>& part : parts_) lines.push_back(part->memory_map());
  if (gpu_.prefill == PrefillExperts::hybrid)
    lines.push_back(fmt::format(
        "an expert: copied in {:.0f} us; CPU {:.0f} us for 1 token, {:.0f} for 128; device {:.0f} and {:.0f}; {}",
        costs_.h2d_ns / 1e3, costs_.cpu.ns(1) / 1e3, costs_.cpu.ns(128) / 1e3, costs_.gpu.ns(1) / 1e3,
        costs_.gpu.ns(128) / 1e3,
        costs_.crossover() > 0 ? fmt::format("copying pays from {} tokens", costs_.crossover())
                               : "copying never pays"));
  return lines;
}

// All parts, whatever the first says: none may still touch the caller's bytes.
Status DeepseekV4GpuStep::synchronize() {
  Status first;
  for (const auto& part : parts_)
    if (Status status = part->stream().synchronize(); first.ok() && !status.ok()) first = std::move(status);
  return first;
}

void DeepseekV4GpuStep::fill_tables(DevicePart& part, const StepShape& shape, const sched::Batch& batch,
                                    std::span<SequenceKv* const> sequences, std::span<const int32_t> next_ids,
                                    std::span<const int32_t> mtp_rows) {
  const DevicePart::Tables t = part.host_tables(shape);
  *t.step = step_number_;
  int32_t pages = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const SequenceKv& kv = *sequences[i];
    gpu::SequenceInfo& info = t.sequences[i];
    info = {kv.ring(), static_cast<int32_t>(kv.first_window_page()), pages,
            pages + static_cast<int32_t>(kv.window_pages().size())};
    TC_CHECK(pages + static_cast<int64_t>(kv.window_pages().size() + kv.compressed_pages().size()) <=
             part.page_capacity());
    pages =
        static_cast<int32_t>(std::copy(kv.window_pages().begin(), kv.window_pages().end(), t.pages + pages) - t.pages);
    pages = static_cast<int32_t>(
        std::copy(kv.compressed_pages().begin(), kv.compressed_pages().end(), t.pages + pages) - t.pages);
  }
  const int64_t m = shape.tokens, pairs = g_.rope_head_dim / 2, real = batch.size();
  std::fill_n(t.tokens, m, gpu::TokenInfo());
  for (const Segment& segment : batch.segments)
    for (int64_t i = 0; i < segment.num_tokens; ++i)
      t.tokens[segment.first_token + i] = {batch.token_ids[static_cast<size_t>(segment.first_token + i)],
                                           static_cast<int32_t>(segment.first_pos + i),
                                           segment.sequence,
                                           static_cast<int32_t>(segment.first_pos),
                                           static_cast<int32_t>(segment.first_token),
                                           static_cast<int32_t>(segment.num_tokens)};
  for (int64_t token = 0; token < m; ++token) {
    const int64_t pos = std::max(t.tokens[token].pos, 0);
    const auto angles = [&](int64_t table, int kind, int64_t at) {
      ref::rope_angles(frequencies_[kind], at, t.cos + (table * m + token) * pairs,
                       t.sin + (table * m + token) * pairs);
    };
    angles(0, 0, pos);
    angles(1, 1, pos);
    for (size_t r = 0; r < part.ratios().size(); ++r)
      angles(2 + static_cast<int64_t>(r), 1, pos / part.ratios()[r] * part.ratios()[r]);
  }
  for (int64_t i = 0; i < shape.logit_rows; ++i)
    t.rows[i] = i < static_cast<int64_t>(batch.logit_rows.size()) ? batch.logit_rows[static_cast<size_t>(i)] : 0;
  std::copy(mtp_rows.begin(), mtp_rows.end(), t.mtp_rows);
  if (part.options().first_layer == 0)
    for (int64_t token = 0; token < m; ++token)
      std::copy_n(
          w_.embed + (token < real ? static_cast<int64_t>(batch.token_ids[static_cast<size_t>(token)]) : 0) * g_.dim,
          g_.dim, t.embed + token * g_.dim);
  if (shape.mtp_rows > 0) {
    for (int64_t token = 0; token < m; ++token) {
      const int64_t id = token < real ? std::max(next_ids[static_cast<size_t>(token)], 0) : 0;
      std::copy_n(w_.embed + id * g_.dim, g_.dim, t.mtp_embed + token * g_.dim);
    }
  }
}

Result<StepReport> DeepseekV4GpuStep::compute(const StepInput& input) {
  const auto& [batch, sequences, next_ids, stop] = input;
  clock_.start();
  counted_ = {};
  std::fill(layer_cpu_pairs_.begin(), layer_cpu_pairs_.end(), 0);
  TC_RETURN_IF_ERROR(check(g_, options_, batch, sequences));
  if (stop && stop->stop_requested()) return nobody_wants_it();
  for (const std::unique_ptr<DevicePart>& part : parts_) TC_RETURN_IF_ERROR(part->stream().status());
  if (batch.size() == 0) {
    logit_rows_ = mtp_rows_ = 0;
    return StepReport{};
  }
  const WorkerPool::StepScope scope(cpu_.pool);
  traffic_.reset();
  for (const Segment& segment : batch.segments)
    TC_RETURN_IF_ERROR(sequences[segment.sequence]->reserve(segment.num_tokens));

  StepShape shape;
  const int64_t rows = static_cast<int64_t>(batch.logit_rows.size());
  const bool decode = batch.size() <= kDecodeTokens;
  shape.tokens = decode ? decode_bucket(batch.size()) : batch.size();
  asked_tokens_ = batch.size();
  shape.asks = prefetch_.on(batch.size());
  for (int i = 0; i < g_.n_layers; ++i)
    if (g_.kind(i) == LayerKind::csa)
      for (const Segment& segment : batch.segments)
        shape.scores =
            shape.scores ||
            (segment.first_pos + segment.num_tokens) / g_.compress_ratios[static_cast<size_t>(i)] > g_.index_topk;
  const bool with_mtp = !next_ids.empty() && parts_.back()->options().mtp;
  std::vector<int32_t> mtp_rows;
  if (with_mtp)
    for (const int32_t row : batch.logit_rows)
      if (next_ids[static_cast<size_t>(row)] >= 0) mtp_rows.push_back(row);
  const int64_t wanted_mtp_rows = static_cast<int64_t>(mtp_rows.size());
  // The MTP block runs for its rows in the cache even where no logits of it are wanted.
  if (with_mtp && wanted_mtp_rows == 0) mtp_rows.push_back(0);
  shape.mtp_rows = static_cast<int64_t>(mtp_rows.size());

  const bool graph = decode && rows > 0 && !with_mtp && !observer_ && !buckets_.empty();
  shape.logit_rows = graph ? std::min(shape.tokens, parts_[0]->options().max_logit_rows) : rows;
  ++step_number_;
  for (const std::unique_ptr<DevicePart>& part : parts_) {
    part->slots().begin_step(part->stream());
    fill_tables(*part, shape, batch, sequences, next_ids, mtp_rows);
  }
  const bool host_split = !decode && gpu_.prefill != PrefillExperts::cpu;
  const Status ran = graph ? run_graph(shape) : run_layers(shape, batch.size(), host_split, with_mtp, stop);
  Status status = ran;
  for (const std::unique_ptr<DevicePart>& part : parts_) {
    const Status synced = part->stream().synchronize();
    if (status.ok() && !synced.ok()) status = synced;
    part->slots().end_step();
    const HotRows counts = part->take_hot_row_counts();
    hot_rows_ = {hot_rows_.found + counts.found, hot_rows_.copied + counts.copied, hot_rows_.left + counts.left};
  }
  if (!status.ok())  // its layers have written over the rings
    for (const Segment& segment : batch.segments) sequences[segment.sequence]->abandon();
  TC_RETURN_IF_ERROR(std::move(status));
  logit_rows_ = rows;
  logits_fetched_ = false;
  mtp_rows_ = wanted_mtp_rows;
  for (const Segment& segment : batch.segments) sequences[segment.sequence]->commit(segment.num_tokens);
  for (int layer = 0; layer < g_.n_layers; ++layer)
    routed_ids_[static_cast<size_t>(layer)] = part_of(layer).host_ids(layer);
  prefetch_.stepped(batch.size(), clock_.time().total,
                    std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
  observe_step(batch.size(), batch.segments.size() == 1 && batch.size() > 1);
  for (const int32_t* ids : routed_ids_)
    counted_.experts += distinct_.count({ids, static_cast<size_t>(batch.size() * g_.n_activated_experts)});
  counted_.pairs = batch.size() * g_.n_activated_experts * g_.n_layers;
  return StepReport{batch.size(),           rows,     clock_.time(),
                    traffic_.total_bytes(), counted_, {batch.size(), g_.n_activated_experts, 0, 0, routed_ids_},
                    layer_cpu_pairs_};
}

std::optional<int32_t> DeepseekV4GpuStep::most_likely(int64_t row) const {
  TC_CHECK(row >= 0 && row < logit_rows_);
  const int32_t id = parts_.back()->most_likely()[row];
  return id < 0 ? std::nullopt : std::optional(id);  // not finite: whoever reads the logits says so
}

void DeepseekV4GpuStep::queue_decode(DevicePart& part) {
  part.embed();
  for (int layer = 0; layer < g_.n_layers; ++layer) {
    part.attention(layer);
    part.experts_begin(layer);
    part.experts_end(layer);
  }
  part.head();
  part.end();
}

Status DeepseekV4GpuStep::run_graph(const StepShape& shape) {
  DevicePart& part = *parts_[0];
  for (Bucket& bucket : buckets_) {
    if (bucket.shape.tokens != shape.tokens || bucket.shape.scores != shape.scores || bucket.shape.asks != shape.asks)
      continue;
    part.stream().launch(*bucket.graph);
    ++counters_.graph_launches;
    for (int layer = 0; layer < g_.n_layers; ++layer) TC_RETURN_IF_ERROR(answer(part, layer, shape));
    return {};
  }
  TC_CHECK(false, "every bucket is captured");
  return {};
}

Status DeepseekV4GpuStep::run_layers(const StepShape& shape, int64_t tokens, bool host_split, bool with_mtp,
                                     const StopToken* stop) {
  for (const std::unique_ptr<DevicePart>& part : parts_) part->begin(shape);
  int answered = 0;  // layers
  const auto answer_up_to = [&](int layer) -> Status {
    for (; !host_split && answered < layer; ++answered) TC_RETURN_IF_ERROR(answer(part_of(answered), answered, shape));
    return {};
  };
  const auto run_layer = [&](DevicePart& part, int layer) -> Status {
    // A driver's queue is finite, and a full one blocks: the layers it waits for must not wait for this thread.
    TC_RETURN_IF_ERROR(answer_up_to(layer - kLayersAhead));
    if (stop && stop->stop_requested()) {
      TC_RETURN_IF_ERROR(answer_up_to(layer));  // those that are queued wait for it
      return nobody_wants_it();
    }
    part.attention(layer);
    if (host_split) {
      TC_RETURN_IF_ERROR(split_on_host(part, layer, shape));
    } else {
      part.experts_begin(layer);
      part.experts_end(layer);
    }
    if (!observer_ || layer >= g_.n_layers) return {};
    TC_RETURN_IF_ERROR(answer_up_to(layer + 1));
    observed_.resize(static_cast<size_t>(shape.tokens * g_.hc_mult * g_.dim));
    part.read_streams(observed_.data());
    TC_RETURN_IF_ERROR(part.stream().synchronize());
    observer_(layer, {observed_.data(), {tokens, g_.hc_mult, g_.dim}});  // without the bucket's padding
    return {};
  };
  parts_[0]->embed();
  for (size_t i = 0; i < parts_.size(); ++i) {
    DevicePart& part = *parts_[i];
    if (i > 0) {
      parts_[i - 1]->stream().record(parts_[i - 1]->done());
      part.receive_streams(*parts_[i - 1]);
    }
    for (int layer = part.options().first_layer; layer < part.options().last_layer; ++layer)
      TC_RETURN_IF_ERROR(run_layer(part, layer));
  }
  DevicePart& last = *parts_.back();
  last.head();
  if (with_mtp) {
    last.mtp();
    TC_RETURN_IF_ERROR(run_layer(last, g_.n_layers));
    last.mtp_head();
  }
  for (const std::unique_ptr<DevicePart>& part : parts_) part->end();
  return answer_up_to(g_.n_layers + (with_mtp ? 1 : 0));
}

// The pairs in ids_ and weights_, from x in pinned memory, into out by rising expert, then token.
void DeepseekV4GpuStep::compute_pairs(DevicePart& part, int layer, int64_t tokens, bf16* out) {
  const cpu::InputFormat plain{cpu_.table.activation, false}, routed{cpu_.table.activation, round_.linear_inputs};
  const bf16* const x = part.host_x();
  x_.reshape(cpu_.table, plain.activation, tokens, g_.dim);
  cpu_.pool.split(tokens, [&](int64_t begin, int64_t end, int) {
    constexpr int64_t kPiece = 512;
    float piece[kPiece];
    for (int64_t token = begin; token < end; ++token) {
      const cpu::RowChunks chunks = x_.row({0, tokens}, token);
      for (int64_t at = 0; at < g_.dim; at += kPiece) {
        const int64_t count = std::min(kPiece, g_.dim - at);
        for (int64_t i = 0; i < count; ++i) piece[i] = bf16_to_float(x[token * g_.dim + at + i]);
        cpu::store_row(plain, piece, count, {chunks.first + at / cpu::kTileCols * chunks.stride, chunks.stride});
      }
    }
  });
  const int64_t k = g_.n_activated_experts;
  cpu::moe_pairs(cpu_, layer_weights(layer).experts, x_, {ids_.data(), {tokens, k}}, {weights_.data(), {tokens, k}},
                 {g_.swiglu_limit, true, routed, routed}, moe_, out);
  clock_.lap(Phase::experts_cpu);
}

// A layer whose `pairs` in ids_ are the CPU's.
void DeepseekV4GpuStep::count_layer(int layer, int64_t tokens, int64_t pairs) {
  counters_.cpu_pairs += pairs;
  ++counters_.layers;
  counters_.zero_miss_layers += pairs == 0;
  if (layer >= g_.n_layers) return;
  ++counted_.layers;
  counted_.cpu_pairs += pairs;
  layer_cpu_pairs_[static_cast<size_t>(layer)] = pairs;
  if (pairs == 0) return;
  ++counted_.layers_with_miss;
  counted_.cpu_experts += distinct_.count({ids_.data(), static_cast<size_t>(tokens * g_.n_activated_experts)});
}

// The device is at attention: as soon as what the layer's router said ahead is here, until its flag is.
void DeepseekV4GpuStep::prefetch_layer(DevicePart& part, int layer, uint32_t& flag) {
  if (layer == part.options().first_layer || layer >= g_.n_layers) return;  // nobody asked
  // All workers call it, and often: it does not ask the stream, which is this thread's, and whose driver has a lock.
  const auto stop = [&] { return flag_is_up(flag, step_number_); };
  std::span<const int32_t> guesses;
  for (int64_t spins = 1; (guesses = part.asked(layer, step_number_)).empty(); ++spins) {
    if (stop()) return;
    __builtin_ia32_pause();
    if (spins % 1024 == 0) std::this_thread::yield();
    if (spins % 16384 == 0 && !part.stream().status().ok()) return;  // no flag will come
  }
  const std::span<const int32_t> table = part.slots().step_table(layer - part.options().first_layer);
  // The likeliest of every token, then the second ones.
  const int64_t k = g_.n_activated_experts;
  guesses_.clear();
  for (int64_t rank = 0; rank < k; ++rank)
    for (int64_t token = 0; token < asked_tokens_; ++token)
      guesses_.push_back(guesses[static_cast<size_t>(token * k + rank)]);
  prefetch_.stage(
      cpu_, layer_weights(layer).experts, guesses_, [&](int32_t e) { return table[static_cast<size_t>(e)] < 0; }, stop);
}

// Waits for a layer's flag and computes what it asks for. Errors: the stream's fault, as then no flag will come.
Status DeepseekV4GpuStep::answer(DevicePart& part, int layer, const StepShape& shape) {
  const DevicePart::Mail mail = part.mail(layer);
  if (shape.asks) prefetch_layer(part, layer, mail.flag[1]);
  TC_RETURN_IF_ERROR(await_flag(part.stream(), mail.flag[1], step_number_));
  const int64_t count = mail.flag[0], k = g_.n_activated_experts;
  clock_.skip();
  if (meddler_) meddler_(layer);
  if (count == 0) return prefetch_.missed({}), count_layer(layer, shape.tokens, 0), Status();
  std::fill_n(ids_.data(), shape.tokens * k, -1);
  std::fill_n(taken_.data(), shape.tokens, 0);
  for (int64_t i = 0; i < count; ++i) {
    const gpu::MissPair& miss = part.misses()[i];
    const int64_t at = miss.token * k + taken_[miss.token]++;
    ids_[at] = miss.expert;
    weights_[at] = miss.weight;
  }
  count_layer(layer, shape.tokens, count);
  prefetch_.missed({ids_.data(), static_cast<size_t>(shape.tokens * k)});
  compute_pairs(part, layer, shape.tokens, part.host_y());
  raise_answer(*mail.answer, step_number_);
  return {};
}

// What the routers chose goes to the schedulers, and what they decide to the slots.
void DeepseekV4GpuStep::observe_step(int64_t tokens, bool prefill) {
  counters_.pairs += tokens * g_.n_activated_experts * g_.n_layers;
  for (size_t p = 0; p < parts_.size(); ++p) {
    const PartOptions& o = parts_[p]->options();
    SlotPool& slots = parts_[p]->slots();
    sched::SlotScheduler& scheduler = *schedulers_[p];
    if (slots.slots() == 0 || (!scheduler.moves() && slots.residency().free_slots == 0)) continue;
    scheduler.observe(
        std::span(routed_ids_)
            .subspan(static_cast<size_t>(o.first_layer), static_cast<size_t>(o.last_layer - o.first_layer)),
        tokens, g_.n_activated_experts, prefill);
    for (const sched::Admission& a : scheduler.plan(slots.residency(), gpu_.idle_copies.idle(tokens))) {
      if (a.evicts()) slots.evict(a.victim);
      slots.fill(a.fill);
    }
  }
}

}  // namespace thermocline
