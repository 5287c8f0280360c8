#include "kernels_cpu/ref/ops.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "runtime/base/number_formats.h"

namespace thermocline::cpu::ref {
namespace {

// The value of the nearest e4m3 code of x, |x| <= 448, without branches so that the loop around it vectorises.
float nearest_e4m3(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits & 0x80000000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) & 0xfff00000u;
  // Below 2^-6 the grid is 2^-9; adding 2^14, whose last bit is 2^-9, rounds to it.
  const uint32_t subnormal = std::bit_cast<uint32_t>((std::bit_cast<float>(magnitude) + 0x1p14f) - 0x1p14f);
  return std::bit_cast<float>(sign | (magnitude < 0x3c800000u ? subnormal : normal));
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

float maybe_round(float x, bool round) { return round ? round_bf16(x) : x; }

}  // namespace

float e4m3_scale(const float* x, int64_t n) {
  float amax = 1e-4f;
  for (int64_t i = 0; i < n; ++i) amax = std::max(amax, std::fabs(x[i]));
  return pow2_ceil(amax * (1.0f / 448.0f));
}

void fake_fp8(float* x, int64_t n, int64_t block) {
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t end = std::min(n, begin + block);
    const float scale = e4m3_scale(x + begin, end - begin), inverse = 1.0f / scale;
    for (int64_t i = begin; i < end; ++i)
      x[i] = nearest_e4m3(std::min(448.0f, std::max(-448.0f, x[i] * inverse))) * scale;
  }
}

void fake_fp4(float* x, int64_t n) {
  constexpr int64_t kBlock = 32;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    float amax = 6 * 0x1p-126f;
    for (int64_t i = begin; i < end; ++i) amax = std::max(amax, std::fabs(x[i]));
    const float scale = pow2_ceil(amax * (1.0f / 6.0f));
    for (int64_t i = begin; i < end; ++i) x[i] = kE2m1[float_to_e2m1(x[i] / scale)] * scale;
  }
}

void hadamard(float* x, int64_t n) {
  for (int64_t half = 1; half < n; half *= 2) {
    for (int64_t begin = 0; begin < n; begin += 2 * half) {
      for (int64_t i = begin; i < begin + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
    }
  }
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

void round_to_bf16(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = round_bf16(x[i]);
}

void linear(const PackedMatrix& w, const float* x, float* y) {
  for (int64_t n = 0; n < w.n; ++n) {
    float sum = 0;
    for (int64_t k = 0; k < w.k; ++k) sum += packed_element(w, n, k) * x[k];
    y[n] = sum;
  }
}

void rms_norm(const float* x, const float* weight, int64_t n, float eps, bool round, float* out) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = maybe_round((weight ? weight[i] : 1.0f) * (x[i] * scale), round);
}

void head_norm(float* q, int64_t n, float eps, bool round) {
  if (!round) return rms_norm(q, nullptr, n, eps, false, q);
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += round_bf16(q[i] * q[i]);
  const float mean = round_bf16(round_bf16(sum / static_cast<float>(n)) + eps);
  const float scale = round_bf16(1.0f / std::sqrt(mean));
  for (int64_t i = 0; i < n; ++i) q[i] = round_bf16(q[i] * scale);
}

std::vector<float> rope_frequencies(int64_t rope_dim, double theta, double factor, int64_t original_seq_len,
                                    double beta_fast, double beta_slow) {
  const double dim = static_cast<double>(rope_dim);
  const auto correction = [&](double beta) {
    return dim * std::log(static_cast<double>(original_seq_len) / (beta * 2 * std::numbers::pi)) /
           (2 * std::log(theta));
  };
  double low = 0, high = 0;
  if (factor > 1) {
    low = std::max(std::floor(correction(beta_fast)), 0.0);
    high = std::min(std::ceil(correction(beta_slow)), dim - 1);
  }
  std::vector<float> frequencies;
  for (int64_t i = 0; i < rope_dim / 2; ++i) {
    const double plain = std::pow(theta, -2.0 * static_cast<double>(i) / dim);
    double frequency = plain;
    if (factor > 1) {
      const double ramp = std::clamp((static_cast<double>(i) - low) / std::max(high - low, 1e-3), 0.0, 1.0);
      frequency = plain / factor * ramp + plain * (1 - ramp);
    }
    frequencies.push_back(static_cast<float>(frequency));
  }
  return frequencies;
}

void rope_angles(const std::vector<float>& frequencies, int64_t pos, float* cos, float* sin) {
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const float angle = static_cast<float>(pos) * frequencies[i];
    cos[i] = std::cos(angle);
    sin[i] = std::sin(angle);
  }
}

