// Who listens on a port of this machine, by /proc.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace thermocline::server {

/// "python3 (pid 4711)"; empty where /proc does not tell: no permission to look into the process, another container's.
std::string port_holder(uint16_t port, const std::filesystem::path& proc = "/proc");

}  // namespace thermocline::server
