#include "runtime/exec/deepseek_v4_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels_cpu/attention.h"
#include "kernels_cpu/ref/ops.h"
#include "runtime/base/number_formats.h"

namespace thermocline {
namespace ref = cpu::ref;
using cpu::PackedMatrix;
using deepseek_v4::HcWeights;
using sched::Phase;
using sched::Segment;

namespace {

bool experts_take_int8(const cpu::KernelTable& table, const deepseek_v4::Weights& weights) {
  const auto& experts = weights.layers[0].experts;
  return cpu::takes_int8(table, experts[0].w1) && cpu::takes_int8(table, experts[0].w2);
}

// Of those that `may` be, the experts with the highest scores, by falling score; of equal ones the lower first.
template <class Score, class May>
void best_experts(int experts, const Score& score, const May& may, std::span<int32_t> out) {
  size_t kept = 0;
  for (int32_t e = 0; e < experts; ++e) {
    if (!may(e) || (kept == out.size() && !(score(e) > score(out[kept - 1])))) continue;
    size_t place = kept < out.size() ? kept++ : kept - 1;
    for (; place > 0 && score(e) > score(out[place - 1]); --place) out[place] = out[place - 1];
    out[place] = e;
  }
}

}  // namespace

DeepseekV4Step::DeepseekV4Step(const ModelGeometry& geometry, const deepseek_v4::Weights& weights, cpu::CpuContext cpu,
                               Numerics numerics, const ExecOptions& options)
    : StepExecutor(options),
      g_(geometry),
      w_(weights),
      traffic_(cpu.pool.size(), cpu.pool.nodes()),
      cpu_{cpu.pool, cpu.table, &traffic_},
      head_cpu_{cpu.pool, cpu.table, &traffic_, cpu::WeightKind::head},
      round_(rounding_of(numerics)),
      plain_{cpu.table.activation, false},
      linear_{cpu.table.activation, round_.linear_inputs},
      expert_(options.int8_activations && experts_take_int8(cpu.table, weights)
                  ? cpu::InputFormat{cpu::Activation::int8, false}
                  : linear_),
      distinct_(geometry.n_routed_experts) {
  frequencies_[0] = ref::rope_frequencies(g_.rope_head_dim, g_.rope_theta);
  frequencies_[1] = ref::rope_frequencies(g_.rope_head_dim, g_.compress_rope_theta, g_.rope_factor, g_.original_seq_len,
                                          g_.beta_fast, g_.beta_slow);
  routed_ids_.resize(static_cast<size_t>(g_.n_layers));
  routed_weights_.resize(routed_ids_.size());
  layer_ns_.resize(routed_ids_.size());
  routed_near_.resize(options.near_misses > 0 ? routed_ids_.size() : 0);
  for (auto& guesses : routed_guesses_) guesses.resize(options.guesses > 0 ? routed_ids_.size() : 0);
}

Result<std::unique_ptr<DeepseekV4Step>> DeepseekV4Step::create(const ModelGeometry& geometry,
                                                               const deepseek_v4::Weights& weights, cpu::CpuContext cpu,
                                                               Numerics numerics, const ExecOptions& options) {
  std::unique_ptr<DeepseekV4Step> step(new DeepseekV4Step(geometry, weights, cpu, numerics, options));
  TC_ASSIGN(step->b_, StepBuffers::allocate(geometry, options, cpu.pool.size()));
  return step;
}

Result<StepReport> DeepseekV4Step::compute(const StepInput& input) {
  const auto& [batch, sequences, next_ids, stop] = input;
  TC_RETURN_IF_ERROR(check(g_, options_, batch, sequences));
  clock_.start();
  counted_ = {};
  sequences_ = sequences;
  tokens_ = batch.size();
  const WorkerPool::StepScope scope(cpu_.pool);
  traffic_.reset();
  for (const Segment& segment : batch.segments)
    TC_RETURN_IF_ERROR(sequences[segment.sequence]->reserve(segment.num_tokens));
  embed(batch.token_ids);
  rope_tables(batch.segments);
  logit_rows_ = mtp_rows_ = 0;
  for (int i = 0; i < g_.n_layers; ++i) {
    if (stop && stop->stop_requested()) return nobody_wants_it();
    const double begin = clock_.elapsed_ns();
    layer(i, w_.layers[i], b_.streams.data(), batch.token_ids, batch.segments);
    layer_ns_[static_cast<size_t>(i)] = clock_.elapsed_ns() - begin;
    if (observer_) observer_(i, {b_.streams.data(), {tokens_, g_.hc_mult, g_.dim}});
  }
  clock_.lap(Phase::dense);
  logit_rows_ = head(b_.streams.data(), batch.logit_rows, w_.hc_head, w_.norm, b_.logits.data());
  clock_.lap(Phase::head);
  if (!next_ids.empty() && !w_.mtp.empty()) mtp(next_ids, batch.logit_rows, batch.segments);
  fill_rings(batch.segments);
  for (const Segment& segment : batch.segments) sequences[segment.sequence]->commit(segment.num_tokens);
  clock_.lap(Phase::dense);
  const int64_t k = g_.n_activated_experts;
  for (int64_t i = 0; i < g_.n_layers; ++i) {
    routed_ids_[static_cast<size_t>(i)] = &b_.expert_ids[i * tokens_ * k];
    routed_weights_[static_cast<size_t>(i)] = &b_.expert_weights[i * tokens_ * k];
    if (!routed_near_.empty()) routed_near_[static_cast<size_t>(i)] = &b_.near_ids[i * tokens_ * options_.near_misses];
    for (int d = 0; d < 2 && options_.guesses > 0; ++d)
      routed_guesses_[d][static_cast<size_t>(i)] = &b_.guess_ids[d][i * tokens_ * options_.guesses];
  }
  return StepReport{tokens_, logit_rows_, clock_.time(), traffic_.total_bytes(), counted_, routed(), {}, layer_ns_};
}

cpu::GemmJob DeepseekV4Step::job(const PackedMatrix& w, const cpu::GemmInput& x, float* y, bool round) const {
  return {.w = &w, .x = &x, .rows = {0, x.rows()}, .y = y, .y_stride = w.n, .round = round && round_.results};
}

// Every stream starts as the token's embedding.
void DeepseekV4Step::embed(std::span<const int32_t> ids) {
  cpu_.pool.split(tokens_, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      float* streams = &b_.streams[token * g_.hc_mult * g_.dim];
      const bf16* row = w_.embed + static_cast<int64_t>(ids[token]) * g_.dim;
      for (int64_t d = 0; d < g_.dim; ++d) streams[d] = bf16_to_float(row[d]);
      for (int s = 1; s < g_.hc_mult; ++s) std::copy_n(streams, g_.dim, streams + s * g_.dim);
    }
  });
}

