#include "runtime/exec/device_part.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels_cpu/indexer.h"

namespace thermocline {
namespace {

using gpu::CopyKind;
using gpu::DeviceView;

constexpr int64_t kScoreBytes = int64_t{64} << 20;    // of index scores; longer steps go in waves
constexpr int64_t kPartialBytes = int64_t{96} << 20;  // of attention partials; longer steps go in waves

int64_t align256(int64_t bytes) { return (bytes + 255) / 256 * 256; }

/// Hands out pieces of a block, or adds up what they need.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <class T>
  T* operator()(int64_t count) {
    T* const p = reinterpret_cast<T*>(base_ + at_);
    at_ += align256(count * static_cast<int64_t>(sizeof(T)));
    return p;
  }
  int64_t bytes() const { return at_; }

 private:
  std::byte* base_;
  int64_t at_ = 0;
};

// Distinct compress ratios of the main layers.
std::vector<int> ratios_of(const ModelGeometry& g) {
  std::vector<int> ratios;
  for (int i = 0; i < g.n_layers; ++i)
    if (const int ratio = g.compress_ratios[static_cast<size_t>(i)];
        ratio > 0 && std::find(ratios.begin(), ratios.end(), ratio) == ratios.end())
      ratios.push_back(ratio);
  return ratios;
}

std::string mib(int64_t bytes) { return fmt::format("{:.1f} MiB", static_cast<double>(bytes) / (1 << 20)); }

}  // namespace

int64_t DevicePart::max_splits(const ModelGeometry& g, int64_t context) {
  int64_t compressed = 0;
  for (int i = 0; i < g.n_layers; ++i) {
    if (g.kind(i) == LayerKind::csa) compressed = std::max(compressed, std::min(g.index_topk, context / 4));
    if (g.kind(i) == LayerKind::hca)
      compressed = std::max(compressed, context / g.compress_ratios[static_cast<size_t>(i)]);
  }
  return (std::min(g.window_size, context) + compressed + gpu::kAttentionSplit - 1) / gpu::kAttentionSplit;
}

template <class Place>
void DevicePart::carve(Buffers& b, const ModelGeometry& g, const PartOptions& o, Place&& place) {
  const int64_t m = o.max_tokens, k = g.n_activated_experts, pairs = m * k, heads = int64_t{g.n_heads} * g.head_dim;
  const int64_t rows = std::min(m, o.max_logit_rows), layers = o.last_layer - o.first_layer + 1;
  const auto f = [&](float*& p, int64_t n) { p = place.template operator()<float>(n); };
  const auto h = [&](bf16*& p, int64_t n) { p = place.template operator()<bf16>(n); };
  const auto i = [&](int32_t*& p, int64_t n) { p = place.template operator()<int32_t>(n); };
  f(b.streams, m * g.hc_mult * g.dim);
  f(b.mtp_streams, o.mtp ? m * g.hc_mult * g.dim : 0);
  f(b.mixes, m * (g.hc_outputs() + 1));
  f(b.post, m * g.hc_mult);
  f(b.comb, m * g.hc_mult * g.hc_mult);
  f(b.y, m * g.dim);
  h(b.plain, m * g.dim);
  h(b.linear, (o.mtp ? m * g.hc_mult : m) * g.dim);
  f(b.qr, m * g.q_lora_rank);
  f(b.kv, m * g.head_dim);
  f(b.a, m * 2 * g.head_dim);
  f(b.z, m * 2 * g.head_dim);
  f(b.index_a, m * 2 * g.index_head_dim);
  f(b.index_z, m * 2 * g.index_head_dim);
  f(b.q, m * heads);
  f(b.index_q, m * g.index_n_heads * g.index_head_dim);
  f(b.gates, m * g.index_n_heads);
  b.score_tokens = std::clamp<int64_t>(kScoreBytes / 4 / (o.max_context / 4 + 1), 1, m);
  f(b.index_scores, b.score_tokens * (o.max_context / 4 + 1));
  f(b.u, m * g.o_groups * g.o_lora_rank);
  const int64_t splits = max_splits(g, o.max_context), token_bytes = splits * g.n_heads * (g.head_dim + 2) * 4;
  b.partial_tokens = std::clamp<int64_t>(kPartialBytes / token_bytes, 1, m);
  f(b.partial, b.partial_tokens * token_bytes / 4);
  h(b.qr_linear, m * g.q_lora_rank);
  h(b.q_bf16, m * heads);
  h(b.index_q_bf16, m * g.index_n_heads * g.index_head_dim);
  h(b.o, m * heads);
  h(b.u_linear, m * g.o_groups * g.o_lora_rank);
  i(b.selected, m * g.index_topk);
  f(b.scores, m * g.n_routed_experts);
  i(b.ids, layers * pairs);
  f(b.weights, pairs);
  i(b.pair_token, pairs);
  i(b.pair_of, pairs);
  i(b.counts, 2);
  f(b.pair_weight, pairs);
  b.items = place.template operator()<gpu::ExpertItem>(pairs);
  b.shared_items = place.template operator()<gpu::ExpertItem>((m + 7) / 8 * 3);
  b.arrived = place.template operator()<uint32_t>(1);
  h(b.h, pairs * g.moe_inter_dim);
  h(b.pair_y, pairs * g.dim);
  h(b.shared_h, m * g.moe_inter_dim);
  h(b.shared_y, m * g.dim);
  i(b.wave_table, kMaxWaves * g.n_routed_experts);
  const int64_t asks = o.ask_ahead ? std::min(m, kAskTokens) : 0;
  f(b.ahead.mixes, asks * (g.hc_outputs() + 1));
  f(b.ahead.post, asks * g.hc_mult);
  f(b.ahead.comb, asks * g.hc_mult * g.hc_mult);
  h(b.ahead.plain, asks * g.dim);
  h(b.ahead.linear, asks * g.dim);
  f(b.ahead_scores, asks * g.n_routed_experts);
  f(b.ahead_weights, asks * k);
  i(b.ahead_ids, asks * k);
  f(b.head_mixes, rows * (g.hc_mult + 1));
  h(b.hidden, rows * g.dim);
  f(b.logits, rows * g.vocab_size);
  f(b.mtp_logits, o.mtp ? rows * g.vocab_size : 0);
  i(b.most_likely, rows);
}

