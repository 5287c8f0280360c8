// DevicePart: one device and its layers of the model - weights, slots, KV pages, activations - and the kernels of a
// layer in the order the data moves. It queues and never waits; DeepseekV4GpuStep drives it.
#pragma once

#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "runtime/exec/device_weights.h"
#include "runtime/exec/slot_pool.h"
#include "runtime/exec/step_report.h"
#include "runtime/kv/kv_store.h"

namespace thermocline {

struct PartOptions {
  int first_layer = 0, last_layer = 0;  // main layers; the last part has the head, and the MTP layer
  int64_t max_tokens = 512, max_logit_rows = 1, max_context = 4096;
  bool mtp = false;
  bool round_linear = true;  // inputs of FP8 and FP4 linears to e4m3
  int experts = -1;          // slots; -1: all that fit
  int staging = 0;           // slots of experts that pass through in prefill
  int64_t hot_rows = 0;      // ExecOptions::hot_rows
  bool ask_ahead = false;    // steps of few tokens may ask routers a layer ahead
};

/// What varies between the launches of a step.
struct StepShape {
  int64_t tokens = 0, logit_rows = 0, mtp_rows = 0;
  bool scores = false;  // some token sees more compressed rows than it may attend to
  bool asks = false;    // routers are asked a layer ahead, for the CPU
};

class DevicePart {
 public:
  /// Bytes a part takes, known before the weights are loaded. Routed experts come on top: a slot each, of what is left.
  struct Sizes {
    int64_t dense = 0, window_pages = 0, scanned_pages = 0, selected_pages = 0, rings = 0;
    int64_t activations = 0, tables = 0, slot_table = 0;
    int64_t hot_rows = 0, hot_tables = 0, host_rows = 0;  // instead of selected_pages; host_rows is pinned
    int64_t slot = 0, experts = 0, staging = 0;           // bytes of a slot, experts of the layers, bytes of staging
    int64_t host_tables = 0, host_memory = 0, flags = 0;  // pinned
    int64_t page_capacity = 0, sequence_capacity = 0;     // of a step's tables

    int64_t kv() const { return window_pages + scanned_pages + selected_pages + rings + hot_rows + hot_tables; }
    int64_t buffers() const { return activations + tables; }
    /// Everything on the device but the slots of residents.
    int64_t fixed() const { return dense + kv() + buffers() + slot_table + staging + kSlack; }
    int64_t pinned() const { return host_tables + host_memory + flags + slot_table; }  // without host_rows
    static constexpr int64_t kSlack = 1 << 16;
  };
  /// `weights` may be shapes only (WeightLoader::shapes); of the cache the numbers count.
  static Sizes sizes(const ModelGeometry& g, const deepseek_v4::Weights& weights, const KvStore& kv,
                     const PartOptions& options);
  /// Sizes::activations, which need no weights.
  static int64_t activation_bytes(const ModelGeometry& g, const PartOptions& options);

  /// Errors: out_of_memory, with what takes how much.
  static Result<std::unique_ptr<DevicePart>> create(std::unique_ptr<gpu::Device> device, const ModelGeometry& g,
                                                    const deepseek_v4::Weights& weights, const KvStore& kv,
                                                    const PartOptions& options);

  ~DevicePart() {
    if (stream_) (void)stream_->synchronize();
  }

  gpu::Device& device() { return *device_; }
  gpu::Stream& stream() { return *stream_; }
  gpu::Event& done() { return *done_; }
  SlotPool& slots() { return *slots_; }
  const SlotPool& slots() const { return *slots_; }
  const PartOptions& options() const { return options_; }
  bool has_head() const { return options_.last_layer == g_.n_layers; }
  /// Bytes by use, for the log: "dense 1.2 GiB, 96 slots 0.9 GiB, ...".
  const std::string& memory_map() const { return memory_map_; }

  // --- the step's tables: written by the host in pinned memory, copied as one block ---
  struct Tables {
    uint32_t* step;
    gpu::TokenInfo* tokens;
    gpu::SequenceInfo* sequences;
    int32_t* pages;
    float *cos, *sin;  // [2 + ratios, tokens, rd / 2]
    int32_t *rows, *mtp_rows;
    bf16 *embed, *mtp_embed;  // [tokens, D]
  };
  /// Of a step of this shape; valid until the next call.
  Tables host_tables(const StepShape& shape);
  int64_t page_capacity() const { return page_capacity_; }
  const std::vector<int>& ratios() const { return ratios_; }
  /// This device's piece of a KV page; of compressed pages what steps scan.
  std::span<std::byte> kv_page(KvPool pool, int32_t page);
  /// The rows of a compressed page that the indexer selects from, on the device or in pinned memory.
  struct SelectedRows {
    std::span<std::byte> bytes;
    bool on_host = false;
  };
  SelectedRows selected_rows(int32_t page);
  /// Their copies on the device no longer count: queued.
  void forget_hot_rows(int32_t page);
  /// Of the steps since the last call: the device counts in 32 bits, round and round.
  HotRows take_hot_row_counts() {
    uint32_t delta[3];
    for (int i = 0; i < 3; ++i) delta[i] = host_.row_counts[i] - std::exchange(counted_rows_[i], host_.row_counts[i]);
    return {delta[0], delta[1], delta[2]};
  }

