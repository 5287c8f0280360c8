#include "runtime/engine/sampling/sampler.h"

#include <algorithm>
#include <cmath>

namespace thermocline {
namespace {

using namespace sampling;

uint64_t system_seed() {
  std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

// Top-p, then the draw. find(mass) answers with the first token up to which the mass exceeds it.
template <class Find>
int32_t draw_by_mass(double total, double top_p, double uniform, const Find& find) {
  // To reach a mass is to exceed the number just below it.
  if (top_p < 1) total = find(std::nextafter(top_p * total, 0.0)).mass;
  return find(std::min(uniform * total, std::nextafter(total, 0.0))).id;
}

}  // namespace

Sampler::Sampler(const SamplingParams& params, std::span<const int32_t> prompt)
    : params_(params), random_(params.has_seed ? params.seed : system_seed()), penalties_(params, prompt) {}

bool Sampler::edits(const SampleOptions& options) const {
  return !options.banned.empty() || !params_.logit_bias.empty() || penalties_.any();
}

Sampler::Row Sampler::edit(std::span<const float> logits, std::span<const int32_t> banned,
                           SamplingScratch& scratch) const {
  const std::span<float> row(scratch.edited.data(), logits.size());
  std::copy(logits.begin(), logits.end(), row.begin());
  add_bias(params_.logit_bias, row);
  penalties_.apply(row);
  ban(banned, row);
  const RowScan scan = scan_row(row, scratch.edited_max);
  if (scan.best == -INFINITY) return edit(logits, {}, scratch);  // everything was banned
  return {row, scratch.edited_max, scan};
}

Result<SampledToken> Sampler::sample(std::span<const float> logits, const SampleOptions& options,
                                     SamplingScratch& scratch) {
  TC_ASSIGN(const RowScan scan, scan_logits(logits, options.banned, scratch));
  const Row row = edits(options) ? edit(logits, options.banned, scratch) : Row{logits, scratch.block_max, scan};
  const int32_t id = params_.temperature == 0 ? row.scan.best_id : draw(row, scratch);
  penalties_.count(id);
  if (options.top_logprobs < 0) return SampledToken{id, 0, {}};
  return sampling::logprobs_of(logits, scan, id, options.top_logprobs, scratch);
}

int32_t Sampler::draw(const Row& row, SamplingScratch& scratch) {
  const int64_t vocab = static_cast<int64_t>(row.logits.size());
  const Weighting weighting = Weighting::of(vocab, row.scan.best, params_.temperature, params_.min_p);
  const double uniform = static_cast<double>(random_() >> 11) * 0x1p-53;
  if (params_.top_k <= 0 || params_.top_k >= vocab) {
    MassHistogram& histogram = scratch.histogram;
    histogram.fill(row.logits, weighting);
    return draw_by_mass(histogram.total(), params_.top_p, uniform, [&](double mass) {
      return histogram.find(row.logits, row.block_max, weighting, mass, scratch.candidates);
    });
  }
  const std::span<Candidate> kept =
      select_first(row.logits, row.block_max, params_.top_k, scratch.spare_max, scratch.candidates);
  double total = 0;
  for (Candidate& c : kept) total += c.weight = weighting(c.logit);
  return draw_by_mass(total, params_.top_p, uniform, [&](double mass) { return find_mass(kept, 0, mass); });
}

}  // namespace thermocline
