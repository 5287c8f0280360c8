#include "runtime/base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

namespace thermocline {

void init_log(const std::string& level) {
  auto logger = spdlog::stderr_color_mt("thermocline");
  logger->set_pattern("%^%l%$ %v");
  logger->set_level(spdlog::level::from_str(level));
  spdlog::set_default_logger(std::move(logger));
}

void log_formatted(LogLevel level, fmt::string_view format, fmt::format_args args) {
  constexpr spdlog::level::level_enum kLevels[] = {spdlog::level::debug, spdlog::level::info, spdlog::level::warn,
                                                   spdlog::level::err};
  const spdlog::level::level_enum its = kLevels[static_cast<int>(level)];
  if (spdlog::should_log(its)) spdlog::log(its, fmt::vformat(format, args));
}

}  // namespace thermocline
