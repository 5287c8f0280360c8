// Embedding and hyper-connections: mixing weights, reading S streams as one, writing back. Source: spec 3.1 - 3.4.
#include "kernels_gpu/device/device_view.h"
#include "kernels_gpu/device/numbers.cuh"
#include "kernels_gpu/launch.h"

namespace thermocline::gpu {
namespace {
using namespace dev;

constexpr int kMaxStreams = 16;
constexpr int kMaxDim = 8192;  // 32 KiB of a row in shared memory

TC_KERNEL(256)
embed_kernel(const EmbedArgs args) {
  const int64_t token = block_x(), dim = args.rows.shape[1];
  for (int64_t d = thread(); d < dim; d += block_threads()) {
    const float x = widen(args.rows(token, d));
    for (int64_t s = 0; s < args.streams.shape[1]; ++s) args.streams(token, s, d) = x;
  }
}

// One block an output and token; the last output is the sum of squares.
TC_KERNEL(256)
hc_mix_kernel(const HcMixArgs args) {
  TC_SHARED(float, scratch, 33);
  const int64_t row = block_y(), output = block_x(), width = args.streams.shape[1];
  const int64_t token = args.rows.pointer ? static_cast<int64_t>(static_cast<int32_t>(args.rows(row))) : row;
  float sum = 0;
  for (int64_t at = 4 * thread(); at < width; at += 4 * block_threads()) {  // 16 bytes a thread
    const float* const x = args.streams.read(token * width + at, 4);
    const float* const w = output < args.fn.shape[0] ? args.fn.read(output * width + at, 4) : x;
    for (int i = 0; i < 4; ++i) sum = fma_of(x[i], w[i], sum);
  }
  sum = block_sum(sum, scratch);
  if (thread() == 0) args.mixes(row, output) = sum;
}

/// 1 / rms of a shared row, its own order of addition.
template <class Row, class Scratch>
TC_DEVICE float inverse_rms(const Row& x, int64_t width, float eps, Scratch& scratch) {
  float sum = 0;
  for (int64_t d = thread(); d < width; d += block_threads()) {
    const float v = x[d];
    sum = fma_of(v, v, sum);
  }
  return 1.0f / sqrtf(block_sum(sum, scratch) / static_cast<float>(width) + eps);
}

/// x[d] = sum_j pre[j] streams[token, j, d], rounded; returns 1 / rms of x. A barrier first, as pre is another
/// thread's.
template <class Pre, class X, class Scratch>
TC_DEVICE float mix_streams(const DeviceView<const float, 3>& streams, int64_t token, const Pre& pre, float eps, X& x,
                            Scratch& scratch) {
  block_sync();
  const int64_t dim = streams.shape[2];
  for (int64_t d = thread(); d < dim; d += block_threads()) {
    float sum = mul(pre[0], streams(token, 0, d));
    for (int j = 1; j < streams.shape[1]; ++j) sum = add(sum, mul(pre[j], streams(token, j, d)));
    x[d] = to_bf16(sum);
  }
  block_sync();
  return inverse_rms(x, dim, eps, scratch);
}

/// Sinkhorn rounds on an S x S matrix, S S <= 32: lane i holds element i; sums run over the axis in order.
TC_DEVICE float sinkhorn(float value, int s, int iterations, float eps) {
  const int row = lane() / s, column = lane() % s;
  const bool mine = lane() < s * s;
  const auto over_row = [&](float x) {
    float sum = 0;
    for (int i = 0; i < s; ++i) sum = add(sum, shuffle(kFullMask, x, min_of(row, s - 1) * s + i));
    return sum;
  };
  const auto over_column = [&](float x) {
    float sum = 0;
    for (int i = 0; i < s; ++i) sum = add(sum, shuffle(kFullMask, x, i * s + column));
    return sum;
  };
  float largest = -INFINITY;
  for (int i = 0; i < s; ++i) largest = max_of(largest, shuffle(kFullMask, value, min_of(row, s - 1) * s + i));
  float x = mine ? expf(value - largest) : 0.0f;
  x = x / over_row(x) + eps;
  x = x / (over_column(x) + eps);
  for (int i = 1; i < iterations; ++i) {
    x = x / (over_row(x) + eps);
    x = x / (over_column(x) + eps);
  }
  return x;
}

template <class X>
TC_DEVICE void norm_to_inputs(X& x, int64_t dim, const DeviceView<const float, 1>& norm, float scale,
                              const DeviceView<bf16, 1>& plain, const DeviceView<bf16, 1>& linear, bool round_linear) {
  for (int64_t begin = warp() * 128; begin < dim; begin += block_threads() / 32 * 128) {
    const auto normed = [&](int64_t d) { return to_bf16(mul(static_cast<float>(norm(d)), mul(x[d], scale))); };
    if (plain.pointer) store_linear_block(normed, begin, dim, false, plain);
    if (linear.pointer) store_linear_block(normed, begin, dim, round_linear, linear);
  }
}

TC_KERNEL(256)
hc_read_kernel(const HcReadArgs args) {
  TC_SHARED(float, x, kMaxDim);
  TC_SHARED(float, pre, kMaxStreams);
  TC_SHARED(float, scratch, 33);
  const int64_t token = block_x(), dim = args.streams.shape[2];
  const int s = static_cast<int>(args.streams.shape[1]), outputs = (2 + s) * s;
  if (warp() == 0) {
    const float width = static_cast<float>(s * dim);
    const float scale = 1.0f / sqrtf(static_cast<float>(args.mixes(token, outputs)) / width + args.norm_eps);
    const auto mix = [&](int i, int part) {
      return add(mul(mul(static_cast<float>(args.mixes(token, i)), scale), static_cast<float>(args.scale(part))),
                 static_cast<float>(args.base(i)));
    };
    if (lane() < s) {
      pre[lane()] = sigmoid(mix(lane(), 0)) + args.hc_eps;
      args.post(token, lane()) = 2 * sigmoid(mix(s + lane(), 1));
    }
    const bool mine = lane() < s * s;
    const float comb = sinkhorn(mine ? mix(2 * s + lane(), 2) : 0.0f, s, args.iterations, args.hc_eps);
    if (mine) args.comb(token, lane()) = comb;
  }
  const float scale = mix_streams(args.streams, token, pre, args.norm_eps, x, scratch);
  norm_to_inputs(x, dim, args.norm, scale, args.plain.row(token), args.linear.row(token), args.round_linear);
}

TC_KERNEL(256)
head_read_kernel(const HeadReadArgs args) {
  TC_SHARED(float, x, kMaxDim);
  TC_SHARED(float, pre, kMaxStreams);
  TC_SHARED(float, scratch, 33);
  const int64_t row = block_x(), token = static_cast<int32_t>(args.rows(row)), dim = args.streams.shape[2];
  const int s = static_cast<int>(args.streams.shape[1]);
  if (thread() < s) {
    const float width = static_cast<float>(s * dim);
    const float scale = 1.0f / sqrtf(static_cast<float>(args.mixes(row, s)) / width + args.norm_eps);
    const float mix = mul(static_cast<float>(args.mixes(row, thread())), scale);
    pre[thread()] = sigmoid(add(mul(mix, static_cast<float>(args.scale(0))), static_cast<float>(args.base(thread())))) +
                    args.hc_eps;
  }
  const float scale = mix_streams(args.streams, token, pre, args.norm_eps, x, scratch);
  norm_to_inputs(x, dim, args.norm, scale, args.hidden.row(row), {}, false);
}

// The sum of experts is formed here, by rising expert id and the shared expert last: whoever computed a pair, the order
// is the same.
TC_KERNEL(256)
hc_write_kernel(const HcWriteArgs args) {
  const int64_t token = block_x(), dim = args.streams.shape[2];
  const int s = static_cast<int>(args.streams.shape[1]);
  for (int64_t d = thread(); d < dim; d += block_threads()) {
    float y = 0;
    if (args.y.pointer) {
      y = args.y(token, d);
    } else {
      for (int64_t j = 0; j < args.pair_of.shape[1]; ++j) {
        const int32_t pair = args.pair_of(token, j);
        y = add(y, widen(args.pairs(pair, d)));
      }
      y = to_bf16(add(y, widen(args.shared(token, d))));
    }
    float old[kMaxStreams];
    for (int j = 0; j < s; ++j) old[j] = args.streams(token, j, d);
    for (int k = 0; k < s; ++k) {
      float sum = mul(args.comb(token, k), old[0]);
      for (int j = 1; j < s; ++j) sum = add(sum, mul(args.comb(token, j * s + k), old[j]));
      args.streams(token, k, d) = to_bf16(add(sum, mul(args.post(token, k), y)));
    }
  }
}

TC_KERNEL(32)
linear_input_kernel(const LinearInputArgs args) {
  const int64_t row = block_y(), begin = static_cast<int64_t>(block_x()) * 128, width = args.x.shape[1];
  store_linear_block([&](int64_t column) { return static_cast<float>(args.x(row, column)); }, begin, width,
                     args.round_linear, args.out.row(row));
}

TC_KERNEL(256)
norm_rows_kernel(const NormRowsArgs args) {
  TC_SHARED(float, x, kMaxDim);
  TC_SHARED(float, scratch, 33);
  const int64_t row = block_x(), dim = args.norm.shape[0];
  for (int64_t d = thread(); d < dim; d += block_threads())
    x[d] = args.x.pointer ? static_cast<float>(args.x(row, d)) : widen(args.x_bf16(row, d));
  block_sync();
  const float scale = inverse_rms(x, dim, args.eps, scratch);
  norm_to_inputs(x, dim, args.norm, scale, {}, args.linear.row(row), args.round_linear);
}

TC_KERNEL(256)
add_rows_kernel(const AddRowsArgs args) {
  const int64_t token = block_x(), dim = args.b.shape[1];
  for (int64_t s = 0; s < args.a.shape[1]; ++s)
    for (int64_t d = thread(); d < dim; d += block_threads())
      args.a(token, s, d) = to_bf16(add(static_cast<float>(args.a(token, s, d)), static_cast<float>(args.b(token, d))));
}

TC_KERNEL(256)
argmax_kernel(const ArgmaxArgs args) {
  TC_SHARED(float, best, 8);
  TC_SHARED(int32_t, ids, 8);
  const int64_t row = block_x(), vocab = args.logits.shape[1];
  float value = -INFINITY;
  constexpr int kNone = 0x7fffffff, kNotFinite = -1;
  int id = kNone;
  const auto better = [&](float x, int i) {
    if (id == kNotFinite || i == kNone) return false;
    return i == kNotFinite || id == kNone || x > value || (x == value && i < id);
  };
  for (int64_t v = thread(); v < vocab; v += block_threads()) {
    const float x = args.logits(row, v);
    const int i = x - x == 0 ? static_cast<int>(v) : kNotFinite;
    if (!better(x, i)) continue;
    value = x;
    id = i;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = shuffle_xor(kFullMask, value, offset);
    const int other_id = shuffle_xor(kFullMask, id, offset);
    if (better(other, other_id)) {
      value = other;
      id = other_id;
    }
  }
  if (lane() == 0) {
    best[warp()] = value;
    ids[warp()] = id;
  }
  block_sync();
  if (thread() != 0) return;
  for (int w = 1; w < block_threads() / 32; ++w)
    if (better(best[w], ids[w])) {
      value = best[w];
      id = ids[w];
    }
  args.ids(row) = id;
}

}  // namespace

void TC_BACKEND::embed(Stream& stream, const EmbedArgs& args) {
  launch(stream, "embed", embed_kernel, {args.rows.shape[0]}, row_threads(args.rows.shape[1]), args);
}
void TC_BACKEND::hc_mix(Stream& stream, const HcMixArgs& args) {
  TC_CHECK(args.streams.shape[1] % 4 == 0);
  const int64_t rows = args.rows.pointer ? args.rows.shape[0] : args.streams.shape[0];
  launch(stream, "hc_mix", hc_mix_kernel, {args.fn.shape[0] + 1, rows}, row_threads(args.streams.shape[1] / 4), args);
}
void TC_BACKEND::hc_read(Stream& stream, const HcReadArgs& args) {
  TC_CHECK(args.streams.shape[1] * args.streams.shape[1] <= 32 && args.streams.shape[2] <= kMaxDim);
  launch(stream, "hc_read", hc_read_kernel, {args.streams.shape[0]}, row_threads(args.streams.shape[2]), args);
}
void TC_BACKEND::head_read(Stream& stream, const HeadReadArgs& args) {
  TC_CHECK(args.streams.shape[1] <= kMaxStreams && args.streams.shape[2] <= kMaxDim);
  launch(stream, "head_read", head_read_kernel, {args.rows.shape[0]}, row_threads(args.streams.shape[2]), args);
}
void TC_BACKEND::hc_write(Stream& stream, const HcWriteArgs& args) {
  TC_CHECK(args.streams.shape[1] <= kMaxStreams);
  launch(stream, "hc_write", hc_write_kernel, {args.streams.shape[0]}, row_threads(args.streams.shape[2]), args);
}
void TC_BACKEND::linear_input(Stream& stream, const LinearInputArgs& args) {
  launch(stream, "linear_input", linear_input_kernel, {(args.x.shape[1] + 127) / 128, args.x.shape[0]}, 32, args);
}
void TC_BACKEND::norm_rows(Stream& stream, const NormRowsArgs& args) {
  TC_CHECK(args.norm.shape[0] <= kMaxDim);
  const int64_t rows = args.x.pointer ? args.x.shape[0] : args.x_bf16.shape[0];
  launch(stream, "norm_rows", norm_rows_kernel, {rows}, row_threads(args.norm.shape[0]), args);
}
void TC_BACKEND::add_rows(Stream& stream, const AddRowsArgs& args) {
  launch(stream, "add_rows", add_rows_kernel, {args.a.shape[0]}, row_threads(args.b.shape[1]), args);
}
void TC_BACKEND::argmax(Stream& stream, const ArgmaxArgs& args) {
  launch(stream, "argmax", argmax_kernel, {args.logits.shape[0]}, row_threads(args.logits.shape[1]), args);
}

}  // namespace thermocline::gpu
