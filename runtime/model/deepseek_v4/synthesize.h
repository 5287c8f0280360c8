// Random checkpoints in the published format, with a published model's layer shapes: for benchmarks and tests.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "runtime/base/result.h"
#include "runtime/model/model_geometry.h"

namespace thermocline::deepseek_v4 {

/// The geometry of "v4-flash", "v4-pro", "demo" or a folder's config.json, cut to its first `layers` layers and
/// `experts` routed experts a layer (0: all), without MTP block. A token reads the same bytes of fewer experts. Errors:
/// read_config's, invalid_argument for another name, more than the model has, or fewer experts than a token has.
Result<ModelGeometry> published_geometry(const std::string& name, int layers, int experts = 0);

/// The published model whose first layers are those of `slice`, which may have fewer routed experts. None: there are no
/// more layers, or no published model begins so.
std::optional<ModelGeometry> published_whole(const ModelGeometry& slice);

struct SynthesizeOptions {
  uint64_t seed = 0;
  uint64_t shard_bytes = uint64_t{4} << 30;
  bool quiet = false;
};

/// Writes config.json, generation_config.json, the index and the shards into `folder`, which is created. Every weight
/// has a root mean square near 1 / sqrt(K), so activations stay of order one; the same seed gives the same bytes.
/// Errors: io; invalid_argument when the folder already holds a checkpoint.
Status synthesize(const ModelGeometry& geometry, const std::filesystem::path& folder, const SynthesizeOptions& options);

}  // namespace thermocline::deepseek_v4