void DeepseekV4Step::rope_tables(const Segments& segments) {
  const int64_t pairs = g_.rope_head_dim / 2;
  for_tokens(segments, [&](int64_t token, int64_t pos, SequenceKv&, int) {
    for (int table = 0; table < 2; ++table)
      ref::rope_angles(frequencies_[table], pos, &b_.cos[table][token * pairs], &b_.sin[table][token * pairs]);
  });
}

void DeepseekV4Step::layer(int index, const LayerWeights& w, float* streams, std::span<const int32_t> ids,
                           const Segments& segments) {
  hc_read(w.hc_attn, streams, w.attn_norm, false);  // b.x and its inputs, b.post, b.comb
  attention(index, w, segments);                    // b.y
  hc_write(streams);
  if (options_.guesses > 0 && index < g_.n_layers) ask_ahead(index, streams, ids);
  hc_read(w.hc_ffn, streams, w.ffn_norm, true);
  moe(index, w, ids);  // b.y
  hc_write(streams);
}

// Mixes S streams to one, norms it and lays it out as the inputs of the linears. The mixing weights are a small f32
// GEMM over the flattened streams.
void DeepseekV4Step::hc_read(const HcWeights& hc, const float* streams, const float* norm, bool experts) {
  const int64_t width = g_.hc_mult * g_.dim, outputs = g_.hc_outputs();
  const int s = g_.hc_mult;
  hc_mixes(hc, streams);
  b_.plain_x.reshape(cpu_.table, plain_.activation, tokens_, g_.dim);
  if (round_.linear_inputs) b_.linear_x.reshape(cpu_.table, linear_.activation, tokens_, g_.dim);
  const bool int8 = experts && expert_.activation == cpu::Activation::int8;
  if (int8) b_.int8_x.reshape(cpu_.table, expert_.activation, tokens_, g_.dim);
  const cpu::RowRange all{0, tokens_};
  cpu_.pool.split(tokens_, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      const float* in = streams + token * width;
      float* mixes = &b_.mixes[token * outputs];
      const float scale = 1.0f / std::sqrt(cpu_.table.sum_squares(in, width) / static_cast<float>(width) + g_.norm_eps);
      for (int64_t n = 0; n < outputs; ++n) mixes[n] *= scale;
      ref::hc_split(mixes, hc.scale, hc.base, s, g_.hc_sinkhorn_iters, g_.hc_eps, &b_.pre[token * s],
                    &b_.post[token * s], &b_.comb[token * s * s]);
      float* x = &b_.x[token * g_.dim];
      ref::hc_read(in, &b_.pre[token * s], s, g_.dim, round_.results, x);
      cpu::rms_norm(cpu_.table, x, norm, g_.dim, g_.norm_eps, round_.results, x);
      cpu::store_row(plain_, x, g_.dim, b_.plain_x.row(all, token));
      if (int8) cpu::store_row(expert_, x, g_.dim, b_.int8_x.row(all, token));
      if (round_.linear_inputs) cpu::store_row(linear_, x, g_.dim, b_.linear_x.row(all, token));  // rounds x
    }
  });
}

