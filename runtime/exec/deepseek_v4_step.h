// The forward pass of DeepSeek-V4 over a Batch: embedding, layers, head, MTP block. Source: spec sections 3 and 4.
// One thread drives it; the workers of the pool compute. A token's logits depend on its own sequence only, whatever
// else is in the batch and however the prompt was split.
#pragma once

#include <algorithm>
#include <memory>
#include <span>

#include "kernels_cpu/attention.h"
#include "kernels_cpu/cpu_context.h"
#include "runtime/exec/near_keys.h"
#include "runtime/exec/numerics.h"
#include "runtime/exec/phase_clock.h"
#include "runtime/exec/step_executor.h"
#include "runtime/model/deepseek_v4/weights.h"

namespace thermocline {

class DeepseekV4Step : public StepExecutor {
 public:
  /// The geometry, weights and context outlive the object. Errors: out_of_memory.
  static Result<std::unique_ptr<DeepseekV4Step>> create(const ModelGeometry& geometry,
                                                        const deepseek_v4::Weights& weights, cpu::CpuContext cpu,
                                                        Numerics numerics, const ExecOptions& options);

  TensorView<const float, 2> logits() const override { return {b_.logits.data(), {logit_rows_, g_.vocab_size}}; }
  int64_t logit_row_count() const override { return logit_rows_; }
  TensorView<const float, 2> mtp_logits() const override { return {b_.mtp_logits.data(), {mtp_rows_, g_.vocab_size}}; }
  const cpu::WeightTraffic& traffic() const override { return traffic_; }

 protected:
  Result<StepReport> compute(const StepInput& input) override;

 private:
  using LayerWeights = deepseek_v4::LayerWeights;
  using Segments = std::vector<sched::Segment>;
  struct RowList {
    const SequenceKv& kv;
    int64_t first_pos = 0, window = 0, compressed = 0;
    const int32_t* selected = nullptr;  // [compressed]; null: the first ones
    int64_t count() const { return window + compressed; }
  };

  DeepseekV4Step(const ModelGeometry& geometry, const deepseek_v4::Weights& weights, cpu::CpuContext cpu,
                 Numerics numerics, const ExecOptions& options);

  void embed(std::span<const int32_t> ids);
  void rope_tables(const Segments& segments);
  void layer(int index, const LayerWeights& w, float* streams, std::span<const int32_t> ids, const Segments& segments);
  void hc_read(const deepseek_v4::HcWeights& hc, const float* streams, const float* norm, bool experts);
  void hc_mixes(const deepseek_v4::HcWeights& hc, const float* streams);
  void hc_write(float* streams);
  void attention(int index, const LayerWeights& w, const Segments& segments);
  void project_inputs(int index, const LayerWeights& w, bool scores);
  void store_raw_rows(int index, const LayerWeights& w, const Segments& segments);
  void project_queries(int index, const LayerWeights& w, bool scores);
  void compress(int index, const LayerWeights& w, const Segments& segments);
  void compress_row(int index, const sched::Segment& segment, const deepseek_v4::CompressorWeights& w, bool indexer,
                    int64_t row, int worker);
  void keep_projections(int index, const Segments& segments);
  void fill_rings(const Segments& segments);
  bool must_score(int index, const Segments& segments) const;
  void select_all(int index, const Segments& segments);
  void index_select(int index, const Segments& segments);
  void index_select_together(int index, const SequenceKv& kv, int64_t token, int64_t visible);
  void score_keys(int index, const SequenceKv& kv, int64_t token, int64_t begin, int64_t end, int worker,
                  float* scores);
  void score_near_keys(int index, const SequenceKv& kv, const NearKeys& near, int64_t token, int worker, float* scores);
  template <class KeysAt>
  void score_block(int64_t token, int64_t count, int worker, float* out, const KeysAt& keys_at);
  /// Key groups scored at a time: the kernel takes a pointer a group, of f32 keys one a key.
  int64_t key_block() const {
    return round_.cached_rows ? StepBuffers::kIndexBlock : StepBuffers::kIndexBlock / cpu::kKeyGroup;
  }
  RowList row_list(int index, int64_t token, const Segments& segments) const;
  void gather_rows(int index, const RowList& list, int64_t first, int64_t last, const void** rows,
                   bf16* unpacked) const;
  void attend(int index, const LayerWeights& w, const Segments& segments);
  void attend_apart(int index, const LayerWeights& w, const Segments& segments, const cpu::Attention& all);
  void attend_together(int index, const LayerWeights& w, const Segments& segments, int64_t first, int64_t count,
                       const cpu::Attention& all);
  void attend_heads(int index, const LayerWeights& w, int64_t token, int64_t head, const cpu::Attention& all,
                    int worker);
  void attend_row_blocks(int index, const LayerWeights& w, const RowList& list, int64_t token, int64_t first_head,
                         const cpu::Attention& all, int worker);
  void attend_split(int index, const LayerWeights& w, int64_t token, const cpu::Attention& all);
  void rotate_back(int index, int64_t token, float* out) const;
  void project_output(const LayerWeights& w);
  void moe(int index, const LayerWeights& w, std::span<const int32_t> ids);
  void ask_ahead(int index, const float* streams, std::span<const int32_t> ids);
  void route(int index, const LayerWeights& w, int64_t token, int32_t id);
  RoutedExperts routed() const {
    return {tokens_,     g_.n_activated_experts, options_.near_misses, options_.guesses,
            routed_ids_, routed_weights_,        routed_near_,         {routed_guesses_[0], routed_guesses_[1]}};
  }
  int64_t head(const float* streams, std::span<const int32_t> rows, const deepseek_v4::HcWeights& hc, const float* norm,
               float* logits);
  void collapse_streams(const float* streams, std::span<const int32_t> rows, const deepseek_v4::HcWeights& hc,
                        const float* norm);
  void mtp(std::span<const int32_t> next_ids, std::span<const int32_t> rows, const Segments& segments);

