// Who may talk to this server through a browser: a page of another site can reach a loopback port, and a name that
// resolves to 127.0.0.1 makes it same-origin (DNS rebinding). Host says which name was used, Origin which page asks.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace thermocline::server {

/// "name:port", "[v6]:port": the parts in lower case, an address in canonical form, the brackets gone.
struct Authority {
  std::string host, port;  // port may be empty
};
/// None if it is malformed.
std::optional<Authority> parse_authority(std::string_view text);
/// Whether `text` names an origin, as a browser sends it: "scheme://name:port". "null" names none: any site has it in a
/// sandboxed frame, so that no list should hold it.
bool is_origin(std::string_view text);
/// Whether `address`, in canonical form, is this machine's alone: loopback, or a Unix socket.
bool is_local_address(const std::string& address);

class HostGuard {
 public:
  /// `address`: what is listened on, in canonical form. On a loopback address Host is always checked; on another one
  /// only with `allowed` names, because such a server is reached under names that it cannot know; on a Unix socket
  /// never, as no browser reaches it.
  /// Pages of `origins`, besides the server's own, may read answers: "http://name:port" as a browser sends it, "*" all.
  HostGuard(const std::string& address, const std::vector<std::string>& allowed,
            const std::vector<std::string>& origins = {});

  /// Whether a request for `host` that came in on `local_address` is for this server.
  bool allows_host(const Authority& host, std::string_view local_address) const;
  /// Whether a page of `origin` may read the answers: one of the host it asks, or of the list.
  bool allows_origin(std::string_view origin, const std::optional<Authority>& host) const;

 private:
  bool listed(const Authority& host) const;

  std::string address_;
  std::vector<std::string> allowed_;  // lower case; "name" or "name:port"
  std::vector<std::string> origins_;  // lower case
  bool any_ = false, enforced_ = true;
};

}  // namespace thermocline::server
