// Loading a checkpoint against plainly reading the same files.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "runtime/base/result.h"

namespace thermocline::cli {

/// Bytes per second, one pair a repetition.
struct LoadComparison {
  std::vector<double> read, load;
  std::string skipped;  // why nothing was measured
};

/// Reads every shard with `threads` threads into fresh memory, and loads the checkpoint; alternately, three times.
///   warm  the files lie in the page cache; else they are dropped from it before either
/// Errors: those of read_config and load_weights; io.
Result<LoadComparison> compare_loading(const std::filesystem::path& folder, bool warm, int threads);

}  // namespace thermocline::cli
