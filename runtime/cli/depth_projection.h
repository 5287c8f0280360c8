// What a token of a whole model would take, from the layers and the head of a slice of it: a sum, not a measurement.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "runtime/base/result.h"
#include "runtime/model/model_geometry.h"

namespace thermocline::cli {

/// The model that a slice is the first layers of.
struct WholeModel {
  int layers = 0;
  std::vector<LayerKind> kinds = {};  // of each layer; empty: not known
  int routed_experts = 0;             // of a layer; 0: not known
};

/// Of `slice`, `full_layers` deep; 0: as deep as the published model that begins with its layers. None: it is whole, or
/// no such model is known. Errors: invalid_argument for fewer layers than it has, and for more than a config may say.
Result<std::optional<WholeModel>> whole_model(const ModelGeometry& slice, int full_layers);

struct DepthProjection {
  struct Term {
    std::string kind;  // "SWA", "CSA", "HCA", or "layers" of kinds that are not known
    int layers = 0;
    double seconds = 0;    // of one of them
    bool measured = true;  // the slice has some of the kind; else the mean of all its layers stands for it
  };
  int layers = 0;
  std::vector<Term> terms;
  std::optional<double> head_seconds;  // none: left out

  /// Of the whole.
  double seconds() const;
  /// "2 SWA x 3.100 ms + 41 CSA x 3.300 ms + head 36.000 ms = 177.500 ms".
  std::string formula() const;
  /// What stands for layers that the slice has none of; empty where every term was measured.
  std::string caveat() const;
};

/// A layer of each kind takes the mean of those that the slice has.
///   layer_seconds  one a layer of the slice, and at least one
DepthProjection project_depth(const ModelGeometry& slice, std::span<const double> layer_seconds,
                              std::optional<double> head_seconds, const WholeModel& whole);

}  // namespace thermocline::cli
