// Micro-kernels in plain C++: they run everywhere, and the fp32 numerics are defined by them.
#include <cstring>

#include "kernels_cpu/kernel_table.h"
#include "kernels_cpu/ref/ops.h"
#include "runtime/base/number_formats.h"

namespace thermocline::cpu::scalar {
namespace {

// A tile is decoded once and used by every token of the call; sums run over k in order, one scale at a time.
template <WeightFormat format, ScaleFormat scale>
void gemm(const RowGroup& w, const void* x_void, int m, float* y) {
  const float* x = static_cast<const float*>(x_void);
  for (int64_t i = 0; i < m * kTileRows; ++i) y[i] = 0;
  float values[kTileRows * kTileCols];
  for (int64_t tile = 0; tile < w.k_tiles; ++tile) {
    decode_tile(format, w.tiles + tile * tile_bytes(format), values);
    float scales[kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r) scales[r] = tile_scale(scale, w, tile, r);
    for (int token = 0; token < m; ++token) {
      float sums[kTileRows] = {};
      const float* xt = x + (tile * m + token) * kTileCols;
      for (int64_t k = 0; k < kTileCols; ++k)
        for (int64_t r = 0; r < kTileRows; ++r) sums[r] += values[k * kTileRows + r] * xt[k];
      for (int64_t r = 0; r < kTileRows; ++r) y[token * kTileRows + r] += sums[r] * scales[r];
    }
  }
}

// On INT8 activations the products of a tile add up as integers (e2m1 in halves), exactly.
template <WeightFormat format, ScaleFormat scale>
void gemm_int8(const RowGroup& w, const void* x_void, int m, float* y) {
  constexpr int kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  constexpr float kUnit = format == WeightFormat::mxfp4 ? 0.5f : 1.0f;
  const Int8Chunk* x = static_cast<const Int8Chunk*>(x_void);
  for (int64_t i = 0; i < m * kTileRows; ++i) y[i] = 0;
  float values[kTileRows * kTileCols];
  for (int64_t tile = 0; tile < w.k_tiles; ++tile) {
    decode_tile(format, w.tiles + tile * tile_bytes(format), values);
    for (int token = 0; token < m; ++token) {
      const Int8Chunk& chunk = x[tile * m + token];
      int32_t dots[kTileRows] = {};
      for (int64_t i = 0; i < kTileCols; ++i) {
        const float* column = values + (i / 8 * 8 + kOrder[i % 8]) * kTileRows;
        for (int64_t r = 0; r < kTileRows; ++r) dots[r] += static_cast<int32_t>(column[r] / kUnit) * chunk.codes[i];
      }
      for (int64_t r = 0; r < kTileRows; ++r)
        y[token * kTileRows + r] += static_cast<float>(dots[r]) * (tile_scale(scale, w, tile, r) * kUnit * chunk.scale);
    }
  }
}

float element(const float* row, int64_t i) { return row[i]; }
float element(const bf16* row, int64_t i) { return bf16_to_float(row[i]); }

template <class T>
void attention_scores(const float* q, int64_t q_stride, int heads, const void* const* rows, int64_t n, int64_t c,
                      float scale, float* scores, int64_t scores_stride) {
  for (int head = 0; head < heads; ++head) {
    for (int64_t i = 0; i < n; ++i) {
      const T* row = static_cast<const T*>(rows[i]);
      float sum = 0;
      for (int64_t d = 0; d < c; ++d) sum += q[head * q_stride + d] * element(row, d);
      scores[head * scores_stride + i] = sum * scale;
    }
  }
}

template <class T>
void attention_values(const float* p, int64_t p_stride, int heads, const void* const* rows, int64_t n, int64_t c,
                      float* out, int64_t out_stride) {
  for (int head = 0; head < heads; ++head) {
    float* o = out + head * out_stride;
    for (int64_t d = 0; d < c; ++d) o[d] = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T* row = static_cast<const T*>(rows[i]);
      const float weight = p[head * p_stride + i];
      for (int64_t d = 0; d < c; ++d) o[d] += weight * element(row, d);
    }
  }
}

void unpack_fp8_rows(const void* const* rows, int64_t n, int64_t nope, int64_t rope, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i, out += nope + rope) {
    const uint8_t* row = static_cast<const uint8_t*>(rows[i]);
    const uint8_t* codes = row + 2 * rope;
    const uint8_t* scales = codes + nope;
    for (int64_t d = 0; d < nope; ++d)
      out[d] = float_to_bf16(e4m3_to_float(codes[d]) * e8m0_to_float(scales[d / kFp8Block]));
    std::memcpy(out + nope, row, static_cast<size_t>(2 * rope));
  }
}

// Eight partial sums: closer to the exact sum than one long chain, and what a vector unit does anyway.
float dot(const float* a, const float* b, int64_t n) {
  float sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int lane = 0; lane < 8; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  for (; i < n; ++i) sums[i % 8] += a[i] * b[i];
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

float sum_squares(const float* x, int64_t n) { return dot(x, x, n); }

void gemv_f32(const float* w, const float* x, int64_t n, int64_t k, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = dot(w + i * k, x, k);
}

void divide(float* x, int64_t n, float denominator, bool round) {
  for (int64_t i = 0; i < n; ++i) x[i] = round ? round_bf16(x[i] / denominator) : x[i] / denominator;
}

void swiglu(const float* gate, const float* up, int64_t n, float limit, float weight, bool round, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = round ? round_bf16(gate[i]) : gate[i], u = round ? round_bf16(up[i]) : up[i];
    const float h = weight * ref::swiglu(g, u, limit);
    out[i] = round ? round_bf16(h) : h;
  }
}

