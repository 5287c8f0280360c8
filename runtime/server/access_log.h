// The access log: one line of JSON a request, no prompt and no answer in it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "runtime/server/http/handler.h"

namespace spdlog {
class logger;
}

namespace thermocline::server {

struct AccessEntry {
  AccessEntry() = default;
  /// Who asked for what; whoever knows fills in the key.
  explicit AccessEntry(const HttpHead& head);
  /// Status, and of an error its code.
  void answered(const Reply& reply);

  std::string id, key, method, path, peer;
  int status = 0;
  bool complete = true;  // the client got all of it
  int64_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
  int64_t max_tokens = -1;  // as it was asked for; -1: it was not
  int choices = 0;          // answers it asked for, of all its prompts; 0: it was not read
  double queue_seconds = 0, prefill_seconds = 0, decode_seconds = 0, total_seconds = 0;
  double first_token_seconds = 0;  // from its arrival on; 0: there was none
  std::string finish;  // stop, length, tool_calls, cancelled; of several choices the first that ended otherwise
  std::string error;   // code
};

class AccessLog {
 public:
  /// `path`: a file to append to, "-" for standard error, "" for none. Errors: io, naming the file.
  static Result<std::unique_ptr<AccessLog>> open(const std::string& path);
  /// Any thread.
  void write(const AccessEntry& entry);

 private:
  std::shared_ptr<spdlog::logger> logger_;
};

}  // namespace thermocline::server
