#include "kernels_cpu/indexer.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels_cpu/ref/ops.h"
#include "runtime/base/number_formats.h"

namespace thermocline::cpu {
namespace {

constexpr float kLowestScale = 0x1p-126f;  // of a block of zeros

// The power-of-two scale of 32 FP4 values; the published rounding is idempotent, so it is the one they were made with.
float fp4_scale(const float* x, int64_t n) {
  float amax = 0;
  for (int64_t i = 0; i < n; ++i) amax = std::max(amax, std::fabs(x[i]));
  return pow2_ceil(std::max(amax * (1.0f / 6.0f), kLowestScale));
}

}  // namespace

void store_index_key(const float* key, int64_t c, int64_t r, uint8_t* group) {
  const int64_t k_tiles = (c + kTileCols - 1) / kTileCols;
  uint8_t* exponents = group + k_tiles * 256;
  uint8_t highest = 1;
  for (int64_t tile = 0; tile < k_tiles; ++tile) {
    const int64_t count = std::min(kTileCols, c - tile * kTileCols);
    const float* x = key + tile * kTileCols;
    const float scale = fp4_scale(x, count);
    const uint8_t exponent = static_cast<uint8_t>(std::bit_cast<uint32_t>(scale) >> 23);
    exponents[tile * 16 + r] = exponent;
    highest = std::max(highest, exponent);
    uint8_t codes[kTileCols] = {};
    for (int64_t i = 0; i < count; ++i) codes[i] = float_to_e2m1(x[i] / scale);
    for (int64_t line = 0; line < 4; ++line) {
      uint32_t word = 0;  // nibble s of half p is column 8 line + 2 s + p
      for (int64_t i = 0; i < 8; ++i)
        word |= static_cast<uint32_t>(codes[8 * line + i]) << (16 * (i % 2) + 4 * (i / 2));
      std::memcpy(group + tile * 256 + line * 64 + r * 4, &word, 4);
    }
  }
  // A block of zeros may have any scale; one near the others keeps the row on the fast path.
  for (int64_t tile = 0; tile < k_tiles; ++tile)
    if (exponents[tile * 16 + r] == 1) exponents[tile * 16 + r] = highest;
}

void pack_index_query(const float* q, int64_t c, Int8Chunk* out) {
  constexpr int kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  const int64_t k_tiles = (c + kTileCols - 1) / kTileCols;
  float lowest = INFINITY, highest = 0;
  for (int64_t tile = 0; tile < k_tiles; ++tile) {
    const float scale = out[tile].scale = fp4_scale(q + tile * kTileCols, std::min(kTileCols, c - tile * kTileCols));
    if (scale == kLowestScale) continue;
    lowest = std::min(lowest, scale);
    highest = std::max(highest, scale);
  }
  if (highest == 0) lowest = highest = kLowestScale;
  // Blocks within 2^3 of each other share the smallest scale: at most 2 x 6 x 8 = 96 fits a byte.
  const bool fold = highest <= 8 * lowest;
  for (int64_t tile = 0; tile < k_tiles; ++tile) {
    Int8Chunk& chunk = out[tile];
    if (fold || chunk.scale == kLowestScale) chunk.scale = lowest;
    float x[kTileCols] = {};
    std::copy(q + tile * kTileCols, q + std::min(c, (tile + 1) * kTileCols), x);
    chunk.sum = 0;
    for (int64_t i = 0; i < kTileCols; ++i) {
      chunk.codes[i] = static_cast<int8_t>(2 * x[i / 8 * 8 + kOrder[i % 8]] / chunk.scale);
      chunk.sum += chunk.codes[i];
    }
  }
}

void index_scores_f32(const KernelTable& table, const float* q, int heads, const void* const* keys, int64_t n,
                      int64_t c, const float* gates, float* dots, float* scores) {
  table.attention_scores_f32(q, c, heads, keys, n, c, 1.0f, dots, n);
  ref::index_scores(dots, n, gates, heads, n, false, scores);
}

SplitTopK::SplitTopK(const float* scores, int64_t n, int64_t k, int parts, int32_t* scratch, int32_t* order,
                     int32_t* out)
    : scores_(scores), n_(n), k_(k), parts_(parts), scratch_(scratch), order_(order), out_(out) {}

int64_t SplitTopK::first(int part) const {
  const int64_t groups = (n_ + kKeyGroup - 1) / kKeyGroup;
  return std::min(n_, groups * part / parts_ * kKeyGroup);
}

uint32_t SplitTopK::bin_of(int64_t i) const { return ordered_bits(scores_[i]) >> (32 - kBits); }

void SplitTopK::count(int part) {
  int32_t* const histogram = of(part);
  std::fill_n(histogram, kBins, 0);
  for (int64_t i = first(part); i < first(part + 1); ++i) ++histogram[bin_of(i)];
}

// The bin of the k-th score: those above are chosen, of those in it some.
void SplitTopK::find() {
  const auto in_bin = [&](uint32_t bin) {
    int64_t sum = 0;
    for (int part = 0; part < parts_; ++part) sum += of(part)[bin];
    return sum;
  };
  bin_ = kBins - 1;
  int64_t above = 0;
  for (int64_t here = in_bin(bin_); above + here < k_; here = in_bin(--bin_)) above += here;
  wanted_ = k_ - above;
  candidates_ = 0;
  for (int part = 0; part < parts_; ++part) {
    int32_t* const counts = of(part);
    counts[kCandidates] = static_cast<int32_t>(candidates_);
    candidates_ += counts[bin_];
    counts[kAbove] = 0;
    for (uint32_t bin = bin_ + 1; bin < kBins; ++bin) counts[kAbove] += counts[bin];
  }
}

void SplitTopK::gather(int part) {
  int32_t* next = order_ + of(part)[kCandidates];
  for (int64_t i = first(part); i < first(part + 1); ++i)
    if (bin_of(i) == bin_) *next++ = static_cast<int32_t>(i);
}

void SplitTopK::choose() {
  const auto before = [&](int32_t a, int32_t b) {
    const uint32_t x = ordered_bits(scores_[a]), y = ordered_bits(scores_[b]);
    return x != y ? x > y : a < b;
  };
  if (wanted_ < candidates_) std::nth_element(order_, order_ + wanted_, order_ + candidates_, before);
  std::sort(order_, order_ + wanted_);
  int64_t written = 0;
  for (int part = 0; part < parts_; ++part) {
    int32_t* const counts = of(part);
    const auto chosen = [&](int p) { return std::lower_bound(order_, order_ + wanted_, first(p)) - order_; };
    counts[kChosen] = static_cast<int32_t>(chosen(part));
    counts[kWritten] = static_cast<int32_t>(written);
    written += counts[kAbove] + chosen(part + 1) - chosen(part);
  }
}

void SplitTopK::write(int part) {
  int32_t* out = out_ + of(part)[kWritten];
  const int32_t* next = order_ + of(part)[kChosen];
  for (int64_t i = first(part); i < first(part + 1); ++i) {
    const bool chosen = next != order_ + wanted_ && *next == i;
    if (chosen) ++next;
    if (chosen || bin_of(i) > bin_) *out++ = static_cast<int32_t>(i);
  }
}

void select_topk(const float* scores, int64_t n, int64_t k, int32_t* order, int32_t* out) {
  if (k >= n) return std::iota(out, out + n, 0);
  int32_t scratch[SplitTopK::kPartScratch];
  SplitTopK top(scores, n, k, 1, scratch, order, out);
  top.count(0);
  top.find();
  top.gather(0);
  top.choose();
  top.write(0);
}

}  // namespace thermocline::cpu