template <class Place>
void DevicePart::carve_host(HostMail& mail, const ModelGeometry& g, const PartOptions& o, Place&& place) {
  const int64_t m = o.max_tokens, pairs = m * g.n_activated_experts, rows = std::min(m, o.max_logit_rows);
  const int64_t layers = o.last_layer - o.first_layer + 1, asks = o.ask_ahead ? std::min(m, kAskTokens) : 0;
  mail = {place.template operator()<gpu::MissPair>(pairs),
          place.template operator()<bf16>(m * g.dim),
          place.template operator()<bf16>(pairs * g.dim),
          place.template operator()<int32_t>(layers * pairs),
          place.template operator()<float>(pairs),
          place.template operator()<float>(rows * g.vocab_size),
          place.template operator()<float>(o.mtp ? rows * g.vocab_size : 0),
          place.template operator()<int32_t>(rows),
          place.template operator()<int32_t>(kMaxWaves * g.n_routed_experts),
          place.template operator()<uint32_t>(3),
          place.template operator()<int32_t>(layers * asks * g.n_activated_experts),
          place.template operator()<uint32_t>(o.ask_ahead ? layers : 0)};
}

template <class Place>
void DevicePart::carve_hot(HotTables& hot, const KvLayout& layout, int64_t pages, int64_t slots, Place&& place) {
  const int64_t entries = layout.selected_page_bytes() / layout.row_bytes(), layers = layout.csa_layers();
  hot = {place.template operator()<int32_t>(pages * entries), place.template operator()<int32_t>(entries),
         place.template operator()<int32_t>(layers * slots),  place.template operator()<uint32_t>(layers * slots),
         place.template operator()<uint32_t>(layers),         place.template operator()<uint32_t>(3)};
}

KvLayout DevicePart::layout_of(const ModelGeometry& g, const KvStore& kv, const PartOptions& o) {
  const bool last = o.last_layer == g.n_layers;
  return KvLayout(g, kv.options(), o.first_layer, last ? g.n_layers + (o.mtp ? g.n_mtp_layers : 0) : o.last_layer);
}

std::vector<const deepseek_v4::LayerWeights*> DevicePart::layers_of(const ModelGeometry& g,
                                                                    const deepseek_v4::Weights& weights,
                                                                    const PartOptions& o) {
  std::vector<const deepseek_v4::LayerWeights*> layers;
  for (int i = o.first_layer; i < o.last_layer; ++i) layers.push_back(&weights.layers[static_cast<size_t>(i)]);
  if (o.last_layer == g.n_layers && o.mtp && !weights.mtp.empty()) layers.push_back(&weights.mtp[0].layer);
  return layers;
}

