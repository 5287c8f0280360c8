// ExpertProfile: how often each expert was chosen, kept from run to run so that a restart begins with the slots full of
// what is used. A JSON file: {"model_hash", "layers", "experts", "uses": [layers x experts]}.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string_view>
#include <vector>

#include "runtime/base/result.h"

namespace thermocline {

struct ExpertProfile {
  uint64_t model_hash = 0;  // of its config.json
  int layers = 0, experts = 0;
  std::vector<double> uses;  // [layers, experts]
};

std::string expert_profile_text(const ExpertProfile& profile);
/// Errors: corrupt, naming what is wrong.
Result<ExpertProfile> parse_expert_profile(std::string_view text);

/// A profile with model_hash 0 (made from a trace that knew none) fits every model of its sizes. Errors: those of
/// parse_expert_profile; not_found where there is no such file; invalid_argument for another model's.
Result<ExpertProfile> read_expert_profile(const std::filesystem::path& file, const ExpertProfile& model);
/// What was used in this run counts in full, what the file had by half. Errors: io.
Status save_expert_profile(const std::filesystem::path& file, const ExpertProfile& run);

}  // namespace thermocline
