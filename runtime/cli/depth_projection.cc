#include "runtime/cli/depth_projection.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "runtime/model/deepseek_v4/synthesize.h"

namespace thermocline::cli {
namespace {

constexpr std::pair<LayerKind, const char*> kLayerKinds[] = {
    {LayerKind::swa, "SWA"}, {LayerKind::csa, "CSA"}, {LayerKind::hca, "HCA"}};

std::vector<LayerKind> first_kinds(const ModelGeometry& g, int layers) {
  std::vector<LayerKind> kinds;
  for (int layer = 0; layer < layers; ++layer) kinds.push_back(g.kind(layer));
  return kinds;
}

double mean(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

}  // namespace

Result<std::optional<WholeModel>> whole_model(const ModelGeometry& slice, int full_layers) {
  constexpr int kMostLayers = 4096;  // as config.json may say
  if (full_layers != 0 && (full_layers < slice.n_layers || full_layers > kMostLayers))
    return invalid(fmt::format("--full-layers {} is outside {}..{}, from the layers that there are", full_layers,
                               slice.n_layers, kMostLayers));
  const std::optional<ModelGeometry> published = deepseek_v4::published_whole(slice);
  if (full_layers == 0 && published) full_layers = published->n_layers;
  if (full_layers == 0 || full_layers == slice.n_layers) return std::optional<WholeModel>();
  WholeModel whole{.layers = full_layers};
  if (published && full_layers <= published->n_layers) {
    whole.kinds = first_kinds(*published, full_layers);
    whole.routed_experts = published->n_routed_experts;
  }
  return std::optional(whole);
}

double DepthProjection::seconds() const {
  double sum = head_seconds.value_or(0);
  for (const Term& term : terms) sum += term.layers * term.seconds;
  return sum;
}

std::string DepthProjection::formula() const {
  std::string text;
  for (const Term& term : terms)
    text += fmt::format("{}{} {} x {:.3f} ms", text.empty() ? "" : " + ", term.layers, term.kind, 1e3 * term.seconds);
  if (head_seconds) text += fmt::format(" + head {:.3f} ms", 1e3 * *head_seconds);
  return text + fmt::format(" = {:.3f} ms", 1e3 * seconds());
}

std::string DepthProjection::caveat() const {
  std::string kinds;
  for (const Term& term : terms)
    if (!term.measured) kinds += (kinds.empty() ? "" : ", ") + term.kind;
  return kinds.empty() ? "" : kinds + ": none here, the mean of all layers";
}

DepthProjection project_depth(const ModelGeometry& slice, std::span<const double> layer_seconds,
                              std::optional<double> head_seconds, const WholeModel& whole) {
  TC_CHECK_EQ(static_cast<int>(layer_seconds.size()), slice.n_layers);
  DepthProjection projection{.layers = whole.layers, .terms = {}, .head_seconds = head_seconds};
  if (whole.kinds.empty()) projection.terms.push_back({"layers", whole.layers, mean(layer_seconds)});
  for (const auto& [kind, name] : kLayerKinds) {
    const auto layers = static_cast<int>(std::count(whole.kinds.begin(), whole.kinds.end(), kind));
    if (layers == 0) continue;
    std::vector<double> measured;
    for (int layer = 0; layer < slice.n_layers; ++layer)
      if (slice.kind(layer) == kind) measured.push_back(layer_seconds[static_cast<size_t>(layer)]);
    projection.terms.push_back(
        {name, layers, measured.empty() ? mean(layer_seconds) : mean(measured), !measured.empty()});
  }
  return projection;
}

}  // namespace thermocline::cli
