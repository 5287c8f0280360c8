// The one request this program ever makes: whether a server of ours answers, for `launch`.
#pragma once

#include <chrono>
#include <string>

#include "runtime/base/result.h"

namespace thermocline::cli {

/// "http://box:8000/v1/" in parts. `base`: without a path, as Anthropic's clients want it; OpenAI's add /v1.
struct ServerUrl {
  std::string base, host, port;
  bool tls = false;
};
/// Errors: invalid_argument for what is no http or https URL of a server.
Result<ServerUrl> parse_server_url(const std::string& text);

/// GET /health, once; no name but the URL's is looked up.
/// Errors: unavailable, saying what happened: nobody answers, it is loading, it is something else.
Status probe_health(const ServerUrl& url, std::chrono::milliseconds timeout);

}  // namespace thermocline::cli