int64_t DevicePart::activation_bytes(const ModelGeometry& g, const PartOptions& o) {
  Carver device(nullptr);
  Buffers buffers{};
  carve(buffers, g, o, device);
  return device.bytes();
}

DevicePart::Sizes DevicePart::sizes(const ModelGeometry& g, const deepseek_v4::Weights& weights, const KvStore& kv,
                                    const PartOptions& o) {
  const KvLayout layout = layout_of(g, kv, o);
  const std::vector<const deepseek_v4::LayerWeights*> layers = layers_of(g, weights, o);
  Sizes s;
  s.dense = DeviceWeights::bytes(g, weights, o.first_layer, o.last_layer, o.mtp);
  s.window_pages = kv.window_pages() * layout.window_page_bytes();
  s.scanned_pages = kv.compressed_pages() * layout.scanned_page_bytes();
  const int64_t selected = kv.compressed_pages() * layout.selected_page_bytes();
  if (o.hot_rows > 0 && selected > 0) {
    Carver hot_tables(nullptr);
    HotTables hot{};
    carve_hot(hot, layout, kv.compressed_pages(), o.hot_rows, hot_tables);
    s.hot_tables = hot_tables.bytes();
    s.hot_rows = layout.csa_layers() * o.hot_rows * layout.row_bytes();
    s.host_rows = selected;
  } else {
    s.selected_pages = selected;
  }
  s.rings = kv.options().max_sequences * layout.ring_bytes();
  Carver host(nullptr);
  HostMail mail{};
  carve_host(mail, g, o, host);
  s.activations = activation_bytes(g, o);
  s.host_memory = host.bytes();
  s.sequence_capacity = kv.options().max_sequences;
  // Of a sequence in a step: its compressed pages, and what its window reaches with the step's tokens.
  const int64_t window = o.max_tokens + g.window_size + kv.options().rollback_tokens;
  s.page_capacity = s.sequence_capacity * (o.max_context / kPageTokens + window / kWindowPageTokens + 4);
  const int64_t angles = (2 + static_cast<int64_t>(ratios_of(g).size())) * o.max_tokens * g.rope_head_dim / 2 * 4;
  s.tables = s.host_tables = align256(4) + align256(o.max_tokens * static_cast<int64_t>(sizeof(gpu::TokenInfo))) +
                             align256(s.sequence_capacity * static_cast<int64_t>(sizeof(gpu::SequenceInfo))) +
                             align256(s.page_capacity * 4) + 2 * align256(angles) + 2 * align256(o.max_tokens * 4) +
                             2 * align256(o.max_tokens * g.dim * 2);
  s.flags = (o.last_layer - o.first_layer + 1) * 256;
  s.slot = SlotLayout(layers[0]->experts[0]).bytes;
  s.staging = o.staging * s.slot;
  s.experts = static_cast<int64_t>(layers.size()) * g.n_routed_experts;
  s.slot_table = align256(s.experts * 4);
  return s;
}

