// The one table from error codes to HTTP, in the shape that OpenAI's clients read.
#include <algorithm>

#include "runtime/io/json_document.h"
#include "runtime/server/http/handler.h"

namespace thermocline::server {
namespace {

struct Row {
  ErrorCode error;
  int status;
  const char* type;
  const char* code;
  const char* retry_after = nullptr;  // seconds
  bool no_retry = false;  // x-should-retry: false, which OpenAI's clients obey: the same request fails again
};

constexpr Row kRows[] = {
    {ErrorCode::invalid_argument, 400, "invalid_request_error", "invalid_value"},
    {ErrorCode::context_length, 400, "invalid_request_error", "context_length_exceeded"},
    {ErrorCode::unsupported, 400, "invalid_request_error", "unsupported_value"},
    {ErrorCode::not_found, 501, "not_supported", "not_supported"},
    {ErrorCode::corrupt, 500, "server_error", "corrupt", nullptr, true},  // of a checkpoint, never of a request
    {ErrorCode::out_of_memory, 503, "unavailable_error", "out_of_memory", "5"},
    {ErrorCode::overloaded, 429, "rate_limit_error", "queue_full", "1"},
    {ErrorCode::unavailable, 503, "unavailable_error", "unavailable", "5"},
    {ErrorCode::deadline, 504, "timeout_error", "deadline_exceeded", nullptr, true},
    {ErrorCode::cancelled, 503, "unavailable_error", "cancelled"},  // rarely read: the client has gone
    {ErrorCode::io, 500, "server_error", "io", nullptr, true},
    {ErrorCode::internal, 500, "server_error", "internal", nullptr, true},
};

// What a request names and is not there; without a field it is something of the checkpoint.
constexpr Row kNotFound = {ErrorCode::not_found, 404, "not_found_error", "model_not_found"};
// A key that has as much as it may, on a server that may have room.
constexpr Row kKeyIsBusy = {ErrorCode::overloaded, 429, "rate_limit_error", "rate_limit_exceeded", "1"};

const Row& row_of(const Error& error) {
  if (error.code == ErrorCode::not_found && error.field == "model") return kNotFound;
  if (error.code == ErrorCode::overloaded && error.field == "api_key") return kKeyIsBusy;
  const auto* row =
      std::find_if(std::begin(kRows), std::end(kRows), [&](const Row& r) { return r.error == error.code; });
  return row == std::end(kRows) ? kRows[std::size(kRows) - 1] : *row;
}

Json error_json(const std::string& type, const std::string& code, const std::string& message,
                const std::string& param) {
  Json error = {{"message", message}, {"type", type}, {"param", nullptr}, {"code", code}};
  if (!param.empty()) error["param"] = param;
  return error;
}

// Messages quote what clients sent: bytes that are no UTF-8 are replaced.
std::string body_of(Json error) {
  const Json body = {{"error", std::move(error)}};
  return dump_json(body);
}

}  // namespace

Reply error_reply(const Error& error) {
  const Row& row = row_of(error);
  Json json = error_json(row.type, row.code, error.message, error.field);
  for (const auto& [name, count] : error.counts) json[name] = count;
  Reply reply{row.status, body_of(std::move(json))};
  if (row.retry_after) reply.headers.emplace_back("Retry-After", row.retry_after);
  if (row.no_retry) reply.headers.emplace_back("x-should-retry", "false");
  return reply;
}

Reply error_reply(int status, const std::string& type, const std::string& code, const std::string& message,
                  const std::string& param) {
  return {status, body_of(error_json(type, code, message, param))};
}

}  // namespace thermocline::server