  /// Tokens of a step that may ask, at most: with more the CPU has no time to spare.
  static constexpr int64_t kAskTokens = 8;
  /// What the router of a layer, asked a layer ahead, said in step `step`: [tokens, k]; empty: not yet, or never.
  std::span<const int32_t> asked(int layer, uint32_t step) const;

  // --- kernels, in order ---
  void begin(const StepShape& shape);  // copies the tables
  void embed();
  void receive_streams(DevicePart& from);
  void attention(int layer);
  /// Router and split; hands the missing pairs to the CPU; hits and the shared expert run meanwhile.
  void experts_begin(int layer);
  /// Takes the CPU's pairs, adds up, writes the streams.
  void experts_end(int layer);
  void head();  // the logits stay on the device, the most likely ids come to the host
  void fetch_logits(int64_t rows);
  void mtp();  // the MTP layer's input; then attention, experts_* of layer n_layers, and mtp_head
  void mtp_head();
  /// Streams and chosen experts to host memory, for observers and policies.
  void read_streams(float* out);
  void end();

  // --- prefill with streaming: the host splits the pairs ---
  void route_for_host(int layer);  // scores, ids and x to pinned memory; `routed` is recorded
  gpu::Event& routed() { return *routed_; }
  void shared_expert(int layer);
  /// Runs resident and staged experts by a table of slots (pinned, one row a wave).
  void run_wave(int layer, int wave, std::span<const int32_t> slot_of);
  void take_pairs(int64_t first_pair, int64_t count);  // of host_y, which lie by pair
  void write_streams(int layer);
  static constexpr int kMaxWaves = 64;
  /// Of a half of the staging slots: its last wave is done with it; its next experts are there.
  gpu::Event& staging_free(int side) { return *staging_free_[side]; }
  gpu::Event& staging_filled(int side) { return *staging_filled_[side]; }
  /// One expert, in staging slot 0, for `tokens` tokens of whatever lies in the buffers.
  void expert_for_timing(int64_t tokens);

  // --- what the host reads and writes, in pinned memory ---
  struct Mail {
    uint32_t* flag;    // [2]: pairs, step
    uint32_t* answer;  // [1]: step
  };
  Mail mail(int layer) const {
    uint32_t* const p = reinterpret_cast<uint32_t*>(flags_.data()) + 64 * (layer - options_.first_layer);
    return {p, p + 16};
  }
  const gpu::MissPair* misses() const { return host_.misses; }
  const bf16* host_x() const { return host_.x; }
  bf16* host_y() { return host_.y; }
  const int32_t* host_ids(int layer) const { return host_.ids + ids_at(layer); }
  const float* host_weights() const { return host_.weights; }
  const float* logits() const { return host_.logits; }
  const int32_t* most_likely() const { return host_.most_likely; }
  const float* mtp_logits() const { return host_.mtp_logits; }

 private:
  DevicePart(const ModelGeometry& g, const PartOptions& options, const KvLayout& layout)
      : g_(g), options_(options), layout_(layout) {}

  struct Buffers;   // device activations
  struct HostMail;  // pinned
  struct HotTables;
  /// Splits of the rows a token may attend to.
  static int64_t max_splits(const ModelGeometry& g, int64_t context);
  template <class Place>
  static void carve(Buffers& b, const ModelGeometry& g, const PartOptions& o, Place&& place);
  template <class Place>
  static void carve_hot(HotTables& hot, const KvLayout& layout, int64_t pages, int64_t slots, Place&& place);
  template <class Place>
  static void carve_host(HostMail& mail, const ModelGeometry& g, const PartOptions& o, Place&& place);
  static KvLayout layout_of(const ModelGeometry& g, const KvStore& kv, const PartOptions& o);
  static std::vector<const deepseek_v4::LayerWeights*> layers_of(const ModelGeometry& g,
                                                                 const deepseek_v4::Weights& weights,
                                                                 const PartOptions& o);
  struct Linear {
    const gpu::DeviceMatrix* w;
    const bf16* x;
    int64_t x_stride;
    float* y;
    int64_t y_stride;
    bool round = true;
    int64_t first_group = 0, groups = -1;
    int64_t rows = -1;
  };
  void gemm(std::initializer_list<Linear> linears);
  void gemm(std::span<const Linear> linears);
  /// What reading the streams makes.
  struct Mixed {
    float *mixes, *post, *comb;
    bf16 *plain, *linear;
  };
  void hc_read(const DeviceHc& hc, const gpu::DeviceView<const float, 1>& norm, const Mixed& out);
  void hc_read(const DeviceHc& hc, const gpu::DeviceView<const float, 1>& norm) {
    hc_read(hc, norm, {b_.mixes, b_.post, b_.comb, b_.plain, b_.linear});
  }
  void ask_ahead(int layer);
  LayerKind kind_of(int layer) const;
  void project_inputs(int layer);
  void compress(int layer);
  void choose_rows(int layer);
  void stage_rows(int layer);
  void attend(int layer);
  void project_output(int layer);
  void route(int layer);
  void partition(int layer, const gpu::DeviceView<const int32_t, 1>& slot_of);
  void gate_up_down(const std::byte* slots, const gpu::DeviceView<const gpu::ExpertItem, 1>& items, int64_t item_pairs,
                    bool routed);
  void logits_of(const DeviceHc& hc, const gpu::DeviceView<const float, 1>& norm, const int32_t* rows, int64_t count,
                 float* out);
  int64_t pairs() const { return shape_.tokens * g_.n_activated_experts; }
  int64_t ids_at(int layer) const { return (layer - options_.first_layer) * pairs(); }
  gpu::LayerPages pages(int layer) const;
  Status allocate_kv(const Sizes& s, int64_t pages);
  int64_t page_entries() const { return layout_.selected_page_bytes() / layout_.row_bytes(); }
  const DeviceLayer& layer(int index) const {
    return weights_.layers[static_cast<size_t>(index - options_.first_layer)];
  }
  gpu::DeviceView<float, 3> streams() const;
  int64_t item_pairs() const { return shape_.tokens <= 8 ? 8 : shape_.tokens <= 16 ? 16 : 64; }
  int64_t max_items() const;