double peak_flops(int64_t rounds) {
  float sums[16] = {};
  volatile float seed = 1.0f;
  const float a = seed;
  for (int64_t round = 0; round < rounds; ++round)
    for (float& sum : sums) sum = sum * a + a;
  for (const float sum : sums) seed = seed + sum;
  return static_cast<double>(rounds) * 16 * 2;
}

double peak_int8_ops(int64_t rounds) {
  int32_t sums[16] = {};
  volatile int8_t seed = 1;
  const int8_t a = seed;
  for (int64_t round = 0; round < rounds; ++round)
    for (int32_t& sum : sums) sum += a * (a + static_cast<int32_t>(round & 1));
  for (const int32_t sum : sums) seed = static_cast<int8_t>(seed + sum);
  return static_cast<double>(rounds) * 16 * 2;
}

}  // namespace

// Products of a tile add up as integers in quarters, exactly; tiles join in float32.
void index_scores_fp4(const Int8Chunk* q, const float* gates, int heads, const uint8_t* const* groups, int64_t n,
                      int64_t k_tiles, float* scores) {
  constexpr int kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  for (int64_t g = 0; g < n; ++g) {
    float* out = scores + g * kTileRows;
    for (int64_t r = 0; r < kTileRows; ++r) out[r] = 0;
    const RowGroup keys{groups[g], groups[g] + k_tiles * 256, k_tiles, 1};
    int32_t values[8 * kTileRows * kTileCols];
    TC_CHECK(k_tiles <= 8);
    for (int64_t tile = 0; tile < k_tiles; ++tile) {
      float decoded[kTileRows * kTileCols];
      decode_tile(WeightFormat::mxfp4, keys.tiles + tile * 256, decoded);
      for (int64_t i = 0; i < kTileCols; ++i)
        for (int64_t r = 0; r < kTileRows; ++r)
          values[(tile * kTileCols + i) * kTileRows + r] =
              static_cast<int32_t>(2 * decoded[(i / 8 * 8 + kOrder[i % 8]) * kTileRows + r]);
    }
    for (int h = 0; h < heads; ++h) {
      float dots[kTileRows] = {};
      for (int64_t tile = 0; tile < k_tiles; ++tile) {
        const Int8Chunk& chunk = q[h * k_tiles + tile];
        int32_t sums[kTileRows] = {};
        for (int64_t i = 0; i < kTileCols; ++i)
          for (int64_t r = 0; r < kTileRows; ++r)
            sums[r] += values[(tile * kTileCols + i) * kTileRows + r] * chunk.codes[i];
        for (int64_t r = 0; r < kTileRows; ++r)
          dots[r] +=
              static_cast<float>(sums[r]) * (0.25f * chunk.scale * tile_scale(ScaleFormat::e8m0_rows, keys, tile, r));
      }
      for (int64_t r = 0; r < kTileRows; ++r) {
        const float dot = round_bf16(dots[r]);
        out[r] += round_bf16(gates[h] * (dot > 0 ? dot : 0.0f));
      }
    }
    for (int64_t r = 0; r < kTileRows; ++r) out[r] = round_bf16(out[r]);
  }
}

KernelTable table() {
  KernelTable table;
  table.isa = Isa::scalar;
  table.activation = Activation::f32;
  const auto set = [&](GemmKind kind, GemmTile exact, GemmTile int8) {
    table.gemm[static_cast<int>(kind)] = exact;
    table.gemm_int8[static_cast<int>(kind)] = int8;
  };
  set(GemmKind::mxfp4_e8m0, gemm<WeightFormat::mxfp4, ScaleFormat::e8m0_rows>,
      gemm_int8<WeightFormat::mxfp4, ScaleFormat::e8m0_rows>);
  set(GemmKind::mxfp4_f32, gemm<WeightFormat::mxfp4, ScaleFormat::f32_rows>,
      gemm_int8<WeightFormat::mxfp4, ScaleFormat::f32_rows>);
  set(GemmKind::fp8_f32, gemm<WeightFormat::fp8, ScaleFormat::f32_blocks>, nullptr);
  set(GemmKind::bf16, gemm<WeightFormat::bf16, ScaleFormat::none>, nullptr);
  set(GemmKind::int8_f32, gemm<WeightFormat::int8, ScaleFormat::f32_rows>,
      gemm_int8<WeightFormat::int8, ScaleFormat::f32_rows>);
  set(GemmKind::int4_f32, gemm<WeightFormat::int4, ScaleFormat::f32_rows>,
      gemm_int8<WeightFormat::int4, ScaleFormat::f32_rows>);
  table.attention_scores_bf16 = attention_scores<bf16>;
  table.attention_scores_f32 = attention_scores<float>;
  table.attention_values_bf16 = attention_values<bf16>;
  table.attention_values_f32 = attention_values<float>;
  table.unpack_fp8_rows = unpack_fp8_rows;
  table.softmax_with_sink = ref::softmax_with_sink;
  table.divide = divide;
  table.index_scores_fp4 = index_scores_fp4;
  table.swiglu = swiglu;
  table.sum_squares = sum_squares;
  table.gemv_f32 = gemv_f32;
  table.peak_flops = peak_flops;
  table.peak_int8_ops = peak_int8_ops;
  return table;
}

}  // namespace thermocline::cpu::scalar
