// Attention over a window and compressed rows, K = V, 16 heads a block: scores and values on tensor cores, an online
// softmax over chunks of 32 rows. Rows come in splits of 128; attend_merge joins a token's splits in order, so long
// contexts spread over the device and the sums stay the same. Source: spec 3.7.
#include "kernels_gpu/device/numbers.cuh"
#include "kernels_gpu/device/pages.cuh"
#include "kernels_gpu/launch.h"

namespace thermocline::gpu {
namespace {
using namespace dev;

constexpr int kWarps = 4, kHeads = 16, kRows = 32;
constexpr int kMaxWidth = 512;
constexpr int kStride = kMaxWidth + 8;               // of a row in shared memory: 16 bytes off, against bank conflicts
constexpr int kValueFrags = kMaxWidth / 8 / kWarps;  // 8 dims each, of a warp
static_assert(kAttentionSplit % kRows == 0);

/// The rows a token sees: its window, then compressed ones, each in rising order.
struct RowList {
  int64_t window = 0, compressed = 0;
  TC_DEVICE int64_t count() const { return window + compressed; }
};
TC_DEVICE RowList list_rows(const AttendArgs& args, const TokenInfo& token) {
  RowList list;
  if (token.pos < 0) return list;
  list.window = min_of(args.window, static_cast<int64_t>(token.pos) + 1);
  if (args.ratio > 0) list.compressed = (static_cast<int64_t>(token.pos) + 1) / args.ratio;
  if (args.selects) list.compressed = min_of(list.compressed, args.selected.shape[1]);
  return list;
}

/// The i-th of them: a raw row, or a compressed one, which may have a copy on the device.
TC_DEVICE DeviceView<uint8_t, 1> listed_row(const AttendArgs& args, const TokenInfo& info, int64_t token,
                                            const RowList& list, int64_t i) {
  if (i < list.window) return raw_row(args.step, args.pages, info, info.pos - list.window + 1 + i);
  const int64_t n = i - list.window;
  const int64_t row = args.selects ? static_cast<int64_t>(static_cast<int32_t>(args.selected(token, n))) : n;
  const RowPlace place = row_place(args.step, args.pages, info, row);
  const int32_t slot = slot_of_row(args.pages, place);
  return slot >= 0 ? hot_row(args.pages, slot) : home_row(args.pages, place);
}

TC_KERNEL(kWarps * 32)
attend_kernel(const AttendArgs args) {
  // Queries [16], then rows [32], kStride each: three blocks fit sm_80, and one loads while the others compute.
  TC_DYNAMIC_SHARED(bf16, tile, (kHeads + kRows) * kStride);
  TC_SHARED(float, scores, kHeads*(kRows + 1));
  TC_SHARED(bf16, p, kHeads * (kRows + 8));
  TC_SHARED(float, rescale, kHeads);
  TC_SHARED(uint64_t, row_at, kAttentionSplit);  // addresses
  const int64_t token = args.first_token + block_x(), split = block_z(), heads = args.q.shape[1];
  const int64_t first_head = static_cast<int64_t>(block_y()) * kHeads;
  const int width = static_cast<int>(args.q.shape[2]), g = lane() / 4, c = lane() % 4;
  const TokenInfo info = args.step.tokens(token);
  const RowList list = list_rows(args, info);
  const int64_t begin = split * kAttentionSplit, end = min_of(list.count(), begin + kAttentionSplit);
  if (begin >= end) return;  // the whole block
  for (int i = thread(); i < end - begin; i += block_threads())
    row_at[i] = reinterpret_cast<uint64_t>(listed_row(args, info, token, list, begin + i).pointer);
  // Unpacks FP8 rows (fp8_row_bytes) to bf16: exact, as codes have 4 bits and scales are powers of two.
  const int rope = args.rope_dim, nope = width - rope;
  const auto load_rows = [&](int64_t first) {
    for (int row = warp(); row < kRows; row += kWarps) {
      const int64_t i = min_of(first + row, end - 1);  // past the end: any row, its probability is zero
      const DeviceView<uint8_t, 1> source{
          reinterpret_cast<uint8_t*>(static_cast<uint64_t>(row_at[static_cast<int>(i - begin)])),
          {args.pages.row_bytes}};
      const int at = (kHeads + row) * kStride;
      for (int d = 8 * lane(); d < rope; d += 256)
        store_shared_as(tile, at + nope + d, *reinterpret_cast<const Vec4*>(source.read(2 * d, 16)));
      for (int d = 16 * lane(); d < nope; d += 512) {
        const Vec4 codes = *reinterpret_cast<const Vec4*>(source.read(2 * rope + d, 16));
        const uint32_t exponent = source[2 * rope + nope + d / 64], scale = exponent << 7 | exponent << 23;
        Vec4 values[2];
        TC_UNROLL
        for (int pair = 0; pair < 8; ++pair) {
          const uint32_t two = codes.x[pair / 2] >> (16 * (pair % 2));
          values[pair / 4].x[pair % 4] = mul_bf16x2(e4m3_pair((two & 255) | (two & 0xff00) << 8), scale);
        }
        store_shared_as(tile, at + d, values[0]);
        store_shared_as(tile, at + d + 8, values[1]);
      }
    }
  };
  for (int h = warp(); h < kHeads; h += kWarps)
    for (int d = 8 * lane(); d < width; d += 256)
      cp_async16(tile, h * kStride + d, args.q.read((token * heads + min_of(first_head + h, heads - 1)) * width + d, 8),
                 first_head + h < heads ? 16 : 0);
  cp_async_commit();
  block_sync();                                            // row_at
  float maximum[kHeads / kWarps], total[kHeads / kWarps];  // of heads 4 warp + i, the same in every lane
  for (int i = 0; i < kHeads / kWarps; ++i) {
    maximum[i] = -INFINITY;
    total[i] = 0;
  }
  float values[kValueFrags][4] = {};  // heads g, g + 8; dims 8 (kValueFrags warp + f) + 2c, + 1
  for (int64_t first = begin; first < end; first += kRows) {
    load_rows(first);
    cp_async_wait<0>();
    block_sync();
    // Scores: a warp takes 8 of the rows; dims may be permuted, so a lane's share is 8 neighbours of both operands.
    constexpr int rows_at = kHeads * kStride;
    float s[4] = {};
    for (int d = 0; d < width; d += 32) {
      const Vec4 low = load_shared16(tile, g * kStride + d + 8 * c),
                 high = load_shared16(tile, (g + 8) * kStride + d + 8 * c);
      const Vec4 row = load_shared16(tile, rows_at + (8 * warp() + g) * kStride + d + 8 * c);
      for (int half = 0; half < 2; ++half) {
        const uint32_t a[4] = {low.x[2 * half], high.x[2 * half], low.x[2 * half + 1], high.x[2 * half + 1]};
        const uint32_t b[2] = {row.x[2 * half], row.x[2 * half + 1]};
        mma_bf16_16816(s, a, b);
      }
    }
    for (int i = 0; i < 4; ++i) {
      const int row = 8 * warp() + 2 * c + i % 2;
      scores[(g + i / 2 * 8) * (kRows + 1) + row] = first + row < end ? mul(s[i], args.scale) : -INFINITY;
    }
    block_sync();
    for (int i = 0; i < kHeads / kWarps; ++i) {
      const int h = warp() * (kHeads / kWarps) + i;
      const float score = scores[h * (kRows + 1) + lane()];
      const float largest = max_of(maximum[i], warp_max(score));
      const float probability = expf(score - largest), old = expf(maximum[i] - largest);
      total[i] = add(mul(total[i], old), warp_sum(probability));
      maximum[i] = largest;
      p[h * (kRows + 8) + lane()] = narrow(probability);
      if (lane() == 0) rescale[h] = old;
    }
    block_sync();
    const float low = rescale[g], high = rescale[g + 8];
    uint32_t a[kRows / 16][4];
    for (int k = 0; k < kRows / 16; ++k)
      for (int i = 0; i < 4; ++i)
        a[k][i] = load_shared_as<uint32_t>(p, (g + i % 2 * 8) * (kRows + 8) + 16 * k + 2 * c + i / 2 * 8);
    TC_UNROLL
    for (int f = 0; f < kValueFrags; f += 2) {
      const int d = 8 * (kValueFrags * warp() + f);
      for (int i = 0; i < 4; ++i) {
        values[f][i] = mul(values[f][i], i < 2 ? low : high);
        values[f + 1][i] = mul(values[f + 1][i], i < 2 ? low : high);
      }
      if (d >= width) continue;  // the same for the whole warp
      for (int k = 0; k < kRows / 16; ++k) {
        // Four 8 x 8 matrices: rows 16k + 0..7 and 8..15 of dims d.., the same of dims d + 8.. .
        uint32_t b[4];
        const int matrix = lane() / 8;
        ldmatrix_x4<true>(b, tile, rows_at + (16 * k + matrix % 2 * 8 + lane() % 8) * kStride + d + matrix / 2 * 8);
        const uint32_t first_dims[2] = {b[0], b[1]}, next_dims[2] = {b[2], b[3]};
        mma_bf16_16816(values[f], a[k], first_dims);
        mma_bf16_16816(values[f + 1], a[k], next_dims);
      }
    }
    block_sync();
  }
  const int64_t out = block_x() * args.splits + split;
  TC_UNROLL
  for (int f = 0; f < kValueFrags; ++f)
    for (int i = 0; i < 4; ++i) {
      const int64_t head = first_head + g + i / 2 * 8;
      const int d = 8 * (kValueFrags * warp() + f) + 2 * c + i % 2;
      if (head < heads && d < width) args.partial(out, head, d) = values[f][i];
    }
  for (int i = 0; i < kHeads / kWarps; ++i) {
    const int64_t head = first_head + warp() * (kHeads / kWarps) + i;
    if (lane() == 0 && head < heads) {
      args.partial(out, head, width) = maximum[i];
      args.partial(out, head, width + 1) = total[i];
    }
  }
}

TC_KERNEL(128)
attend_merge_kernel(const AttendMergeArgs args) {
  TC_SHARED(float, x, kMaxWidth);
  const int64_t local = block_x(), token = args.attend.first_token + local, head = block_y();
  const int width = static_cast<int>(args.out.shape[2]);
  const TokenInfo info = args.attend.step.tokens(token);
  const RowList list = list_rows(args.attend, info);
  const int64_t splits = (list.count() + kAttentionSplit - 1) / kAttentionSplit, base = local * args.attend.splits;
  if (splits == 0) return;  // padding; the whole block
  const DeviceView<float, 3>& partial = args.attend.partial;
  float largest = -INFINITY;
  for (int64_t s = 0; s < splits; ++s) largest = max_of(largest, static_cast<float>(partial(base + s, head, width)));
  float denominator = 0;
  for (int64_t s = 0; s < splits; ++s)
    denominator = add(denominator, mul(expf(static_cast<float>(partial(base + s, head, width)) - largest),
                                       partial(base + s, head, width + 1)));
  denominator = add(denominator, expf(static_cast<float>(args.sinks(head)) - largest));
  for (int d = thread(); d < width; d += block_threads()) {
    float sum = 0;
    for (int64_t s = 0; s < splits; ++s)
      sum =
          add(sum, mul(expf(static_cast<float>(partial(base + s, head, width)) - largest), partial(base + s, head, d)));
    x[d] = to_bf16(sum / denominator);
  }
  block_sync();
  const int rope = args.rope_dim, nope = width - rope;
  for (int d = thread(); d < nope; d += block_threads()) args.out(token, head, d) = narrow(x[d]);
  for (int i = thread(); i < rope / 2; i += block_threads()) {
    const float a = x[nope + 2 * i], b = x[nope + 2 * i + 1], cos = args.attend.step.cos(args.rope_table, token, i);
    const float sin = -static_cast<float>(args.attend.step.sin(args.rope_table, token, i));
    args.out(token, head, nope + 2 * i) = narrow(add(mul(a, cos), -mul(b, sin)));
    args.out(token, head, nope + 2 * i + 1) = narrow(add(mul(a, sin), mul(b, cos)));
  }
}

}  // namespace

void TC_BACKEND::attend(Stream& stream, const AttendArgs& args) {
  TC_CHECK(args.q.shape[2] <= kMaxWidth && args.q.shape[2] % 32 == 0);
  TC_CHECK(args.rope_dim % 8 == 0 && (args.q.shape[2] - args.rope_dim) % 16 == 0);
  launch(stream, "attend", attend_kernel, {args.tokens, (args.q.shape[1] + kHeads - 1) / kHeads, args.splits},
         kWarps * 32, args, (kHeads + kRows) * kStride * sizeof(bf16));
}
void TC_BACKEND::attend_merge(Stream& stream, const AttendMergeArgs& args) {
  launch(stream, "attend_merge", attend_merge_kernel, {args.attend.tokens, args.out.shape[1]}, 128, args);
}

}  // namespace thermocline::gpu
