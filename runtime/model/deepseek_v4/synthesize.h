// Random checkpoints in the published format, with a published model's layer shapes: for benchmarks and tests.
#pragma once

#include <filesystem>
#include <string>

#include "runtime/base/result.h"
#include "runtime/model/model_geometry.h"

namespace thermocline::deepseek_v4 {

/// The geometry of "v4-flash", "v4-pro" or "demo", cut to its first `layers` layers (0: all), without MTP block.
/// Errors: invalid_argument for another name or more layers than the model has.
Result<ModelGeometry> published_geometry(const std::string& name, int layers);

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
