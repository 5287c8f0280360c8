// What attention reads: raw rows, query latents, queries, index queries, compressed rows and index keys. One warp a
// row. Source: spec 3.6 - 3.8.
#include "kernels_gpu/device/device_view.h"
#include "kernels_gpu/device/numbers.cuh"
#include "kernels_gpu/device/pages.cuh"
#include "kernels_gpu/launch.h"

namespace thermocline::gpu {
namespace {
using namespace dev;

constexpr int kMaxRow = 2048;     // of query latents
constexpr int kMaxHead = 1024;    // of heads and rows
constexpr int kCachedBlock = 64;  // spec 5.2: cached rows are rounded per 64 dims

/// Whole warp: 1 / rms of a shared row.
template <class Row>
TC_DEVICE float warp_inverse_rms(const Row& x, int64_t width, float eps) {
  float sum = 0;
  for (int64_t d = lane(); d < width; d += 32) {
    const float v = x[d];
    sum = fma_of(v, v, sum);
  }
  return 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(width) + eps);
}

/// Rotates pairs of x[first ..] in place and rounds.
template <class Row>
TC_DEVICE void rotate(Row& x, int64_t first, const StepTables& step, int table, int64_t token, int pairs,
                      bool inverse = false) {
  for (int i = lane(); i < pairs; i += 32) {
    const float a = x[first + 2 * i], b = x[first + 2 * i + 1], c = step.cos(table, token, i);
    const float s =
        inverse ? -static_cast<float>(step.sin(table, token, i)) : static_cast<float>(step.sin(table, token, i));
    x[first + 2 * i] = to_bf16(add(mul(a, c), -mul(b, s)));
    x[first + 2 * i + 1] = to_bf16(add(mul(a, s), mul(b, c)));
  }
}

/// Stores a row in FP8 (fp8_row_bytes): x[nope ..] in bf16, x[.. nope) as e4m3 codes per 64, their scales.
template <class Row>
TC_DEVICE void store_cached(Row& x, int64_t nope, int64_t width, const DeviceView<uint8_t, 1>& out) {
  const int64_t codes = 2 * (width - nope);
  for (int64_t begin = 0; begin < nope; begin += kCachedBlock) {
    const int64_t first = begin + lane(), second = first + 32, end = min_of(nope, begin + kCachedBlock);
    const float a = first < end ? static_cast<float>(x[first]) : 0.0f;
    const float b = second < end ? static_cast<float>(x[second]) : 0.0f;
    const float scale = e4m3_scale(warp_max(max_of(absolute(a), absolute(b))));
    if (first < end) out[codes + first] = e4m3_code(scaled_to_e4m3(a, scale));
    if (second < end) out[codes + second] = e4m3_code(scaled_to_e4m3(b, scale));
    if (lane() == 0) out[codes + nope + begin / kCachedBlock] = static_cast<uint8_t>(bits_to<uint32_t>(scale) >> 23);
  }
  for (int64_t d = lane(); d < width - nope; d += 32) {
    const bf16 value = narrow(x[nope + d]);
    out[2 * d] = static_cast<uint8_t>(value);
    out[2 * d + 1] = static_cast<uint8_t>(value >> 8);
  }
}

// block_y: 0 the raw row, 1 the query latent, 2 the compressor gates' positions.
TC_KERNEL(32)
rows_kernel(const RowsArgs args) {
  TC_SHARED(float, x, kMaxRow);
  const int64_t token = block_x();
  const TokenInfo info = args.step.tokens(token);
  if (block_y() == 0) {
    const int64_t width = args.kv.shape[1];
    for (int64_t d = lane(); d < width; d += 32) x[d] = args.kv(token, d);
    warp_sync();
    const float scale = warp_inverse_rms(x, width, args.eps);
    warp_sync();
    for (int64_t d = lane(); d < width; d += 32)
      x[d] = to_bf16(mul(static_cast<float>(args.kv_norm(d)), mul(x[d], scale)));
    warp_sync();
    rotate(x, width - args.rope_dim, args.step, args.ratio > 0, token, args.rope_dim / 2);
    warp_sync();
    if (info.pos >= 0) store_cached(x, width - args.rope_dim, width, raw_row(args.step, args.pages, info, info.pos));
  } else if (block_y() == 1) {
    const int64_t width = args.qr.shape[1];
    for (int64_t d = lane(); d < width; d += 32) x[d] = args.qr(token, d);
    warp_sync();
    const float scale = warp_inverse_rms(x, width, args.eps);
    const auto normed = [&](int64_t d) { return to_bf16(mul(static_cast<float>(args.q_norm(d)), mul(x[d], scale))); };
    for (int64_t begin = 0; begin < width; begin += 128)
      store_linear_block(normed, begin, width, args.round_linear, args.qr_linear.row(token));
  } else if (info.pos >= 0) {
    const int phase = info.pos % args.ratio;
    for (int64_t d = lane(); d < args.z.shape[1]; d += 32) args.z(token, d) += args.ape(phase, d);
    if (args.index_z.pointer)
      for (int64_t d = lane(); d < args.index_z.shape[1]; d += 32) args.index_z(token, d) += args.index_ape(phase, d);
  }
}

// The weight-less norm of a head, with the published code's rounding after each tensor operation, then RoPE.
TC_KERNEL(32)
query_kernel(const QueryArgs args) {
  TC_SHARED(float, x, kMaxHead);
  const int64_t head = block_x(), token = block_y(), width = args.q.shape[2];
  float sum = 0;
  for (int64_t d = lane(); d < width; d += 32) {
    const float v = args.q(token, head, d);
    x[d] = v;
    sum = add(sum, to_bf16(mul(v, v)));
  }
  sum = warp_sum(sum);
  const float mean = to_bf16(to_bf16(sum / static_cast<float>(width)) + args.eps);
  const float scale = to_bf16(1.0f / sqrtf(mean));
  warp_sync();
  for (int64_t d = lane(); d < width; d += 32) x[d] = to_bf16(mul(x[d], scale));
  warp_sync();
  rotate(x, width - args.rope_dim, args.step, args.rope_table, token, args.rope_dim / 2);
  warp_sync();
  for (int64_t d = lane(); d < width; d += 32) args.out(token, head, d) = narrow(x[d]);
}

/// Whole warp, n a power of two, 32 <= n <= 1024: x <- n^-1/2 H x rounded to bf16, in shared memory.
template <class Row>
TC_DEVICE void hadamard(Row& x, int n) {
  for (int half = 1; half < n; half *= 2) {
    for (int i = lane(); i < n / 2; i += 32) {
      const int at = i / half * 2 * half + i % half;
      const float a = x[at], b = x[at + half];
      x[at] = add(a, b);
      x[at + half] = add(a, -b);
    }
    warp_sync();
  }
  const float scale = static_cast<float>(1.0 / sqrt(static_cast<double>(n)));
  for (int i = lane(); i < n; i += 32) x[i] = to_bf16(mul(x[i], scale));
  warp_sync();
}

TC_KERNEL(32)
index_query_kernel(const IndexQueryArgs args) {
  TC_SHARED(float, x, 1024);
  const int64_t head = block_x(), token = block_y();
  const int width = static_cast<int>(args.q.shape[2]);
  for (int d = lane(); d < width; d += 32) x[d] = args.q(token, head, d);
  warp_sync();
  rotate(x, width - args.rope_dim, args.step, 1, token, args.rope_dim / 2);
  warp_sync();
  hadamard(x, width);
  for (int begin = 0; begin < width; begin += 32) {
    const float v = x[begin + lane()], scale = e2m1_scale(warp_max(absolute(v)));
    args.out(token, head, begin + lane()) = narrow(mul(e2m1_value(nearest_e2m1(v / scale)), scale));
  }
  if (lane() == 0) args.gates(token, head) = to_bf16(mul(static_cast<float>(args.gates(token, head)), args.gate_scale));
}

/// Pools the window that ends at the token, per channel: softmax over its entries (ref::compress_window), rounded.
template <class Row>
TC_DEVICE void pool_window(const CompressArgs& args, const TokenInfo& info, const DeviceView<const float, 2>& a,
                           const DeviceView<const float, 2>& z, int64_t ring_at, int64_t row_width, Row& x) {
  const int64_t width = a.shape[1], row = info.pos / args.ratio;
  const bool overlap = width != row_width;
  const int64_t window = row * args.ratio, begin = overlap && row > 0 ? window - args.ratio : window;
  const SequenceInfo sequence = args.step.sequences(info.sequence);
  const int64_t slot_floats = 2 * (args.a.shape[1] + args.index_a.shape[1]);
  const int64_t ring = sequence.ring * args.ring_floats + args.ring_offset;
  const auto value = [&](const DeviceView<const float, 2>& chunk, int64_t in_slot, int64_t pos, int64_t d) {
    const int64_t channel = d + (overlap && pos >= window ? row_width : 0);
    if (pos >= info.first_pos) return static_cast<float>(chunk(info.first_token + pos - info.first_pos, channel));
    return static_cast<float>(args.rings(ring + pos % args.ring_slots * slot_floats + in_slot + channel));
  };
  for (int64_t d = thread(); d < row_width; d += block_threads()) {
    float largest = -INFINITY, sum = 0, pooled = 0;
    for (int64_t pos = begin; pos <= info.pos; ++pos) largest = max_of(largest, value(z, ring_at + width, pos, d));
    for (int64_t pos = begin; pos <= info.pos; ++pos) {
      const float weight = expf(value(z, ring_at + width, pos, d) - largest);
      sum = add(sum, weight);
      pooled = add(pooled, mul(weight, value(a, ring_at, pos, d)));
    }
    x[d] = to_bf16(pooled / sum);
  }
}

// block_y: 0 the compressed row, 1 its index key. Blocks of tokens that complete no window have nothing to do.
TC_KERNEL(256)
compress_kernel(const CompressArgs args) {
  TC_SHARED(float, x, kMaxHead);
  const int64_t token = block_x();
  const TokenInfo info = args.step.tokens(token);
  if (info.pos < 0 || (info.pos + 1) % args.ratio != 0) return;  // the whole block
  const bool indexer = block_y() == 1;
  const int64_t width = indexer ? args.index_width : args.row_width, row = info.pos / args.ratio;
  if (indexer)
    pool_window(args, info, args.index_a, args.index_z, 2 * args.a.shape[1], width, x);
  else
    pool_window(args, info, args.a, args.z, 0, width, x);
  block_sync();
  if (warp() != 0) return;
  const DeviceView<const float, 1>& norm = indexer ? args.index_norm : args.norm;
  const float scale = warp_inverse_rms(x, width, args.eps);
  warp_sync();
  for (int64_t d = lane(); d < width; d += 32) x[d] = to_bf16(mul(static_cast<float>(norm(d)), mul(x[d], scale)));
  warp_sync();
  rotate(x, width - args.rope_dim, args.step, args.rope_table, token, args.rope_dim / 2);
  warp_sync();
  if (!indexer) {
    const RowPlace place = row_place(args.step, args.pages, info, row);
    store_cached(x, width - args.rope_dim, width, home_row(args.pages, place));
    const int32_t slot = slot_of_row(args.pages, place);  // of whoever had the page before
    if (slot >= 0) store_cached(x, width - args.rope_dim, width, hot_row(args.pages, slot));
    return;
  }
  // An index key: one row of an mxfp4 row group of 16 keys (packed_matrix.h), its nibbles and scales.
  hadamard(x, static_cast<int>(width));
  const DeviceView<uint8_t, 1> group = index_group(args.step, args.pages, info, row / 16);
  const int64_t tiles = width / 32, r = row % 16;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const float v = x[tile * 32 + lane()], key_scale = e2m1_scale(warp_max(absolute(v)));
    const uint32_t code = nearest_e2m1(v / key_scale);
    // Byte 2(2r + p) + h of line b holds columns 8b + 4h + p (low nibble) and 8b + 4h + 2 + p.
    const uint32_t above = shuffle(kFullMask, code, (lane() + 2) & 31);
    const int column = lane() % 8, p = column % 2, h = column / 4;
    if (column / 2 % 2 == 0)
      group[tile * 256 + lane() / 8 * 64 + 2 * (2 * r + p) + h] = static_cast<uint8_t>(code | above << 4);
    if (lane() == 0) group[tiles * 256 + tile * 16 + r] = static_cast<uint8_t>(bits_to<uint32_t>(key_scale) >> 23);
  }
}