void rope(float* x, const float* cos, const float* sin, int64_t pairs, bool inverse, bool round) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1], c = cos[i], s = inverse ? -sin[i] : sin[i];
    x[2 * i] = maybe_round(a * c - b * s, round);
    x[2 * i + 1] = maybe_round(a * s + b * c, round);
  }
}

void hc_split(const float* mixes, const float* scale, const float* base, int hc, int iterations, float eps, float* pre,
              float* post, float* comb) {
  for (int j = 0; j < hc; ++j) {
    pre[j] = sigmoid(mixes[j] * scale[0] + base[j]) + eps;
    post[j] = 2 * sigmoid(mixes[hc + j] * scale[1] + base[hc + j]);
  }
  for (int j = 0; j < hc; ++j) {  // row softmax
    float* row = comb + j * hc;
    float max = -INFINITY, sum = 0;
    for (int k = 0; k < hc; ++k) {
      row[k] = mixes[2 * hc + j * hc + k] * scale[2] + base[2 * hc + j * hc + k];
      max = std::max(max, row[k]);
    }
    for (int k = 0; k < hc; ++k) sum += row[k] = std::exp(row[k] - max);
    for (int k = 0; k < hc; ++k) row[k] = row[k] / sum + eps;
  }
  const auto normalise_columns = [&] {
    for (int k = 0; k < hc; ++k) {
      float sum = 0;
      for (int j = 0; j < hc; ++j) sum += comb[j * hc + k];
      for (int j = 0; j < hc; ++j) comb[j * hc + k] /= sum + eps;
    }
  };
  normalise_columns();
  for (int iteration = 1; iteration < iterations; ++iteration) {
    for (int j = 0; j < hc; ++j) {
      float sum = 0;
      for (int k = 0; k < hc; ++k) sum += comb[j * hc + k];
      for (int k = 0; k < hc; ++k) comb[j * hc + k] /= sum + eps;
    }
    normalise_columns();
  }
}

void hc_read(const float* streams, const float* pre, int hc, int64_t dim, bool round, float* x) {
  for (int64_t d = 0; d < dim; ++d) x[d] = pre[0] * streams[d];
  for (int j = 1; j < hc; ++j)
    for (int64_t d = 0; d < dim; ++d) x[d] += pre[j] * streams[j * dim + d];
  if (round) round_to_bf16(x, dim);
}

void hc_write(float* streams, const float* y, const float* post, const float* comb, int hc, int64_t dim, bool round) {
  constexpr int64_t kBlock = 32;  // a block of every stream is read before any of it is written
  float old[64 * kBlock];
  TC_CHECK(hc <= 64);
  for (int64_t begin = 0; begin < dim; begin += kBlock) {
    const int64_t count = std::min(kBlock, dim - begin);
    for (int j = 0; j < hc; ++j) std::copy_n(streams + j * dim + begin, count, old + j * kBlock);
    for (int k = 0; k < hc; ++k) {
      float* out = streams + k * dim + begin;
      for (int64_t d = 0; d < count; ++d) out[d] = comb[k] * old[d];
      for (int j = 1; j < hc; ++j)
        for (int64_t d = 0; d < count; ++d) out[d] += comb[j * hc + k] * old[j * kBlock + d];
      for (int64_t d = 0; d < count; ++d) out[d] += post[k] * y[begin + d];
      if (round) round_to_bf16(out, count);
    }
  }
}

