// The kernel families in plain scalar C++, obvious on purpose: one token, one row or one window at a time, on plain
// pointers. Every faster version is held to these, and what has no faster version yet is called straight from here.
// Formulas: spec sections 3 and 5.2. All sums and intermediate values are float32. `round` means: results are rounded
// to bf16, as the published code stores them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels_cpu/packed_matrix.h"

namespace thermocline::cpu::ref {

// --- number rounding (spec 5.2) ---

/// The power of two by which a block's largest value, or 1e-4, fits e4m3.
float e4m3_scale(const float* x, int64_t n);
/// x <- the nearest e4m3 value times a power-of-two scale per `block` elements; a ragged last block has its own scale.
void fake_fp8(float* x, int64_t n, int64_t block);
/// x <- the nearest e2m1 value times a power-of-two scale per 32 elements.
void fake_fp4(float* x, int64_t n);
/// x <- n^-1/2 H x, Sylvester order; n is a power of two.
void hadamard(float* x, int64_t n);
void round_to_bf16(float* x, int64_t n);

// --- linear (spec 2.2) ---

/// y[n] = sum_k w[n, k] x[k], with the weight dequantised element by element.
void linear(const PackedMatrix& w, const float* x, float* y);

// --- norms, RoPE (spec 3.5 - 3.7) ---

/// out[i] = weight[i] x[i] / sqrt(mean(x^2) + eps). weight null: all ones. out may be x.
void rms_norm(const float* x, const float* weight, int64_t n, float eps, bool round, float* out);
/// The weight-less norm of one query head. `round` reproduces the published code's bf16 tensor operations one by one.
void head_norm(float* q, int64_t n, float eps, bool round);

/// RoPE frequencies of rope_dim / 2 pairs: plain, or YaRN-blended when factor > 1.
std::vector<float> rope_frequencies(int64_t rope_dim, double theta, double factor = 1, int64_t original_seq_len = 0,
                                    double beta_fast = 0, double beta_slow = 0);
/// cos and sin of float32(pos) * freq, the product in float32 as in the published table.
void rope_angles(const std::vector<float>& frequencies, int64_t pos, float* cos, float* sin);
/// Rotates interleaved pairs of x[0 .. 2 pairs); inverse turns back.
void rope(float* x, const float* cos, const float* sin, int64_t pairs, bool inverse, bool round);

// --- hyper-connections (spec 3.2 - 3.4) ---

/// mixes [(2 + hc) hc] -> pre [hc], post [hc], comb [hc, hc] by `iterations` Sinkhorn rounds.
void hc_split(const float* mixes, const float* scale, const float* base, int hc, int iterations, float eps, float* pre,
              float* post, float* comb);
/// x[d] = sum_j pre[j] streams[j, d].
void hc_read(const float* streams, const float* pre, int hc, int64_t dim, bool round, float* x);
/// streams[k, d] <- post[k] y[d] + sum_j comb[j, k] streams[j, d].
void hc_write(float* streams, const float* y, const float* post, const float* comb, int hc, int64_t dim, bool round);

// --- compressed rows (spec 3.8) ---

/// Pools one window per channel: out[d] = sum_i softmax_i(z[i][d]) a[i][d] over n entries.
void compress_window(const float* const* a, const float* const* z, int64_t n, int64_t width, float* out);
/// I[r] = sum_h g[h] max(0, q[h] . keys[r]); `round` rounds dots, products and sums to bf16 as the published code does.
///   dots [heads, dots_stride]  q . k already computed;  scores [n] out
void index_scores(const float* dots, int64_t dots_stride, const float* g, int heads, int64_t n, bool round,
                  float* scores);
/// The indices of the k largest scores, in rising order; among equals the lower index wins; a NaN lies beyond the
/// infinity of its sign. k <= n; order is scratch [n].
void select_topk(const float* scores, int64_t n, int64_t k, int32_t* order, int32_t* out);

// --- attention (spec 3.7) ---

/// One head: softmax over n rows with a sink that has no value; o [c].
///   rows [n] pointers to rows of c floats;  round rounds the probabilities and the result to bf16
void attention(const float* q, const float* const* rows, int64_t n, int64_t c, float scale, float sink, bool round,
               float* o);
/// scores [n] -> probabilities relative to the maximum, and their sum with the sink. Returns the denominator.
float softmax_with_sink(float* scores, int64_t n, float sink, bool round);

// --- mixture of experts (spec 3.9) ---

/// sqrt(softplus(x)).
float sqrt_softplus(float x);
/// The top_k experts by score + bias (a tie goes to the lower id); weights are the unbiased scores over their sum,
/// times route_scale. bias null: scores alone.
void route(const float* scores, const float* bias, int experts, int top_k, float route_scale, int32_t* ids,
           float* weights);
/// The same weights for experts that are given (hash layers).
void route_given(const float* scores, const int32_t* ids, int top_k, float route_scale, float* weights);
/// silu(min(g, limit)) * clamp(u, -limit, limit).
float swiglu(float g, float u, float limit);

}  // namespace thermocline::cpu::ref