Result<std::unique_ptr<DevicePart>> DevicePart::create(std::unique_ptr<gpu::Device> device, const ModelGeometry& g,
                                                       const deepseek_v4::Weights& weights, const KvStore& kv,
                                                       const PartOptions& options) {
  std::unique_ptr<DevicePart> part(new DevicePart(g, options, layout_of(g, kv, options)));
  DevicePart& p = *part;
  p.device_ = std::move(device);
  gpu::Device& d = *p.device_;
  p.grouped_.reserve(static_cast<size_t>(g.o_groups));
  TC_ASSIGN(p.stream_, d.new_stream());
  TC_ASSIGN(p.done_, d.new_event());
  TC_ASSIGN(p.routed_, d.new_event());
  for (int side = 0; side < 2; ++side) {
    TC_ASSIGN(p.staging_free_[side], d.new_event());
    TC_ASSIGN(p.staging_filled_[side], d.new_event());
  }
  p.ratios_ = ratios_of(g);

  // Everything but the experts first: what is left is slots.
  const Sizes s = sizes(g, weights, kv, options);
  p.sequence_capacity_ = s.sequence_capacity;
  p.page_capacity_ = s.page_capacity;
  const int64_t room = static_cast<int64_t>(d.free_bytes()) - s.fixed();
  const int64_t slots = options.experts >= 0 ? std::min<int64_t>(options.experts, s.experts)
                                             : std::clamp<int64_t>(room / s.slot, 0, s.experts);
  if (room < 0 || slots * s.slot > room)
    return Error{
        ErrorCode::out_of_memory,
        fmt::format("{} of device memory do not hold layers {} to {}: dense weights {}, KV pages {}, buffers {}, "
                    "{} staged experts {}{}; give --gpu-memory more, or lower --max-model-len",
                    mib(static_cast<int64_t>(d.free_bytes())), options.first_layer, options.last_layer - 1,
                    mib(s.dense), mib(s.kv()), mib(s.buffers()), options.staging, mib(s.staging),
                    slots > 0 ? fmt::format(", {} experts {}", slots, mib(slots * s.slot)) : "")};
  TC_ASSIGN(p.weights_,
            DeviceWeights::upload(d, *p.stream_, g, weights, options.first_layer, options.last_layer, options.mtp));
  TC_RETURN_IF_ERROR(p.allocate_kv(s, kv.compressed_pages()));
  TC_ASSIGN(p.activations_, d.allocate(static_cast<size_t>(s.activations)));
  TC_ASSIGN(p.tables_, d.allocate(static_cast<size_t>(s.tables)));
  TC_ASSIGN(p.host_tables_, d.allocate_pinned(static_cast<size_t>(s.host_tables)));
  TC_ASSIGN(p.slots_, SlotPool::create(d, std::make_unique<ExpertsInMemory>(layers_of(g, weights, options)),
                                       static_cast<int>(slots), options.staging));
  TC_ASSIGN(p.host_memory_, d.allocate_pinned(static_cast<size_t>(s.host_memory)));
  TC_ASSIGN(p.flags_, d.allocate_pinned(static_cast<size_t>(s.flags)));
  std::memset(p.flags_.data(), 0, p.flags_.size());
  Carver carver(p.activations_.data()), host_carver(p.host_memory_.data());
  carve(p.b_, g, options, carver);
  carve_host(p.host_, g, options, host_carver);
  std::fill_n(p.host_.row_counts, 3, 0u);
  if (options.ask_ahead) std::fill_n(p.host_.ahead_steps, options.last_layer - options.first_layer + 1, 0u);

  // Constants of the step: the shared expert's items, by the three item sizes, and a counter at zero.
  const int64_t m = options.max_tokens;
  std::vector<gpu::ExpertItem> items(static_cast<size_t>((m + 7) / 8 * 3));
  const int sizes_of[3] = {8, 16, 64};
  for (int size = 0; size < 3; ++size)
    for (int64_t first = 0, i = 0; first < m; first += sizes_of[size], ++i)
      items[static_cast<size_t>(size * ((m + 7) / 8) + i)] = {
          0, static_cast<int32_t>(first), static_cast<int32_t>(std::min<int64_t>(sizes_of[size], m - first))};
  const uint32_t zero = 0;
  p.stream_->copy(p.b_.shared_items, items.data(), items.size() * sizeof(items[0]), CopyKind::h2d);
  p.stream_->copy(p.b_.arrived, &zero, sizeof(zero), CopyKind::h2d);
  TC_RETURN_IF_ERROR(p.stream_->synchronize());
  p.memory_map_ =
      fmt::format("{}: layers {}-{}, dense {}, KV {}, buffers {}, {} expert slots {}, {} staged {}, free {}", d.name(),
                  options.first_layer, options.last_layer - 1, mib(s.dense), mib(s.kv()), mib(s.buffers()), slots,
                  mib(slots * s.slot), options.staging, mib(s.staging), mib(static_cast<int64_t>(d.free_bytes())));
  return part;
}