// Reads the mixing weights once a step: outputs are split over the workers, and with them the weights.
void DeepseekV4Step::hc_mixes(const HcWeights& hc, const float* streams) {
  cpu::WeightTraffic::Timer timer(&traffic_);
  const int64_t width = g_.hc_mult * g_.dim, outputs = g_.hc_outputs();
  timer.reads(cpu::WeightKind::other, outputs * width * 4);
  cpu_.pool.run([&](int worker) {
    const WorkerPool::Team& team = cpu_.pool.team(worker);
    const int64_t first = outputs * worker / cpu_.pool.size(), last = outputs * (worker + 1) / cpu_.pool.size();
    if (first == last) return;
    traffic_.add(worker, team.node, (last - first) * width * 4);
    for (int64_t token = 0; token < tokens_; ++token)
      cpu_.table.gemv_f32(hc.fn_on(team.node) + first * width, streams + token * width, last - first, width,
                          &b_.mixes[token * outputs + first]);
  });
}

void DeepseekV4Step::hc_write(float* streams) {
  const int s = g_.hc_mult;
  cpu_.pool.split(tokens_, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token)
      ref::hc_write(streams + token * s * g_.dim, &b_.y[token * g_.dim], &b_.post[token * s], &b_.comb[token * s * s],
                    s, g_.dim, round_.results);
  });
}

// What the routers of the next layers would choose, of the streams as they are now: mixed as those layers mix them. It
// leaves what the next hc_read writes anyway.
void DeepseekV4Step::ask_ahead(int index, const float* streams, std::span<const int32_t> ids) {
  clock_.lap(Phase::dense);
  const int experts = g_.n_routed_experts, k = g_.n_activated_experts, wanted = options_.guesses;
  const auto none = [&](int distance, int layer) {
    std::fill_n(&b_.guess_ids[distance - 1][layer * tokens_ * wanted], tokens_ * wanted, -1);
  };
  for (int distance = 1; distance <= 2; ++distance) {
    if (index < distance) none(distance, index);  // nobody could ask these
    if (index + distance >= g_.n_layers) continue;
    const LayerWeights& w = w_.layers[static_cast<size_t>(index + distance)];
    const bool by_token = w.tid2eid != nullptr;
    if (!by_token) {
      hc_read(w.hc_ffn, streams, w.ffn_norm, false);
      cpu::gemm(cpu_, w.gate, b_.plain_x, b_.scores.data(), false);
    }
    cpu_.pool.split(tokens_, [&](int64_t begin, int64_t end, int) {
      for (int64_t token = begin; token < end; ++token) {
        int32_t* const out = &b_.guess_ids[distance - 1][((index + distance) * tokens_ + token) * wanted];
        if (by_token) {
          std::fill_n(out, wanted, -1);
          std::copy_n(w.tid2eid + static_cast<int64_t>(ids[static_cast<size_t>(token)]) * k, std::min(k, wanted), out);
          continue;
        }
        float* const scores = &b_.scores[token * experts];
        for (int e = 0; e < experts; ++e)
          scores[e] = ref::sqrt_softplus(scores[e]) + (w.gate_bias ? w.gate_bias[e] : 0);
        best_experts(
            experts, [&](int32_t e) { return scores[e]; }, [](int32_t) { return true; },
            {out, static_cast<size_t>(wanted)});
      }
    });
  }
  clock_.skip();
}

