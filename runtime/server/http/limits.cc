#include "runtime/server/http/limits.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <sys/random.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <boost/asio/ip/address.hpp>

namespace thermocline::server {

Clock::time_point body_deadline(const HttpOptions& options, Clock::time_point start, uint64_t received) {
  const std::chrono::milliseconds earned(received * 1000 / std::max<uint64_t>(options.min_body_rate, 1));
  return start + std::min(options.times.body_grace + earned, options.times.body);
}

Result<std::string> listen_address(const std::string& host) {
  if (host.starts_with("unix:")) {
    if (host.size() > 6 && host[5] == '/' && host.size() < 5 + sizeof(sockaddr_un::sun_path)) return host;
    Error refused = invalid(fmt::format("--host '{}': a Unix socket is unix:/absolute/path of at most {} bytes", host,
                                        sizeof(sockaddr_un::sun_path) - 1));
    refused.field = "--host";
    return refused;
  }
  std::string plain = host == "localhost" ? "127.0.0.1" : host;
  if (plain.size() > 2 && plain.front() == '[' && plain.back() == ']') plain = plain.substr(1, plain.size() - 2);
  boost::system::error_code error;
  const auto address = boost::asio::ip::make_address(plain, error);
  if (error) {
    Error refused =
        invalid("--host '" + host +
                "' is no IP address: give one of this machine's, 0.0.0.0 or :: for all of them, localhost, or "
                "unix:/path for a Unix socket");
    refused.field = "--host";
    return refused;
  }
  return address.to_string();
}

std::string socket_address(int fd, int (*name)(int, sockaddr*, socklen_t*)) {
  sockaddr_storage storage{};
  socklen_t size = sizeof(storage);
  if (name(fd, reinterpret_cast<sockaddr*>(&storage), &size) != 0) return "";
  char text[INET6_ADDRSTRLEN] = "";
  if (storage.ss_family == AF_INET) {
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in&>(storage).sin_addr, text, sizeof(text));
  } else if (storage.ss_family == AF_INET6) {
    const in6_addr& v6 = reinterpret_cast<const sockaddr_in6&>(storage).sin6_addr;
    if (IN6_IS_ADDR_V4MAPPED(&v6))
      inet_ntop(AF_INET, &v6.s6_addr[12], text, sizeof(text));
    else
      inet_ntop(AF_INET6, &v6, text, sizeof(text));
  } else {
    return "unix";
  }
  return text;
}

std::optional<std::string> usable_request_id(std::string_view value) {
  const auto printable = [](char c) { return c > ' ' && c <= '~'; };
  if (value.empty() || value.size() > 128 || !std::all_of(value.begin(), value.end(), printable)) return std::nullopt;
  return std::string(value);
}

std::string mint_request_id() {
  std::array<uint8_t, 16> bits;
  const ssize_t n = getrandom(bits.data(), bits.size(), 0);
  TC_CHECK(n == static_cast<ssize_t>(bits.size()), "getrandom gave no 16 bytes");  // never short below 256 bytes
  return fmt::format("req_{:02x}", fmt::join(bits, ""));
}

}  // namespace thermocline::server