Status DevicePart::allocate_kv(const Sizes& s, int64_t pages) {
  gpu::Device& d = *device_;
  TC_ASSIGN(window_pages_, d.allocate(static_cast<size_t>(s.window_pages)));
  TC_ASSIGN(scanned_pages_, d.allocate(static_cast<size_t>(s.scanned_pages)));
  TC_ASSIGN(selected_pages_, d.allocate(static_cast<size_t>(s.selected_pages)));
  TC_ASSIGN(rings_, d.allocate(static_cast<size_t>(s.rings)));
  if (s.host_rows == 0) return {};
  TC_ASSIGN(host_rows_, d.allocate_pinned(static_cast<size_t>(s.host_rows)));
  TC_ASSIGN(hot_rows_, d.allocate(static_cast<size_t>(s.hot_rows)));
  TC_ASSIGN(hot_tables_, d.allocate(static_cast<size_t>(s.hot_tables)));
  // No row has a copy: the tables begin as an image of them.
  std::vector<std::byte> image(static_cast<size_t>(s.hot_tables));
  Carver carver(hot_tables_.data()), image_carver(image.data());
  HotTables tables{};
  carve_hot(hot_, layout_, pages, options_.hot_rows, carver);
  carve_hot(tables, layout_, pages, options_.hot_rows, image_carver);
  std::fill_n(tables.slot_of, pages * page_entries(), gpu::kNoSlot);
  std::fill_n(tables.no_slots, page_entries(), gpu::kNoSlot);
  std::fill_n(tables.entry_of, layout_.csa_layers() * options_.hot_rows, gpu::kNoSlot);
  stream_->copy(hot_tables_.data(), image.data(), image.size(), CopyKind::h2d);
  return stream_->synchronize();
}

// --- tables ---

DevicePart::Tables DevicePart::host_tables(const StepShape& shape) {
  shape_ = shape;
  const int64_t m = shape.tokens, pairs = g_.rope_head_dim / 2, tables = 2 + static_cast<int64_t>(ratios_.size());
  const auto carve = [&](std::byte* base, size_t* bytes) {
    Carver place(base);
    Tables t{place.operator()<uint32_t>(1),
             place.operator()<gpu::TokenInfo>(m),
             place.operator()<gpu::SequenceInfo>(sequence_capacity_),
             place.operator()<int32_t>(page_capacity_),
             place.operator()<float>(tables * m * pairs),
             place.operator()<float>(tables * m * pairs),
             place.operator()<int32_t>(shape.logit_rows),
             place.operator()<int32_t>(shape.mtp_rows),
             place.operator()<bf16>(options_.first_layer == 0 ? m * g_.dim : 0),
             place.operator()<bf16>(shape.mtp_rows > 0 ? m * g_.dim : 0)};
    *bytes = static_cast<size_t>(place.bytes());
    return t;
  };
  const Tables device = carve(tables_.data(), &table_bytes_);
  step_ = {{device.tokens, {m}},
           {device.sequences, {sequence_capacity_}},
           {device.pages, {page_capacity_}},
           {device.cos, {tables, m, pairs}},
           {device.sin, {tables, m, pairs}},
           {device.step, {1}}};
  rows_ = {device.rows, {shape.logit_rows}};
  mtp_rows_ = {device.mtp_rows, {shape.mtp_rows}};
  embed_ = device.embed;
  mtp_embed_ = device.mtp_embed;
  on_mtp_ = false;
  return carve(host_tables_.data(), &table_bytes_);
}

void DevicePart::begin(const StepShape& shape) {
  shape_ = shape;
  stream_->copy(tables_.data(), host_tables_.data(), table_bytes_, CopyKind::h2d);
}

std::span<std::byte> DevicePart::kv_page(KvPool pool, int32_t page) {
  const int64_t bytes = pool == KvPool::window       ? layout_.window_page_bytes()
                        : pool == KvPool::compressed ? layout_.scanned_page_bytes()
                                                     : layout_.ring_bytes();
  const gpu::DeviceBuffer& buffer = pool == KvPool::window       ? window_pages_
                                    : pool == KvPool::compressed ? scanned_pages_
                                                                 : rings_;
  return {buffer.data() + page * bytes, static_cast<size_t>(bytes)};
}

DevicePart::SelectedRows DevicePart::selected_rows(int32_t page) {
  const int64_t bytes = layout_.selected_page_bytes();
  const bool on_host = host_rows_.size() > 0;
  return {{(on_host ? host_rows_.data() : selected_pages_.data()) + page * bytes, static_cast<size_t>(bytes)}, on_host};
}

void DevicePart::forget_hot_rows(int32_t page) {
  if (hot_.slot_of)
    stream_->copy(hot_.slot_of + page * page_entries(), hot_.no_slots,
                  static_cast<size_t>(page_entries()) * sizeof(int32_t), CopyKind::d2d);
}

