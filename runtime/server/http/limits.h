// What a client may cost: every number the HTTP transport is bounded by, in one place. Times are fields so that tests
// can shorten them.
#pragma once

#include <sys/socket.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/result.h"

namespace thermocline::server {

using Clock = std::chrono::steady_clock;

struct HttpTimes {
  std::chrono::milliseconds idle{60'000};         // between requests; a connection that says nothing is closed silently
  std::chrono::milliseconds header{10'000};       // from a request's first byte to the end of its header
  std::chrono::milliseconds body_grace{10'000};   // before the rate of a body counts
  std::chrono::milliseconds body{600'000};        // for a whole body, however fast
  std::chrono::milliseconds write_stall{60'000};  // a client that takes nothing for this long is gone
  std::chrono::milliseconds keep_alive{10'000};   // silence in an event stream before a sign of life
  std::chrono::milliseconds probe{1'000};         // after a peer's FIN; doubles with every probe
  std::chrono::milliseconds linger{10'000};       // reading on after a last reply, in all
  std::chrono::milliseconds linger_silence{2'000};
  std::chrono::milliseconds accept_pause{100};  // after the system refused a descriptor or a buffer
  std::chrono::milliseconds flush{5'000};       // for aborted answers to leave after the drain's deadline
};

struct HttpOptions {
  std::string host = "127.0.0.1";          // an IP address, [v6] too, localhost, or unix:/path
  uint16_t port = 8000;                    // 0: any free port
  std::vector<std::string> allowed_hosts;  // names besides the bound address; "*" allows all
  std::vector<std::string> cors_origins;   // whose pages may read answers besides the server's own; "*" allows all
  uint64_t max_body_bytes = 32 << 20;
  uint32_t max_header_bytes = 16 << 10, max_headers = 100, max_target_bytes = 8 << 10;
  uint32_t max_connections = 4096;
  uint64_t max_retained_bytes = 256 << 20;  // bodies that are still coming in, all connections together
  uint64_t max_linger_bytes = 64 << 20;     // read and thrown away after a last reply
  uint64_t min_body_rate = 1000;            // bytes a second, averaged, after body_grace
  std::chrono::milliseconds drain{30'000};  // running answers may go on for this long after the first signal
  bool signals = true;                      // SIGINT and SIGTERM drain, then stop; SIGHUP reloads
  HttpTimes times = {};
};

/// Counters of a listener, from any thread.
struct HttpStats {
  uint64_t connections = 0;     // open now
  uint64_t retained_bytes = 0;  // of bodies that are coming in now
  uint64_t accepted = 0;        // since the start
  uint64_t turned_away = 0;     // over max_connections with none idle
  uint64_t evicted = 0;         // idle ones closed to make room
  uint64_t accept_pauses = 0;   // waits because accept was refused by the system (EMFILE and its kind)
};

/// When a body that began at `start` and has `received` bytes is too slow: grace plus a second for every min_body_rate
/// bytes, at most times.body in all.
Clock::time_point body_deadline(const HttpOptions& options, Clock::time_point start, uint64_t received);

/// The address that `host` means, in canonical form ("localhost" is 127.0.0.1, "[::1]" is ::1; "unix:/path" stays).
/// Names are not resolved: what a resolver says may change, and the guard on Host is about this very address. Errors:
/// invalid_argument, field "--host".
Result<std::string> listen_address(const std::string& host);

/// Of a socket: an IP address, "unix" of a Unix socket, "" where there is none; `name`: getsockname or getpeername.
std::string socket_address(int fd, int (*name)(int, sockaddr*, socklen_t*));

/// A client's own id for a request if it is usable: 1 to 128 printable characters without spaces.
std::optional<std::string> usable_request_id(std::string_view value);
/// "req_" and 128 random bits in hex.
std::string mint_request_id();

}  // namespace thermocline::server
