#include "runtime/server/access_log.h"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <cmath>

#include "runtime/io/json_document.h"

namespace thermocline::server {
namespace {

double milliseconds(double seconds) { return std::round(seconds * 1e4) / 10; }

}  // namespace

AccessEntry::AccessEntry(const HttpHead& head)
    : id(head.request_id), method(head.method), path(head.target.substr(0, 200)), peer(head.peer) {}

void AccessEntry::answered(const Reply& reply) {
  status = reply.status;
  if (status < 400) return;
  const Result<Json> body = parse_json(reply.body);
  if (body) error = body->value(Json::json_pointer("/error/code"), "");
}

Result<std::unique_ptr<AccessLog>> AccessLog::open(const std::string& path) {
  auto log = std::make_unique<AccessLog>();
  if (path.empty()) return log;
  try {
    spdlog::sink_ptr sink;
    if (path == "-")
      sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
    else
      sink = std::make_shared<spdlog::sinks::basic_file_sink_mt>(path);
    log->logger_ = std::make_shared<spdlog::logger>("access", std::move(sink));
  } catch (const spdlog::spdlog_ex& error) {
    return Error{ErrorCode::io, "the access log " + path + " cannot be opened: " + error.what(), "--access-log"};
  }
  log->logger_->set_pattern("%v");
  log->logger_->flush_on(spdlog::level::info);
  return log;
}

// dump_json escapes control bytes, so a client's id or path cannot begin a line of its own.
void AccessLog::write(const AccessEntry& e) {
  if (!logger_) return;
  Json line = {{"time", std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count()},
               {"id", e.id},
               {"key", e.key},
               {"peer", e.peer},
               {"method", e.method},
               {"path", e.path},
               {"status", e.status},
               {"complete", e.complete},
               {"prompt_tokens", e.prompt_tokens},
               {"cached_tokens", e.cached_tokens},
               {"completion_tokens", e.completion_tokens},
               {"queue_ms", milliseconds(e.queue_seconds)},
               {"prefill_ms", milliseconds(e.prefill_seconds)},
               {"decode_ms", milliseconds(e.decode_seconds)},
               {"ttft_ms", milliseconds(e.first_token_seconds)},
               {"total_ms", milliseconds(e.total_seconds)},
               {"finish", e.finish},
               {"error", e.error}};
  logger_->info("{}", dump_json(line));
}

}  // namespace thermocline::server