// The experts of a token, from its scores.
void DeepseekV4Step::route(int index, const LayerWeights& w, int64_t token, int32_t id) {
  const int experts = g_.n_routed_experts, k = g_.n_activated_experts;
  float* scores = &b_.scores[token * experts];
  const int64_t at = (index * tokens_ + token) * k;
  int32_t* chosen = &b_.expert_ids[at];
  for (int e = 0; e < experts; ++e) scores[e] = ref::sqrt_softplus(scores[e]);
  if (w.tid2eid) {
    std::copy_n(w.tid2eid + static_cast<int64_t>(id) * k, k, chosen);
    ref::route_given(scores, chosen, k, g_.route_scale, &b_.expert_weights[at]);
  } else {
    ref::route(scores, w.gate_bias, experts, k, g_.route_scale, chosen, &b_.expert_weights[at]);
  }
  const int near = options_.near_misses;
  if (near == 0 || index >= g_.n_layers) return;
  const auto biased = [&](int32_t e) { return scores[e] + (w.gate_bias ? w.gate_bias[e] : 0); };
  best_experts(experts, biased, [&](int32_t e) { return std::find(chosen, chosen + k, e) == chosen + k; },
               {&b_.near_ids[(index * tokens_ + token) * near], static_cast<size_t>(near)});
}

void DeepseekV4Step::moe(int index, const LayerWeights& w, std::span<const int32_t> ids) {
  const int64_t k = g_.n_activated_experts, first = index * tokens_ * k;
  cpu::gemm(cpu_, w.gate, b_.plain_x, b_.scores.data(), false);  // the router stays in float32
  cpu_.pool.split(tokens_, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) route(index, w, token, ids[static_cast<size_t>(token)]);
  });
  if (index < g_.n_layers) {
    const int64_t different = distinct_.count({&b_.expert_ids[first], static_cast<size_t>(tokens_ * k)});
    counted_.layers += 1;
    counted_.layers_with_miss += 1;
    counted_.experts += different;
    counted_.cpu_experts += different;
    counted_.pairs += tokens_ * k;
    counted_.cpu_pairs += tokens_ * k;
  }
  clock_.lap(Phase::dense);
  const cpu::GemmInput& routed_x = expert_.activation == cpu::Activation::int8 ? b_.int8_x : linear_x();
  cpu::moe(cpu_, w.experts, &w.shared_expert, routed_x, linear_x(), {&b_.expert_ids[first], {tokens_, k}},
           {&b_.expert_weights[first], {tokens_, k}}, {g_.swiglu_limit, round_.results, expert_, linear_}, b_.moe,
           b_.y.data());
  clock_.lap(Phase::experts_cpu);
}

// The streams of the wanted tokens times the vocabulary.
int64_t DeepseekV4Step::head(const float* streams, std::span<const int32_t> rows, const HcWeights& hc,
                             const float* norm, float* logits) {
  const int64_t count = static_cast<int64_t>(rows.size());
  if (count == 0) return 0;
  collapse_streams(streams, rows, hc, norm);
  cpu::prepare(cpu_, TensorView<const float, 2>(b_.hidden.data(), {count, g_.dim}), plain_, b_.head_input);
  cpu::gemm(head_cpu_, w_.head, b_.head_input, logits, false);
  return count;
}