gpu::LayerPages DevicePart::pages(int index) const {
  gpu::LayerPages pages;
  pages.window = {reinterpret_cast<uint8_t*>(window_pages_.data()), {static_cast<int64_t>(window_pages_.size())}};
  pages.keys = {reinterpret_cast<uint8_t*>(scanned_pages_.data()), {static_cast<int64_t>(scanned_pages_.size())}};
  pages.window_page_bytes = layout_.window_page_bytes();
  pages.key_page_bytes = layout_.scanned_page_bytes();
  pages.window_offset = layout_.window_offset(index);
  pages.row_bytes = layout_.row_bytes();
  pages.index_group_bytes = layout_.index_group_bytes();
  const LayerKind kind = kind_of(index);
  if (kind == LayerKind::swa) return pages;
  pages.rows_per_page = layout_.rows_per_page(index);
  pages.row_offset = layout_.compressed_offset(index);
  pages.rows = pages.keys;
  pages.row_page_bytes = pages.key_page_bytes;
  if (kind == LayerKind::hca) return pages;
  pages.key_offset = layout_.index_offset(index);
  pages.row_offset -= layout_.scanned_page_bytes();
  pages.row_page_bytes = layout_.selected_page_bytes();
  const auto pool = [](const auto& buffer) {
    return DeviceView<uint8_t, 1>{reinterpret_cast<uint8_t*>(buffer.data()), {static_cast<int64_t>(buffer.size())}};
  };
  pages.rows = host_rows_.size() > 0 ? pool(host_rows_) : pool(selected_pages_);
  if (host_rows_.size() == 0) return pages;
  const int64_t csa = layout_.csa_layer(index), bytes = options_.hot_rows * layout_.row_bytes();
  pages.hot = {reinterpret_cast<uint8_t*>(hot_rows_.data()) + csa * bytes, {bytes}};
  pages.page_entries = page_entries();
  pages.first_entry = pages.row_offset / layout_.row_bytes();
  pages.slot_of = {hot_.slot_of, {static_cast<int64_t>(host_rows_.size()) / layout_.row_bytes()}};
  return pages;
}

DeviceView<float, 3> DevicePart::streams() const {
  return {on_mtp_ ? b_.mtp_streams : b_.streams, {shape_.tokens, g_.hc_mult, g_.dim}};
}

// --- embedding, hyper-connections ---

void DevicePart::embed() { device_->kernels().embed(*stream_, {{embed_, {shape_.tokens, g_.dim}}, streams()}); }

void DevicePart::receive_streams(DevicePart& from) {
  stream_->wait(*from.done_);
  stream_->copy(b_.streams, from.b_.streams, static_cast<size_t>(shape_.tokens * g_.hc_mult * g_.dim) * sizeof(float),
                CopyKind::d2d);
}

void DevicePart::hc_read(const DeviceHc& hc, const DeviceView<const float, 1>& norm, const Mixed& out) {
  const int64_t m = shape_.tokens, s = g_.hc_mult;
  const DeviceView<float, 3> x = streams();
  const DeviceView<float, 2> mixes{out.mixes, {m, g_.hc_outputs() + 1}};
  device_->kernels().hc_mix(*stream_, {{x.pointer, {m, s * g_.dim}}, hc.fn, {}, mixes});
  device_->kernels().hc_read(*stream_, {{x.pointer, {m, s, g_.dim}},
                                        {out.mixes, {m, g_.hc_outputs() + 1}},
                                        hc.scale,
                                        hc.base,
                                        norm,
                                        {out.post, {m, s}},
                                        {out.comb, {m, s * s}},
                                        {out.plain, {m, g_.dim}},
                                        {out.linear, {m, g_.dim}},
                                        g_.norm_eps,
                                        g_.hc_eps,
                                        g_.hc_sinkhorn_iters,
                                        options_.round_linear});
}

// Linears that can share a launch do: those of one format.
void DevicePart::gemm(std::span<const Linear> linears) {
  TC_CHECK(linears.size() <= 64);
  uint64_t left = 0;
  for (size_t i = 0; i < linears.size(); ++i)
    if (linears[i].w && linears[i].w->n > 0) left |= uint64_t{1} << i;
  while (left != 0) {
    const gpu::DeviceMatrix& first = *linears[static_cast<size_t>(std::countr_zero(left))].w;
    gpu::GemmArgs args;
    for (size_t i = 0; i < linears.size() && args.num_jobs < gpu::kMaxGemmJobs; ++i) {
      const Linear& l = linears[i];
      if (!(left >> i & 1) || l.w->format != first.format || l.w->scale != first.scale) continue;
      left &= ~(uint64_t{1} << i);
      args.jobs[args.num_jobs++] = {*l.w,          l.x,
                                    l.x_stride,    l.y,
                                    l.y_stride,    l.rows < 0 ? shape_.tokens : l.rows,
                                    l.first_group, l.groups < 0 ? l.w->row_groups() : l.groups,
                                    l.round};
    }
    device_->kernels().gemm(*stream_, args);
  }
}
void DevicePart::gemm(std::initializer_list<Linear> linears) {
  gemm(std::span<const Linear>(linears.begin(), linears.size()));
}

