// What KV rows depend on beside tokens, as one text: another text, and nothing that was saved before is found.
#pragma once

#include <string>

#include "runtime/engine/engine.h"

namespace thermocline {

/// Of the weights' bytes as they lie in memory, the config's and this program's own, the numerics, kernels and devices
/// that it runs on, and how rows are laid out. Reads every weight once. Errors: io when a file cannot be read.
Result<std::string> cache_identity(const EngineOptions& options, const deepseek_v4::Weights& weights,
                                   const cpu::CpuContext& cpu, const KvLayout& layout, const std::string& devices);

}  // namespace thermocline
