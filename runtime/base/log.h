// Logging on stderr: stdout belongs to answers and documents. Its backend is spdlog, whose header is not everybody's.
#pragma once

#include <fmt/core.h>

#include <string>
#include <vector>

namespace thermocline {

enum class LogFormat { text, json };  // a line for people, or a JSON object a line
inline const std::vector<std::string> kLogLevels = {"error", "warn", "info", "debug"};
/// Sets the level and the shape of lines (log_lines.h). Called once by main.
void init_log(const std::string& level, LogFormat format = LogFormat::text);
/// Any thread.
void set_log_level(const std::string& level);

enum class LogLevel { debug, info, warn, error };
/// One line at that level; behind the four below, which check formats when they are compiled.
void log_formatted(LogLevel level, fmt::string_view format, fmt::format_args args);

template <class... Args>
void log_debug(fmt::format_string<Args...> format, Args&&... args) {
  log_formatted(LogLevel::debug, format, fmt::make_format_args(args...));
}
template <class... Args>
void log_info(fmt::format_string<Args...> format, Args&&... args) {
  log_formatted(LogLevel::info, format, fmt::make_format_args(args...));
}
template <class... Args>
void log_warn(fmt::format_string<Args...> format, Args&&... args) {
  log_formatted(LogLevel::warn, format, fmt::make_format_args(args...));
}
template <class... Args>
void log_error(fmt::format_string<Args...> format, Args&&... args) {
  log_formatted(LogLevel::error, format, fmt::make_format_args(args...));
}

}  // namespace thermocline