// The last tokens of a segment stay in its sequence's ring: later rows pool them.
TC_KERNEL(256)
ring_kernel(const CompressArgs args) {
  const int64_t token = block_x();
  const TokenInfo info = args.step.tokens(token);
  const int64_t left = info.first_token + info.segment_tokens - token;
  if (info.pos < 0 || left > args.ring_slots) return;
  const SequenceInfo sequence = args.step.sequences(info.sequence);
  const int64_t width = args.a.shape[1], index_width = args.index_a.shape[1];
  const int64_t slot =
      sequence.ring * args.ring_floats + args.ring_offset + info.pos % args.ring_slots * 2 * (width + index_width);
  for (int64_t d = thread(); d < width; d += block_threads()) {
    args.rings(slot + d) = args.a(token, d);
    args.rings(slot + width + d) = args.z(token, d);
  }
  for (int64_t d = thread(); d < index_width; d += block_threads()) {
    args.rings(slot + 2 * width + d) = args.index_a(token, d);
    args.rings(slot + 2 * width + index_width + d) = args.index_z(token, d);
  }
}

}  // namespace

void TC_BACKEND::rows(Stream& stream, const RowsArgs& args) {
  TC_CHECK(args.kv.shape[1] <= kMaxHead && args.qr.shape[1] <= kMaxRow);
  launch(stream, "rows", rows_kernel, {args.kv.shape[0], args.ratio > 0 ? 3 : 2}, 32, args);
}
void TC_BACKEND::queries(Stream& stream, const QueryArgs& args) {
  TC_CHECK(args.q.shape[2] <= kMaxHead);
  launch(stream, "queries", query_kernel, {args.q.shape[1], args.q.shape[0]}, 32, args);
}
void TC_BACKEND::index_queries(Stream& stream, const IndexQueryArgs& args) {
  TC_CHECK(args.q.shape[2] <= 1024 && args.q.shape[2] % 32 == 0);
  launch(stream, "index_queries", index_query_kernel, {args.q.shape[1], args.q.shape[0]}, 32, args);
}
void TC_BACKEND::compress(Stream& stream, const CompressArgs& args) {
  TC_CHECK(args.row_width <= kMaxHead && args.index_width % 32 == 0);
  launch(stream, "compress", compress_kernel, {args.a.shape[0], args.index_a.pointer ? 2 : 1},
         row_threads(args.row_width), args);
  launch(stream, "keep_ring", ring_kernel, {args.a.shape[0]}, row_threads(args.a.shape[1]), args);
}

}  // namespace thermocline::gpu