void DevicePart::logits_of(const DeviceHc& hc, const DeviceView<const float, 1>& norm, const int32_t* rows,
                           int64_t count, float* out) {
  if (count == 0) return;
  const DeviceView<float, 3> x = streams();
  const DeviceView<const int32_t, 1> which{rows, {count}};
  device_->kernels().hc_mix(
      *stream_,
      {{x.pointer, {shape_.tokens, g_.hc_mult * g_.dim}}, hc.fn, which, {b_.head_mixes, {count, g_.hc_mult + 1}}});
  device_->kernels().head_read(*stream_, {{x.pointer, {shape_.tokens, g_.hc_mult, g_.dim}},
                                          {b_.head_mixes, {count, g_.hc_mult + 1}},
                                          hc.scale,
                                          hc.base,
                                          norm,
                                          which,
                                          {b_.hidden, {count, g_.dim}},
                                          g_.norm_eps,
                                          g_.hc_eps});
  gemm({{&weights_.head.head, b_.hidden, g_.dim, out, g_.vocab_size, false, 0, -1, count}});
}

void DevicePart::head() {
  const int64_t rows = shape_.logit_rows;
  logits_of(weights_.head.hc, weights_.head.norm, rows_.pointer, rows, b_.logits);
  device_->kernels().argmax(*stream_, {{b_.logits, {rows, g_.vocab_size}}, {b_.most_likely, {rows}}});
  stream_->copy(host_.most_likely, b_.most_likely, static_cast<size_t>(rows) * 4, CopyKind::d2h);
}

void DevicePart::fetch_logits(int64_t rows) {
  stream_->copy(host_.logits, b_.logits, static_cast<size_t>(rows * g_.vocab_size) * sizeof(float), CopyKind::d2h);
}

// The MTP block's streams: the main model's, normed and projected, plus the next token's embedding, normed and
// projected.
void DevicePart::mtp() {
  const DeviceMtp& w = weights_.mtp[0];
  const int64_t m = shape_.tokens, s = g_.hc_mult, d = g_.dim;
  device_->kernels().norm_rows(
      *stream_, {{}, {mtp_embed_, {m, d}}, w.enorm, {b_.linear, {m, d}}, g_.norm_eps, options_.round_linear});
  gemm({{&w.e_proj, b_.linear, d, b_.y, d}});
  device_->kernels().norm_rows(
      *stream_, {{b_.streams, {m * s, d}}, {}, w.hnorm, {b_.linear, {m * s, d}}, g_.norm_eps, options_.round_linear});
  gemm({{&w.h_proj, b_.linear, d, b_.mtp_streams, d, true, 0, -1, m * s}});
  device_->kernels().add_rows(*stream_, {{b_.mtp_streams, {m, s, d}}, {b_.y, {m, d}}});
  on_mtp_ = true;
}

void DevicePart::mtp_head() {
  const int64_t rows = shape_.mtp_rows;
  logits_of(weights_.mtp[0].hc, weights_.mtp[0].norm, mtp_rows_.pointer, rows, b_.mtp_logits);
  stream_->copy(host_.mtp_logits, b_.mtp_logits, static_cast<size_t>(rows * g_.vocab_size) * sizeof(float),
                CopyKind::d2h);
}

void DevicePart::read_streams(float* out) {
  stream_->copy(out, streams().pointer, static_cast<size_t>(streams().size()) * sizeof(float), CopyKind::d2h);
}

void DevicePart::end() {
  const int64_t layers = static_cast<int64_t>(weights_.layers.size());
  stream_->copy(host_.ids, b_.ids, static_cast<size_t>(layers * pairs()) * 4, CopyKind::d2h);
  if (hot_.counts) stream_->copy(host_.row_counts, hot_.counts, 3 * sizeof(uint32_t), CopyKind::d2h);
}

}  // namespace thermocline