  const ModelGeometry& g_;
  const PartOptions options_;
  const KvLayout layout_;
  std::unique_ptr<gpu::Device> device_;
  std::unique_ptr<gpu::Stream> stream_;
  std::unique_ptr<gpu::Event> done_, routed_, staging_free_[2], staging_filled_[2];
  std::unique_ptr<SlotPool> slots_;
  DeviceWeights weights_;
  gpu::DeviceBuffer window_pages_, scanned_pages_, selected_pages_, rings_, activations_, tables_;
  gpu::DeviceBuffer hot_rows_, hot_tables_;
  gpu::PinnedBuffer host_tables_, flags_, host_memory_, host_rows_;
  std::vector<int> ratios_;  // distinct, > 0
  int64_t page_capacity_ = 0, sequence_capacity_ = 0;
  std::string memory_map_;

  struct Buffers {
    float *streams, *mtp_streams, *mixes, *post, *comb, *y;
    bf16 *plain, *linear;
    float *qr, *kv, *a, *z, *index_a, *index_z, *q, *index_q, *gates, *index_scores, *u, *partial;
    bf16 *qr_linear, *q_bf16, *index_q_bf16, *o, *u_linear;
    int32_t* selected;
    float* scores;
    int32_t* ids;  // [layers, tokens, k]
    float* weights;
    int32_t *pair_token, *pair_of, *counts;
    float* pair_weight;
    gpu::ExpertItem *items, *shared_items;
    uint32_t* arrived;
    bf16 *h, *pair_y, *shared_h, *shared_y;
    int32_t* wave_table;  // [waves, E]
    float* head_mixes;
    bf16* hidden;
    float *logits, *mtp_logits;
    int32_t* most_likely;
    // Of routers asked ahead, kAskTokens each.
    Mixed ahead;
    float *ahead_scores, *ahead_weights;
    int32_t* ahead_ids;
    int64_t score_tokens;    // tokens whose index scores fit at once
    int64_t partial_tokens;  // tokens whose attention partials fit at once
  } b_{};
  struct HostMail {
    gpu::MissPair* misses;
    bf16 *x, *y;
    int32_t* ids;
    float *weights, *logits, *mtp_logits;
    int32_t* most_likely;
    int32_t* wave_table;
    uint32_t* row_counts;
    int32_t* ahead_ids;     // [layers, kAskTokens, k]
    uint32_t* ahead_steps;  // [layers]: of which step they are
  } host_{};
  /// Which rows have copies, by layer one after the other where not said otherwise.
  struct HotTables {
    int32_t* slot_of;   // [pages, page_entries()]
    int32_t* no_slots;  // [page_entries()] kNoSlot: what forgetting a page copies
    int32_t* entry_of;  // [layers, slots]
    uint32_t* used;     // [layers, slots]
    uint32_t* hand;     // [layers]
    uint32_t* counts;   // [3]
  } hot_{};

  uint32_t counted_rows_[3] = {};

  // Of the step being queued.
  StepShape shape_;
  gpu::StepTables step_;
  gpu::DeviceView<const int32_t, 1> rows_, mtp_rows_;
  const bf16 *embed_ = nullptr, *mtp_embed_ = nullptr;
  size_t table_bytes_ = 0;
  bool on_mtp_ = false;          // the streams are the MTP block's
  std::vector<Linear> grouped_;  // of one output projection
};

}  // namespace thermocline