void compress_window(const float* const* a, const float* const* z, int64_t n, int64_t width, float* out) {
  for (int64_t d = 0; d < width; ++d) {
    float max = -INFINITY, sum = 0, pooled = 0;
    for (int64_t i = 0; i < n; ++i) max = std::max(max, z[i][d]);
    for (int64_t i = 0; i < n; ++i) {
      const float weight = std::exp(z[i][d] - max);
      sum += weight;
      pooled += weight * a[i][d];
    }
    out[d] = pooled / sum;
  }
}

void index_scores(const float* dots, int64_t dots_stride, const float* g, int heads, int64_t n, bool round,
                  float* scores) {
  for (int64_t r = 0; r < n; ++r) scores[r] = 0;
  for (int h = 0; h < heads; ++h) {
    const float* dot = dots + h * dots_stride;
    for (int64_t r = 0; r < n; ++r) scores[r] += maybe_round(g[h] * std::max(0.0f, maybe_round(dot[r], round)), round);
  }
  if (round) round_to_bf16(scores, n);
}

void select_topk(const float* scores, int64_t n, int64_t k, int32_t* order, int32_t* out) {
  std::iota(order, order + n, 0);
  const auto before = [&](int32_t a, int32_t b) {
    const uint32_t x = ordered_bits(scores[a]), y = ordered_bits(scores[b]);
    return x != y ? x > y : a < b;
  };
  if (k < n) std::nth_element(order, order + k, order + n, before);
  std::copy_n(order, k, out);
  std::sort(out, out + k);
}

float softmax_with_sink(float* scores, int64_t n, float sink, bool round) {
  float max = -INFINITY;
  for (int64_t i = 0; i < n; ++i) max = std::max(max, scores[i]);
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    scores[i] = std::exp(scores[i] - max);
    sum += scores[i];
    scores[i] = maybe_round(scores[i], round);
  }
  return sum + std::exp(sink - max);
}

void attention(const float* q, const float* const* rows, int64_t n, int64_t c, float scale, float sink, bool round,
               float* o) {
  std::vector<float> p(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    float sum = 0;
    for (int64_t d = 0; d < c; ++d) sum += q[d] * rows[i][d];
    p[i] = sum * scale;
  }
  const float denominator = softmax_with_sink(p.data(), n, sink, round);
  for (int64_t d = 0; d < c; ++d) {
    float sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += p[i] * rows[i][d];
    o[d] = maybe_round(sum / denominator, round);
  }
}

float sqrt_softplus(float x) { return std::sqrt(std::max(x, 0.0f) + std::log1p(std::exp(-std::fabs(x)))); }

void route(const float* scores, const float* bias, int experts, int top_k, float route_scale, int32_t* ids,
           float* weights) {
  const auto biased = [&](int e) { return scores[e] + (bias ? bias[e] : 0.0f); };
  int kept = 0;
  for (int e = 0; e < experts; ++e) {  // insertion into the best so far; an equal score stays behind the lower id
    if (kept == top_k && !(biased(e) > biased(ids[kept - 1]))) continue;
    int place = kept < top_k ? kept++ : top_k - 1;
    for (; place > 0 && biased(e) > biased(ids[place - 1]); --place) ids[place] = ids[place - 1];
    ids[place] = e;
  }
  route_given(scores, ids, top_k, route_scale, weights);
}

void route_given(const float* scores, const int32_t* ids, int top_k, float route_scale, float* weights) {
  float sum = 0;
  for (int j = 0; j < top_k; ++j) sum += scores[ids[j]];
  for (int j = 0; j < top_k; ++j) weights[j] = scores[ids[j]] / sum * route_scale;
}

float swiglu(float g, float u, float limit) {
  g = std::min(g, limit);
  u = std::max(-limit, std::min(u, limit));
  return g * sigmoid(g) * u;
}

}  // namespace thermocline::cpu::ref