  cpu::GemmJob job(const cpu::PackedMatrix& w, const cpu::GemmInput& x, float* y, bool round) const;
  const cpu::GemmInput& linear_x() const { return round_.linear_inputs ? b_.linear_x : b_.plain_x; }
  void store_row(float* row, std::byte* out) const;
  void store_key(const float* key, int64_t row, std::byte* group) const;
  /// Calls fn(segment, first, last, worker) for tokens [first, last) of each segment, tokens split over the workers.
  template <class Fn>
  void for_segments(const Segments& segments, const Fn& fn);
  /// Calls fn(token, pos, sequence, worker) for every token of the step, tokens split over the workers.
  template <class Fn>
  void for_tokens(const Segments& segments, const Fn& fn);
  /// Where a token's projections of the ring's layer wait for the end of the step.
  float* ring_row(const KvLayout::Ring& ring, int64_t token) {
    return b_.ring_rows.data() + ring.token_offset * options_.max_tokens + token * ring.slot_floats();
  }

  const ModelGeometry& g_;
  const deepseek_v4::Weights& w_;
  cpu::WeightTraffic traffic_;
  const cpu::CpuContext cpu_, head_cpu_;  // what the second reads is of the head
  const Rounding round_;
  const cpu::InputFormat plain_, linear_,
      expert_;                         // how inputs are stored: as they are, of FP8 and FP4 linears, of routed experts
  std::vector<float> frequencies_[2];  // 0 window layers, 1 compressed layers
  StepBuffers b_;
  PhaseClock clock_;
  DistinctCounter distinct_;
  StepExperts counted_;                    // of the step that runs
  std::vector<double> layer_ns_;           // of the last step
  std::vector<cpu::GemmJob> output_jobs_;  // one a group of wo_a
  int64_t tokens_ = 0, logit_rows_ = 0, mtp_rows_ = 0;
  std::span<SequenceKv* const> sequences_;
  std::vector<const int32_t*> routed_ids_, routed_near_, routed_guesses_[2];  // by layer, of the last step
  std::vector<const float*> routed_weights_;
};

template <class Fn>
void DeepseekV4Step::for_segments(const Segments& segments, const Fn& fn) {
  cpu_.pool.split(tokens_, [&](int64_t begin, int64_t end, int worker) {
    for (const sched::Segment& segment : segments) {
      const int64_t first = std::max(begin, segment.first_token),
                    last = std::min(end, segment.first_token + segment.num_tokens);
      if (first < last) fn(segment, first, last, worker);
    }
  });
}

template <class Fn>
void DeepseekV4Step::for_tokens(const Segments& segments, const Fn& fn) {
  for_segments(segments, [&](const sched::Segment& segment, int64_t first, int64_t last, int worker) {
    for (int64_t token = first; token < last; ++token)
      fn(token, segment.first_pos + token - segment.first_token, *sequences_[segment.sequence], worker);
  });
}

}  // namespace thermocline
