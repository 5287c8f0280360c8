// The weights that live on a device for good: everything of its layers but the routed experts. One allocation, packed
// tiles as they lie on the host (a copy per plane and NUMA slice), float vectors as they are.
#pragma once

#include <span>
#include <vector>

#include "kernels_gpu/kernels.h"
#include "runtime/model/deepseek_v4/weights.h"

namespace thermocline {

struct DeviceHc {
  gpu::DeviceView<const float, 2> fn;           // [outputs, S D]
  gpu::DeviceView<const float, 1> base, scale;  // [outputs], [3] (head: [1])
};

struct DeviceCompressor {
  gpu::DeviceMatrix wkv, wgate;
  gpu::DeviceView<const float, 2> ape;   // [ratio, width]
  gpu::DeviceView<const float, 1> norm;  // [row width]
};

struct DeviceLayer {
  DeviceHc hc_attn, hc_ffn;
  gpu::DeviceView<const float, 1> attn_norm, ffn_norm, q_norm, kv_norm, attn_sink, gate_bias;
  gpu::DeviceMatrix wq_a, wq_b, wkv, wo_a, wo_b, index_wq_b, index_weights_proj, gate;
  DeviceCompressor compressor, index_compressor;
  gpu::DeviceView<const int32_t, 2> tid2eid;  // [V, k]
  gpu::DeviceMatrix shared_w1, shared_w3, shared_w2;
};

struct DeviceHead {
  gpu::DeviceMatrix head;
  gpu::DeviceView<const float, 1> norm;
  DeviceHc hc;
};

/// Of the MTP block, what is not a layer.
struct DeviceMtp {
  gpu::DeviceMatrix e_proj, h_proj;
  gpu::DeviceView<const float, 1> enorm, hnorm, norm;
  DeviceHc hc;
};

struct DeviceWeights {
  std::vector<DeviceLayer> layers;  // [first, last), MTP layers after the main ones
  DeviceHead head;                  // where the last layer is
  std::vector<DeviceMtp> mtp;
  gpu::DeviceBuffer memory;

  /// Bytes the same weights take on a device, without allocating.
  static int64_t bytes(const ModelGeometry& g, const deepseek_v4::Weights& weights, int first, int last, bool mtp);
  /// Errors: out_of_memory.
  static Result<DeviceWeights> upload(gpu::Device& device, gpu::Stream& stream, const ModelGeometry& g,
                                      const deepseek_v4::Weights& weights, int first, int last, bool mtp);
};

}  // namespace thermocline
