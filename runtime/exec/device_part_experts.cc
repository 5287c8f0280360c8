// The mixture of experts of a device's layers: the router, the split between device and CPU, both halves' results.
#include <algorithm>

#include "runtime/exec/device_part.h"
#include "runtime/exec/handover.h"

namespace thermocline {
using gpu::CopyKind;
using gpu::DeviceView;

int64_t DevicePart::max_items() const {
  const int64_t pairs = shape_.tokens * g_.n_activated_experts;
  return std::min(pairs, g_.n_routed_experts + pairs / item_pairs());
}

void DevicePart::route(int index) {
  const DeviceLayer& w = layer(index);
  const int64_t m = shape_.tokens, e = g_.n_routed_experts, k = g_.n_activated_experts;
  hc_read(w.hc_ffn, w.ffn_norm);
  gemm({{&w.gate, b_.plain, g_.dim, b_.scores, e, false}});
  device_->kernels().route(*stream_, {step_,
                                      {b_.scores, {m, e}},
                                      w.gate_bias,
                                      w.tid2eid,
                                      {b_.ids + ids_at(index), {m, k}},
                                      {b_.weights, {m, k}},
                                      g_.route_scale});
}

// The router of a layer, of the streams as they are a layer before: what it says comes to the host before that layer's
// flag does. Everything it writes is its own.
void DevicePart::ask_ahead(int index) {
  const DeviceLayer& w = layer(index);
  const int64_t m = shape_.tokens, e = g_.n_routed_experts, k = g_.n_activated_experts,
                at = index - options_.first_layer;
  if (!w.tid2eid.pointer) {
    hc_read(w.hc_ffn, w.ffn_norm, b_.ahead);
    gemm({{&w.gate, b_.ahead.plain, g_.dim, b_.ahead_scores, e, false}});
  }
  device_->kernels().route(*stream_, {step_,
                                      {b_.ahead_scores, {m, e}},
                                      w.gate_bias,
                                      w.tid2eid,
                                      {b_.ahead_ids, {m, k}},
                                      {b_.ahead_weights, {m, k}},
                                      g_.route_scale});
  int32_t* const host_ids = host_.ahead_ids + at * std::min(options_.max_tokens, kAskTokens) * k;
  device_->kernels().tell(*stream_, {step_, {b_.ahead_ids, {m, k}}, {host_ids, {m, k}}, {host_.ahead_steps + at, {1}}});
}

std::span<const int32_t> DevicePart::asked(int index, uint32_t step) const {
  if (!shape_.asks) return {};
  const int64_t at = index - options_.first_layer, k = g_.n_activated_experts;
  if (!flag_is_up(host_.ahead_steps[at], step)) return {};
  return {host_.ahead_ids + at * std::min(options_.max_tokens, kAskTokens) * k, static_cast<size_t>(shape_.tokens * k)};
}

void DevicePart::shared_expert(int index) {
  const DeviceLayer& w = layer(index);
  const int64_t m = shape_.tokens, size = item_pairs(), which = size == 8 ? 0 : size == 16 ? 1 : 2;
  const int64_t at = which * ((options_.max_tokens + 7) / 8), count = (m + size - 1) / size;
  // The last item may reach beyond the step's tokens; those rows are computed from whatever lies there and never read.
  gpu::GateUpArgs up;
  up.w1 = w.shared_w1;
  up.w3 = w.shared_w3;
  up.items = {b_.shared_items + at, {count}};
  up.x = {b_.linear, {options_.max_tokens, g_.dim}};
  up.h = {b_.shared_h, {options_.max_tokens, g_.moe_inter_dim}};
  up.item_pairs = size;
  up.swiglu_limit = g_.swiglu_limit;
  up.round_linear = options_.round_linear;
  device_->kernels().gate_up(*stream_, up);
  gpu::DownArgs down;
  down.w2 = w.shared_w2;
  down.items = up.items;
  down.h = {b_.shared_h, {options_.max_tokens, g_.moe_inter_dim}};
  down.y = {b_.shared_y, {options_.max_tokens, g_.dim}};
  down.item_pairs = size;
  device_->kernels().down(*stream_, down);
}

// Items of pairs whose weights lie in slots. Routed pairs have a token and a weight each, and their number is on the
// device; else pair i is token i.
void DevicePart::gate_up_down(const std::byte* slots, const DeviceView<const gpu::ExpertItem, 1>& items,
                              int64_t item_pairs, bool routed) {
  const int64_t m = options_.max_tokens, pairs = m * g_.n_activated_experts;
  const SlotLayout& layout = slots_->layout();
  const auto matrix = [&](int i) {
    gpu::DeviceMatrix w;
    static_cast<cpu::PackedShape&>(w) = slots_->shapes()[i];
    w.tiles = {reinterpret_cast<const uint8_t*>(slots) + layout.tiles[i].offset, {layout.tiles[i].bytes}};
    w.scales = {reinterpret_cast<const uint8_t*>(slots) + layout.scales[i].offset, {layout.scales[i].bytes}};
    return w;
  };
  gpu::GateUpArgs up;
  up.w1 = matrix(0);
  up.w3 = matrix(1);
  up.slot_bytes = layout.bytes;
  up.items = items;
  if (routed) {
    up.counts = {b_.counts, {2}};
    up.pair_token = {b_.pair_token, {pairs}};
    up.pair_weight = {b_.pair_weight, {pairs}};
  }
  up.x = {b_.linear, {m, g_.dim}};
  up.h = {b_.h, {pairs, g_.moe_inter_dim}};
  up.item_pairs = item_pairs;
  up.swiglu_limit = g_.swiglu_limit;
  up.round_linear = options_.round_linear;
  device_->kernels().gate_up(*stream_, up);
  gpu::DownArgs down;
  down.w2 = matrix(2);
  down.slot_bytes = layout.bytes;
  down.items = items;
  down.counts = up.counts;
  down.h = {b_.h, {pairs, g_.moe_inter_dim}};
  down.y = {b_.pair_y, {pairs, g_.dim}};
  down.item_pairs = item_pairs;
  device_->kernels().down(*stream_, down);
}

void DevicePart::expert_for_timing(int64_t tokens) {
  const int64_t size = tokens <= 8 ? 8 : 64, at = (size == 8 ? 0 : 2) * ((options_.max_tokens + 7) / 8);
  gate_up_down(slots_->slot_data(slots_->slots()), {b_.shared_items + at, {(tokens + size - 1) / size}}, size, false);
}

void DevicePart::partition(int index, const DeviceView<const int32_t, 1>& slot_of) {
  const int64_t m = shape_.tokens, k = g_.n_activated_experts;
  gpu::PartitionArgs args;
  args.step = step_;
  args.ids = {b_.ids + ids_at(index), {m, k}};
  args.weights = {b_.weights, {m, k}};
  args.slot_of = slot_of;
  args.pair_token = {b_.pair_token, {m * k}};
  args.pair_weight = {b_.pair_weight, {m * k}};
  args.pair_of = {b_.pair_of, {m, k}};
  args.items = {b_.items, {max_items()}};
  args.counts = {b_.counts, {2}};
  args.misses = {host_.misses, {m * k}};
  args.item_pairs = item_pairs();
  device_->kernels().partition(*stream_, args);
}

void DevicePart::experts_begin(int index) {
  const int64_t m = shape_.tokens;
  route(index);
  partition(index, slots_->device_table(index - options_.first_layer));
  const Mail mail = this->mail(index);
  device_->kernels().publish(
      *stream_,
      {step_, {b_.linear, {m, g_.dim}}, {b_.counts, {2}}, {host_.x, {m, g_.dim}}, {mail.flag, {2}}, {b_.arrived, {1}}});
  shared_expert(index);
  if (slots_->slots() > 0) gate_up_down(slots_->slot_data(0), {b_.items, {max_items()}}, item_pairs(), true);
  // While the CPU is at its pairs.
  if (shape_.asks && index + 1 < options_.last_layer) ask_ahead(index + 1);
}

void DevicePart::experts_end(int index) {
  const int64_t m = shape_.tokens, pairs = m * g_.n_activated_experts;
  device_->kernels().fetch(*stream_, {step_,
                                      {b_.counts, {2}},
                                      {host_.misses, {pairs}},
                                      {host_.y, {pairs, g_.dim}},
                                      {mail(index).answer, {1}},
                                      {b_.pair_y, {pairs, g_.dim}}});
  write_streams(index);
}

void DevicePart::write_streams(int) {
  const int64_t m = shape_.tokens, k = g_.n_activated_experts;
  device_->kernels().hc_write(*stream_, {streams(),
                                         {b_.post, {m, g_.hc_mult}},
                                         {b_.comb, {m, g_.hc_mult * g_.hc_mult}},
                                         {},
                                         {b_.pair_y, {m * k, g_.dim}},
                                         {b_.pair_of, {m, k}},
                                         {b_.shared_y, {m, g_.dim}}});
}

// --- prefill with streaming ---

void DevicePart::route_for_host(int index) {
  const int64_t m = shape_.tokens, pairs = m * g_.n_activated_experts, at = ids_at(index);
  route(index);
  stream_->copy(host_.ids + at, b_.ids + at, static_cast<size_t>(pairs) * 4, CopyKind::d2h);
  stream_->copy(host_.weights, b_.weights, static_cast<size_t>(pairs) * 4, CopyKind::d2h);
  stream_->copy(host_.x, b_.linear, static_cast<size_t>(m * g_.dim) * 2, CopyKind::d2h);
  stream_->record(*routed_);
}

void DevicePart::run_wave(int index, int wave, std::span<const int32_t> slot_of) {
  TC_CHECK(wave < kMaxWaves);
  const int64_t e = g_.n_routed_experts;
  int32_t* const row = host_.wave_table + wave * e;
  std::copy(slot_of.begin(), slot_of.end(), row);
  stream_->copy(b_.wave_table + wave * e, row, static_cast<size_t>(e) * 4, CopyKind::h2d);
  partition(index, {b_.wave_table + wave * e, {e}});
  gate_up_down(slots_->slot_data(0), {b_.items, {max_items()}}, item_pairs(), true);
}

void DevicePart::take_pairs(int64_t first_pair, int64_t count) {
  stream_->copy(b_.pair_y + first_pair * g_.dim, host_.y + first_pair * g_.dim,
                static_cast<size_t>(count * g_.dim) * sizeof(bf16), CopyKind::h2d);
}

// --- head, MTP ---

}  // namespace thermocline
