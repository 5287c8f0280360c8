// The lightning indexer of CSA layers: scores of FP4 keys, and the exact top-k. Source: spec 3.8.3.
#include "kernels_gpu/device/pages.cuh"
#include "kernels_gpu/device/tiles.cuh"
#include "kernels_gpu/launch.h"

namespace thermocline::gpu {
namespace {
using namespace dev;

constexpr int kWarps = 4;
constexpr int kMaxHeads = 64;
constexpr int kMaxTiles = 8;

TC_DEVICE int64_t visible_rows(const TokenInfo& token, int ratio) {
  return token.pos < 0 ? 0 : (static_cast<int64_t>(token.pos) + 1) / ratio;
}

// A warp scores 16 keys at a time: the keys' row group is the A operand as it lies, 8 heads are the B operand. Products
// of a tile are exact in float32, so tiles add up as on the CPU; heads add up in order, through shared memory.
TC_KERNEL(kWarps * 32)
index_scores_kernel(const IndexScoresArgs args) {
  TC_SHARED(uint8_t, ring, kWarps * kMaxTiles * 272);
  TC_SHARED(float, terms, kWarps * 16 * (kMaxHeads + 1));
  const int64_t row = block_y(), token = args.first_token + row;
  const TokenInfo info = args.step.tokens(token);
  const int64_t visible = visible_rows(info, args.ratio);
  if (visible <= args.topk) return;  // the whole block: every row is chosen
  const int heads = static_cast<int>(args.q.shape[1]), tiles = static_cast<int>(args.q.shape[2] / 32);
  const int g = lane() / 4, c = lane() % 4, at = warp() * kMaxTiles * 272, terms_at = warp() * 16 * (kMaxHeads + 1);
  for (int64_t group = static_cast<int64_t>(block_x()) * kWarps + warp(); group * 16 < visible;
       group += static_cast<int64_t>(grid_x()) * kWarps) {
    const DeviceView<uint8_t, 1> keys = index_group(args.step, args.pages, info, group);
    warp_sync();  // the group before has been read
    for (int b = 16 * lane(); b < tiles * 272; b += 512) cp_async16(ring, at + b, keys.read(b, 16));
    cp_async_commit();
    cp_async_wait<0>();
    warp_sync();
    for (int block = 0; block < heads; block += 8) {
      float dots[4] = {};
      for (int tile = 0; tile < tiles; ++tile) {
        uint32_t low[4], high[4];
        load_row<WeightFormat::mxfp4>(ring, at + tile * 256, g, low);
        load_row<WeightFormat::mxfp4>(ring, at + tile * 256, g + 8, high);
        Vec4 q = {};
        if (block + g < heads)
          q = *reinterpret_cast<const Vec4*>(
              args.q.read(((token * heads) + block + g) * tiles * 32 + tile * 32 + 8 * c, 8));
        float d[4] = {};
        for (int half = 0; half < 2; ++half) {
          const uint32_t a[4] = {low[2 * half], high[2 * half], low[2 * half + 1], high[2 * half + 1]};
          const uint32_t b[2] = {q.x[2 * half], q.x[2 * half + 1]};
          mma_bf16_16816(d, a, b);
        }
        const float scales[2] = {e8m0(ring[at + tiles * 256 + tile * 16 + g]),
                                 e8m0(ring[at + tiles * 256 + tile * 16 + g + 8])};
        for (int i = 0; i < 4; ++i) dots[i] = add(dots[i], mul(d[i], scales[i / 2]));
      }
      for (int i = 0; i < 4; ++i) {
        const int head = block + 2 * c + i % 2;
        if (head >= heads) continue;
        const float dot = to_bf16(dots[i]);
        terms[terms_at + (g + i / 2 * 8) * (kMaxHeads + 1) + head] =
            to_bf16(mul(args.gates(token, head), dot > 0 ? dot : 0.0f));
      }
    }
    warp_sync();
    if (lane() < 16) {
      float sum = 0;
      for (int head = 0; head < heads; ++head) sum = add(sum, terms[terms_at + lane() * (kMaxHeads + 1) + head]);
      if (group * 16 + lane() < visible) args.scores(row, group * 16 + lane()) = to_bf16(sum);
    }
  }
}

/// Bits that order as the floats do.
TC_DEVICE uint32_t ordered(float x) {
  const uint32_t bits = bits_to<uint32_t>(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Radix select: four passes find the k-th largest key, a last one writes what lies above it, and of its equals the
// first.
TC_KERNEL(256)
select_kernel(const SelectArgs args) {
  TC_SHARED(int32_t, histogram, 256);
  TC_SHARED(uint32_t, found, 2);           // the key's bits so far; how many of its equals are wanted
  TC_SHARED(int32_t, warp_counts, 2 * 8);  // above, equal
  const int64_t row = block_x(), token = args.first_token + row, topk = args.selected.shape[1];
  const TokenInfo info = args.step.tokens(token);
  const int64_t visible = visible_rows(info, args.ratio);
  if (visible <= topk) {  // the whole block
    for (int64_t i = thread(); i < visible; i += block_threads()) args.selected(token, i) = static_cast<int32_t>(i);
    return;
  }
  if (thread() == 0) {
    found[0] = 0;
    found[1] = static_cast<uint32_t>(topk);
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = thread(); i < 256; i += block_threads()) histogram[i] = 0;
    block_sync();
    const uint32_t prefix = found[0];
    for (int64_t i = thread(); i < visible; i += block_threads()) {
      const uint32_t key = ordered(args.scores(row, i));
      if (shift == 24 || (key ^ prefix) >> (shift + 8) == 0) atomic_add(histogram, key >> shift & 255, 1);
    }
    block_sync();
    if (thread() == 0) {
      int32_t wanted = static_cast<int32_t>(static_cast<uint32_t>(found[1]));
      int digit = 255;
      for (; digit > 0 && static_cast<int32_t>(histogram[digit]) < wanted; --digit) wanted -= histogram[digit];
      found[0] = prefix | static_cast<uint32_t>(digit) << shift;
      found[1] = static_cast<uint32_t>(wanted);
    }
    block_sync();
  }
  const uint32_t threshold = found[0];
  int32_t equals_left = static_cast<int32_t>(static_cast<uint32_t>(found[1])), written = 0;
  for (int64_t base = 0; base < visible; base += block_threads()) {
    const int64_t i = base + thread();
    const uint32_t key = i < visible ? ordered(args.scores(row, i)) : 0;
    const bool above = i < visible && key > threshold, equal = i < visible && key == threshold;
    const uint32_t above_votes = ballot(kFullMask, above), equal_votes = ballot(kFullMask, equal);
    if (lane() == 0) {
      warp_counts[2 * warp()] = popcount(above_votes);
      warp_counts[2 * warp() + 1] = popcount(equal_votes);
    }
    block_sync();
    int32_t above_before = 0, equal_before = 0, above_all = 0, equal_all = 0;
    for (int w = 0; w < block_threads() / 32; ++w) {
      const int32_t a = warp_counts[2 * w], e = warp_counts[2 * w + 1];
      if (w < warp()) {
        above_before += a;
        equal_before += e;
      }
      above_all += a;
      equal_all += e;
    }
    const uint32_t below = (1u << lane()) - 1;
    above_before += popcount(above_votes & below);
    equal_before += popcount(equal_votes & below);
    if (above || (equal && equal_before < equals_left))
      args.selected(token, written + above_before + min_of(equal_before, equals_left)) = static_cast<int32_t>(i);
    written += above_all + min_of(equal_all, equals_left);
    equals_left -= min_of(equal_all, equals_left);
    block_sync();
  }
}

}  // namespace

void TC_BACKEND::index_scores(Stream& stream, const IndexScoresArgs& args) {
  TC_CHECK(args.q.shape[1] <= kMaxHeads && args.q.shape[2] % 32 == 0 && args.q.shape[2] <= 32 * kMaxTiles);
  // A grid for the longest context there can be; blocks stride over what is visible.
  const int64_t groups = (args.scores.shape[1] + 15) / 16, blocks = (groups + kWarps - 1) / kWarps;
  launch(stream, "index_scores", index_scores_kernel, {blocks < 256 ? blocks : 256, args.scores.shape[0]}, kWarps * 32,
         args);
}
void TC_BACKEND::select(Stream& stream, const SelectArgs& args) {
  launch(stream, "select", select_kernel, {args.scores.shape[0]}, 256, args);
}

}  // namespace thermocline::gpu
