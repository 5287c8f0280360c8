#include "runtime/base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <chrono>

#include "runtime/base/log_lines.h"

namespace thermocline {
namespace {

/// "info what happened", the level in colour where stderr is a terminal.
class TextFormatter : public spdlog::formatter {
 public:
  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) override {
    const std::string_view level = as_view(spdlog::level::to_string_view(message.level));
    message.color_range_start = out.size();
    out.append(level);
    message.color_range_end = out.size();
    out.append(" " + log_text(as_view(message.payload)) + "\n");
  }
  std::unique_ptr<spdlog::formatter> clone() const override { return std::make_unique<TextFormatter>(); }

 protected:
  static std::string_view as_view(spdlog::string_view_t text) { return {text.data(), text.size()}; }
};

class JsonFormatter : public TextFormatter {
 public:
  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) override {
    const std::chrono::duration<double> time = message.time.time_since_epoch();
    out.append(log_json(time.count(), as_view(spdlog::level::to_string_view(message.level)), as_view(message.payload)) +
               "\n");
  }
  std::unique_ptr<spdlog::formatter> clone() const override { return std::make_unique<JsonFormatter>(); }
};

}  // namespace

void init_log(const std::string& level, LogFormat format) {
  auto logger = spdlog::stderr_color_mt("thermocline");
  if (format == LogFormat::json)
    logger->set_formatter(std::make_unique<JsonFormatter>());
  else
    logger->set_formatter(std::make_unique<TextFormatter>());
  logger->set_level(spdlog::level::from_str(level));
  spdlog::set_default_logger(std::move(logger));
}

void set_log_level(const std::string& level) { spdlog::default_logger()->set_level(spdlog::level::from_str(level)); }

void log_formatted(LogLevel level, fmt::string_view format, fmt::format_args args) {
  constexpr spdlog::level::level_enum kLevels[] = {spdlog::level::debug, spdlog::level::info, spdlog::level::warn,
                                                   spdlog::level::err};
  const spdlog::level::level_enum its = kLevels[static_cast<int>(level)];
  if (spdlog::should_log(its)) spdlog::log(its, fmt::vformat(format, args));
}

}  // namespace thermocline
