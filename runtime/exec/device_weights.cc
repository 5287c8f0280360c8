#include "runtime/exec/device_weights.h"

namespace thermocline {
namespace {

using cpu::PackedMatrix;
using deepseek_v4::CompressorWeights;
using deepseek_v4::HcWeights;
using gpu::DeviceMatrix;
using gpu::DeviceView;

/// Walks the weights twice: without a base it adds up bytes, with one it copies.
class Placer {
 public:
  Placer(std::byte* base, gpu::Stream* stream) : base_(base), stream_(stream) {}
  int64_t bytes() const { return at_; }

  DeviceMatrix matrix(const PackedMatrix& m) {
    DeviceMatrix out;
    if (m.n == 0) return out;
    static_cast<cpu::PackedShape&>(out) = m;
    out.tiles = {place<uint8_t>(m.tile_plane_bytes()), {m.tile_plane_bytes()}};
    out.scales = {place<uint8_t>(m.scale_plane_bytes()), {m.scale_plane_bytes()}};
    if (!base_) return out;
    for (int node = 0; node < m.nodes; ++node) {
      const int64_t first = m.first_group(node), last = node + 1 < m.nodes ? m.first_group(node + 1) : m.row_groups();
      if (first == last) continue;
      const cpu::RowGroup from = m.row_group(first);
      copy(const_cast<uint8_t*>(out.tiles.pointer) + first * m.group_tile_bytes(), from.tiles,
           (last - first) * m.group_tile_bytes());
      copy(const_cast<uint8_t*>(out.scales.pointer) + first * m.group_scale_bytes(), from.scales,
           (last - first) * m.group_scale_bytes());
    }
    return out;
  }

  template <class T>
  DeviceView<const T, 1> vector(const T* from, int64_t n) {
    if (!from) return {};
    T* const to = place<T>(n * static_cast<int64_t>(sizeof(T)));
    if (base_) copy(to, from, n * static_cast<int64_t>(sizeof(T)));
    return {to, {n}};
  }
  template <class T>
  DeviceView<const T, 2> table(const T* from, int64_t rows, int64_t width) {
    return {vector(from, rows * width).pointer, {rows, width}};
  }

 private:
  template <class T>
  T* place(int64_t bytes) {
    std::byte* const p = base_ + at_;  // without a base nobody uses it
    at_ += (bytes + 255) / 256 * 256;
    return reinterpret_cast<T*>(p);
  }
  void copy(void* to, const void* from, int64_t bytes) {
    stream_->copy(to, from, static_cast<size_t>(bytes), gpu::CopyKind::h2d);
  }

  std::byte* const base_;
  gpu::Stream* const stream_;
  int64_t at_ = 0;
};

DeviceHc place_hc(Placer& p, const HcWeights& hc, int64_t outputs, int64_t width, int64_t scales) {
  return {p.table(hc.fn, outputs, width), p.vector(hc.base, outputs), p.vector(hc.scale, scales)};
}

DeviceCompressor place_compressor(Placer& p, const CompressorWeights& c, int ratio, int64_t row_width) {
  DeviceCompressor out;
  if (!c.ape) return out;
  out.wkv = p.matrix(c.wkv);
  out.wgate = p.matrix(c.wgate);
  out.ape = p.table(c.ape, ratio, c.wkv.n);
  out.norm = p.vector(c.norm, row_width);
  return out;
}

DeviceLayer place_layer(Placer& p, const ModelGeometry& g, const deepseek_v4::LayerWeights& w, int index) {
  const int64_t width = g.hc_mult * g.dim;
  const int ratio = g.compress_ratios[static_cast<size_t>(index)];
  DeviceLayer out;
  out.hc_attn = place_hc(p, w.hc_attn, g.hc_outputs(), width, 3);
  out.hc_ffn = place_hc(p, w.hc_ffn, g.hc_outputs(), width, 3);
  out.attn_norm = p.vector(w.attn_norm, g.dim);
  out.ffn_norm = p.vector(w.ffn_norm, g.dim);
  out.q_norm = p.vector(w.q_norm, g.q_lora_rank);
  out.kv_norm = p.vector(w.kv_norm, g.head_dim);
  out.attn_sink = p.vector(w.attn_sink, g.n_heads);
  out.gate_bias = p.vector(w.gate_bias, g.n_routed_experts);
  out.wq_a = p.matrix(w.wq_a);
  out.wq_b = p.matrix(w.wq_b);
  out.wkv = p.matrix(w.wkv);
  out.wo_a = p.matrix(w.wo_a);
  out.wo_b = p.matrix(w.wo_b);
  out.index_wq_b = p.matrix(w.index_wq_b);
  out.index_weights_proj = p.matrix(w.index_weights_proj);
  out.gate = p.matrix(w.gate);
  out.compressor = place_compressor(p, w.compressor, ratio, g.head_dim);
  out.index_compressor = place_compressor(p, w.index_compressor, ratio, g.index_head_dim);
  if (w.tid2eid) out.tid2eid = p.table(w.tid2eid, g.vocab_size, g.n_activated_experts);
  out.shared_w1 = p.matrix(w.shared_expert.w1);
  out.shared_w3 = p.matrix(w.shared_expert.w3);
  out.shared_w2 = p.matrix(w.shared_expert.w2);
  return out;
}

DeviceWeights place_all(Placer& p, const ModelGeometry& g, const deepseek_v4::Weights& w, int first, int last,
                        bool mtp) {
  const int64_t width = g.hc_mult * g.dim;
  DeviceWeights out;
  for (int i = first; i < last; ++i) out.layers.push_back(place_layer(p, g, w.layers[static_cast<size_t>(i)], i));
  if (last < g.n_layers) return out;
  out.head = {p.matrix(w.head), p.vector(w.norm, g.dim), place_hc(p, w.hc_head, g.hc_mult, width, 1)};
  if (!mtp || w.mtp.empty()) return out;
  const deepseek_v4::MtpWeights& m = w.mtp[0];
  out.layers.push_back(place_layer(p, g, m.layer, g.n_layers));
  out.mtp.push_back({p.matrix(m.e_proj), p.matrix(m.h_proj), p.vector(m.enorm, g.dim), p.vector(m.hnorm, g.dim),
                     p.vector(m.norm, g.dim), place_hc(p, m.hc_head, g.hc_mult, width, 1)});
  return out;
}

}  // namespace

int64_t DeviceWeights::bytes(const ModelGeometry& g, const deepseek_v4::Weights& weights, int first, int last,
                             bool mtp) {
  Placer placer(nullptr, nullptr);
  place_all(placer, g, weights, first, last, mtp);
  return placer.bytes();
}

Result<DeviceWeights> DeviceWeights::upload(gpu::Device& device, gpu::Stream& stream, const ModelGeometry& g,
                                            const deepseek_v4::Weights& weights, int first, int last, bool mtp) {
  TC_ASSIGN(gpu::DeviceBuffer memory, device.allocate(static_cast<size_t>(bytes(g, weights, first, last, mtp))));
  Placer placer(memory.data(), &stream);
  DeviceWeights out = place_all(placer, g, weights, first, last, mtp);
  out.memory = std::move(memory);
  TC_RETURN_IF_ERROR(stream.synchronize());
  return out;
}

}  // namespace thermocline
