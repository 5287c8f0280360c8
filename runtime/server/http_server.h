// HTTP/1.1 on Boost.Beast: one network thread, a coroutine per connection, limits on headers and bodies, event streams.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "runtime/server/exchange.h"

namespace thermocline::server {

struct HttpOptions {
  std::string host = "127.0.0.1";
  uint16_t port = 8000;  // 0: any free port
  uint64_t max_body_bytes = 32 << 20;
};

/// Serves until SIGINT or SIGTERM. `ready` gets the port that is listened on; `stop` ends all generations, after which
/// no exchange calls back any more.
/// A closed client cancels its exchange; 10 s of silence in a stream are filled with a comment.
/// Errors: invalid_argument for a host that is no address, io when the port cannot be bound.
Status serve_http(const HttpOptions& options, const Handler& handler, const std::function<void(uint16_t port)>& ready,
                  const std::function<void()>& stop);

}  // namespace thermocline::server
