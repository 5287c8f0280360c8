// The grouped GEMMs of a mixture-of-experts layer: items of pairs, each with the slot of its expert's weights. The same
// loop over tiles as gemm.cu, so the shared expert and every slot give the same bits for a token.
#include "kernels_gpu/device/tiles.cuh"
#include "kernels_gpu/launch.h"

namespace thermocline::gpu {
namespace {
using namespace dev;

constexpr int kGateWarps = 8;  // 8 x 16 outputs: the block in which inputs of w2 are rounded
constexpr int kDownWarps = 4;
constexpr int kGateCols = kGateWarps * 16;
constexpr int kHStride = kGateCols + 4;

template <int kFrags>
inline constexpr int kGateDepth = kFrags == 8 ? 2 : 4;
template <int kFrags>
inline constexpr int kDownGroups = kFrags == 8 ? 2 : 1;
template <int kFrags>
inline constexpr int kDownDepth = kFrags == 8 ? 4 : 8;

template <class Args>
TC_DEVICE int64_t item_count(const Args& args) {
  return args.counts.pointer ? static_cast<int64_t>(static_cast<int32_t>(args.counts(0))) : args.items.shape[0];
}

template <WeightFormat format, ScaleFormat scale, int kFrags>
TC_KERNEL(kGateWarps * 32, kFrags == 8 ? 1 : 2)
gate_up_kernel(const GateUpArgs args) {
  constexpr int kRing = ring_bytes(2, kGateDepth<kFrags>);
  TC_DYNAMIC_SHARED(uint8_t, ring, kGateWarps * kRing);
  TC_SHARED(float, h, 8 * kFrags * kHStride);
  if (block_y() >= item_count(args)) return;  // the whole block
  const ExpertItem item = args.items(block_y());
  const int64_t groups = args.w1.row_groups(), group = static_cast<int64_t>(block_x()) * kGateWarps + warp();
  const int g = lane() / 4, c = lane() % 4;
  if (group < groups) {
    const int64_t at = item.slot * args.slot_bytes;
    const TileSource source[2] = {row_group(args.w1, group, at), row_group(args.w3, group, at)};
    int64_t x_at[kFrags];
    for (int f = 0; f < kFrags; ++f) {
      const int64_t i = 8 * f + g, pair = item.first_pair + i;
      const int64_t token = i >= item.count ? -1
                            : args.pair_token.pointer
                                ? static_cast<int64_t>(static_cast<int32_t>(args.pair_token(pair)))
                                : pair;
      x_at[f] = token < 0 ? -1 : token * args.x.shape[1];
    }
    float sums[2][kFrags][4] = {};
    warp_gemm<format, scale, 2, kFrags, kGateDepth<kFrags>>(
        source, static_cast<int>(args.w1.k_tiles()), static_cast<int>(args.w1.scale_tiles),
        DeviceView<const bf16, 1>{args.x.pointer, {args.x.size()}}, x_at, ring, warp() * kRing, sums);
    for (int f = 0; f < kFrags; ++f)
      for (int e = 0; e < 4; ++e) {
        const int i = 8 * f + 2 * c + e % 2;
        const float weight = i < item.count && args.pair_weight.pointer
                                 ? static_cast<float>(args.pair_weight(item.first_pair + i))
                                 : 1.0f;
        const float gate = min_of(to_bf16(sums[0][f][e]), args.swiglu_limit);
        const float up = max_of(-args.swiglu_limit, min_of(to_bf16(sums[1][f][e]), args.swiglu_limit));
        h[i * kHStride + warp() * 16 + g + e / 2 * 8] = to_bf16(mul(weight, mul(mul(gate, sigmoid(gate)), up)));
      }
  }
  block_sync();
  const int64_t first = static_cast<int64_t>(block_x()) * kGateCols;
  const int64_t width = min_of<int64_t>(kGateCols, args.w1.n - first);
  for (int i = warp(); i < item.count; i += kGateWarps)
    store_linear_block([&](int64_t column) { return static_cast<float>(h[i * kHStride + column]); }, 0, width,
                       args.round_linear,
                       DeviceView<bf16, 1>{args.h.pointer + (item.first_pair + i) * args.h.shape[1] + first, {width}});
}

template <WeightFormat format, ScaleFormat scale, int kFrags>
TC_KERNEL(kDownWarps * 32, kFrags == 8 ? 2 : 3)
down_kernel(const DownArgs args) {
  constexpr int kGroups = kDownGroups<kFrags>, kRing = ring_bytes(kGroups, kDownDepth<kFrags>);
  TC_DYNAMIC_SHARED(uint8_t, ring, kDownWarps * kRing);
  if (block_y() >= item_count(args)) return;
  const ExpertItem item = args.items(block_y());
  const int64_t groups = args.w2.row_groups();
  const int64_t first = (static_cast<int64_t>(block_x()) * kDownWarps + warp()) * kGroups;
  if (first >= groups) return;
  const int g = lane() / 4, c = lane() % 4;
  TileSource source[kGroups];
  for (int i = 0; i < kGroups; ++i)
    source[i] = row_group(args.w2, min_of(first + i, groups - 1), item.slot * args.slot_bytes);
  int64_t h_at[kFrags];
  for (int f = 0; f < kFrags; ++f)
    h_at[f] = 8 * f + g < item.count ? (item.first_pair + 8 * f + g) * args.h.shape[1] : -1;
  float sums[kGroups][kFrags][4] = {};
  warp_gemm<format, scale, kGroups, kFrags, kDownDepth<kFrags>>(
      source, static_cast<int>(args.w2.k_tiles()), static_cast<int>(args.w2.scale_tiles),
      DeviceView<const bf16, 1>{args.h.pointer, {args.h.size()}}, h_at, ring, warp() * kRing, sums);
  for (int i = 0; i < kGroups && first + i < groups; ++i)
    for (int f = 0; f < kFrags; ++f)
      for (int e = 0; e < 4; ++e) {
        const int row = 8 * f + 2 * c + e % 2;
        const int64_t n = (first + i) * 16 + g + e / 2 * 8;
        if (row < item.count && n < args.w2.n) args.y(item.first_pair + row, n) = narrow(sums[i][f][e]);
      }
}

struct Up {
  template <WeightFormat format, ScaleFormat scale, int kFrags>
  static void start(Stream& stream, const GateUpArgs& args) {
    launch(stream, "gate_up", gate_up_kernel<format, scale, kFrags>,
           {(args.w1.row_groups() + kGateWarps - 1) / kGateWarps, args.items.shape[0]}, kGateWarps * 32, args,
           kGateWarps * ring_bytes(2, kGateDepth<kFrags>));
  }
};
struct Down {
  template <WeightFormat format, ScaleFormat scale, int kFrags>
  static void start(Stream& stream, const DownArgs& args) {
    const int64_t per_block = kDownWarps * kDownGroups<kFrags>;
    launch(stream, "down", down_kernel<format, scale, kFrags>,
           {(args.w2.row_groups() + per_block - 1) / per_block, args.items.shape[0]}, kDownWarps * 32, args,
           kDownWarps * ring_bytes(kDownGroups<kFrags>, kDownDepth<kFrags>));
  }
};

template <class Kernel, WeightFormat format, ScaleFormat scale, class Args>
void start(Stream& stream, const Args& args) {
  if (args.item_pairs <= 8)
    Kernel::template start<format, scale, 1>(stream, args);
  else if (args.item_pairs <= 16)
    Kernel::template start<format, scale, 2>(stream, args);
  else
    Kernel::template start<format, scale, 8>(stream, args);
}

template <class Kernel, class Args>
void start(Stream& stream, const Args& args, const DeviceMatrix& w) {
  TC_CHECK(args.item_pairs <= 64 && w.k % 32 == 0);
  if (w.format == WeightFormat::bf16) return start<Kernel, WeightFormat::bf16, ScaleFormat::none>(stream, args);
  if (w.format == WeightFormat::fp8) return start<Kernel, WeightFormat::fp8, ScaleFormat::f32_blocks>(stream, args);
  TC_CHECK(w.format == WeightFormat::mxfp4);
  if (w.scale == ScaleFormat::e8m0_rows)
    return start<Kernel, WeightFormat::mxfp4, ScaleFormat::e8m0_rows>(stream, args);
  start<Kernel, WeightFormat::mxfp4, ScaleFormat::f32_rows>(stream, args);
}

}  // namespace

void TC_BACKEND::gate_up(Stream& stream, const GateUpArgs& args) { start<Up>(stream, args, args.w1); }
void TC_BACKEND::down(Stream& stream, const DownArgs& args) { start<Down>(stream, args, args.w2); }

}  // namespace thermocline::gpu