// The streams of each row become one, normed: b.hidden. Each worker with rows reads the mixing weights.
void DeepseekV4Step::collapse_streams(const float* streams, std::span<const int32_t> rows, const HcWeights& hc,
                                      const float* norm) {
  const int64_t width = g_.hc_mult * g_.dim, bytes = g_.hc_mult * width * 4, count = static_cast<int64_t>(rows.size());
  cpu::WeightTraffic::Timer timer(&traffic_);
  timer.reads(cpu::WeightKind::head, std::min<int64_t>(count, cpu_.pool.size()) * bytes);
  cpu_.pool.split(count, [&](int64_t begin, int64_t end, int worker) {
    traffic_.add(worker, cpu_.pool.team(worker).node, bytes);
    for (int64_t i = begin; i < end; ++i) {
      const float* in = streams + rows[i] * width;
      float* mix = &b_.mixes[i * g_.hc_outputs()];
      cpu_.table.gemv_f32(hc.fn_on(cpu_.pool.team(worker).node), in, g_.hc_mult, width, mix);
      const float scale = 1.0f / std::sqrt(cpu_.table.sum_squares(in, width) / static_cast<float>(width) + g_.norm_eps);
      for (int s = 0; s < g_.hc_mult; ++s)
        mix[s] = 1.0f / (1.0f + std::exp(-(mix[s] * scale * hc.scale[0] + hc.base[s]))) + g_.hc_eps;
      float* hidden = &b_.hidden[i * g_.dim];
      ref::hc_read(in, mix, g_.hc_mult, g_.dim, round_.results, hidden);
      cpu::rms_norm(cpu_.table, hidden, norm, g_.dim, g_.norm_eps, round_.results, hidden);
    }
  });
}

// The MTP block on every token whose successor is known: one whole layer on streams made of the main model's streams
// and the next token's embedding.
void DeepseekV4Step::mtp(std::span<const int32_t> next_ids, std::span<const int32_t> rows, const Segments& segments) {
  const deepseek_v4::MtpWeights& w = w_.mtp[0];
  const int64_t s = g_.hc_mult, d = g_.dim;
  std::vector<int32_t> ids(next_ids.begin(), next_ids.end()), known;
  for (int32_t& id : ids) id = std::max(id, 0);  // a token without a successor is computed and never read
  for (const int32_t row : rows)
    if (next_ids[row] >= 0) known.push_back(row);
  cpu_.pool.split(tokens_, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      float* e = &b_.x[token * d];
      const bf16* embedding = w_.embed + static_cast<int64_t>(ids[token]) * d;
      for (int64_t i = 0; i < d; ++i) e[i] = bf16_to_float(embedding[i]);
      cpu::rms_norm(cpu_.table, e, w.enorm, d, g_.norm_eps, round_.results, e);
      for (int64_t j = token * s; j < (token + 1) * s; ++j)
        cpu::rms_norm(cpu_.table, &b_.streams[j * d], w.hnorm, d, g_.norm_eps, round_.results, &b_.streams[j * d]);
    }
  });
  cpu::prepare(cpu_, TensorView<const float, 2>(b_.x.data(), {tokens_, d}), linear_, b_.linear_x);
  cpu::gemm(cpu_, w.e_proj, b_.linear_x, b_.y.data(), round_.results);
  cpu::prepare(cpu_, TensorView<const float, 2>(b_.streams.data(), {tokens_ * s, d}), linear_, b_.linear_x);
  cpu::gemm(cpu_, w.h_proj, b_.linear_x, b_.mtp_streams.data(), round_.results);
  cpu_.pool.split(tokens_ * s, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      float* z = &b_.mtp_streams[i * d];
      const float* e = &b_.y[i / s * d];
      for (int64_t j = 0; j < d; ++j) z[j] += e[j];
      if (round_.results) ref::round_to_bf16(z, d);
    }
  });
  layer(g_.n_layers, w.layer, b_.mtp_streams.data(), ids, segments);
  mtp_rows_ = head(b_.mtp_streams.data(), known, w.hc_head, w.norm, b_.mtp_logits.data());
}

}  // namespace thermocline
