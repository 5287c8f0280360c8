// Logging through spdlog, on stderr: stdout belongs to answers and documents.
#pragma once

#include <spdlog/spdlog.h>

namespace thermocline {

/// Sets the level ("error", "warn", "info", "debug") and the pattern. Called once by main.
void init_log(const std::string& level);

}  // namespace thermocline
