#include "runtime/cli/http_probe.h"

#include <fmt/format.h>
#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

#include "runtime/io/json_document.h"

namespace thermocline::cli {
namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kMostAnswer = 64 << 10;

class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  int fd() const { return fd_; }

 private:
  int fd_;
};

bool wait_for(int fd, short events, Clock::time_point deadline) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
  pollfd waited{fd, events, 0};
  return left > 0 && poll(&waited, 1, static_cast<int>(left)) == 1;
}

// 0 or an errno.
int connect_to(int fd, const addrinfo& address, Clock::time_point deadline) {
  if (connect(fd, address.ai_addr, address.ai_addrlen) == 0) return 0;
  if (errno != EINPROGRESS) return errno;
  if (!wait_for(fd, POLLOUT, deadline)) return ETIMEDOUT;
  int error = 0;
  socklen_t size = sizeof error;
  getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
  return error;
}

// The whole answer; empty where it does not end in time.
std::string exchange(int fd, const std::string& request, Clock::time_point deadline) {
  if (send(fd, request.data(), request.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(request.size())) return "";
  std::string answer;
  char buffer[4096];
  while (answer.size() < kMostAnswer) {
    if (!wait_for(fd, POLLIN, deadline)) return "";
    const ssize_t got = recv(fd, buffer, sizeof buffer, 0);
    if (got < 0) return "";
    if (got == 0) break;
    answer.append(buffer, static_cast<size_t>(got));
  }
  return answer;
}

Error nobody(const ServerUrl& url, const std::string& why) {
  return {ErrorCode::unavailable,
          fmt::format("no server answers at {} ({}): start one with `thermocline serve`, or give its --url", url.base,
                      why)};
}

Status judge(const ServerUrl& url, const std::string& answer) {
  if (answer.empty()) return nobody(url, "it took the connection and says nothing");
  const size_t body = answer.find("\r\n\r\n");
  const std::string status = answer.substr(0, answer.find("\r\n"));
  if (!status.starts_with("HTTP/1.1 ") || body == std::string::npos)
    return nobody(url, "what is there speaks no HTTP/1.1");
  if (status.starts_with("HTTP/1.1 200")) return {};
  const Result<Json> json = parse_json(answer.substr(body + 4));
  const bool told = json && json->is_object() && json->contains("error") && (*json)["error"].is_object() &&
                    (*json)["error"].value("message", Json()).is_string();
  return Error{ErrorCode::unavailable, fmt::format("the server at {} is not ready: {}", url.base,
                                                   told ? (*json)["error"]["message"].get<std::string>() : status)};
}

}  // namespace

Result<ServerUrl> parse_server_url(const std::string& text) {
  ServerUrl url;
  std::string rest = text;
  url.tls = rest.starts_with("https://");
  if (const size_t scheme = rest.find("://"); scheme != std::string::npos) {
    if (!url.tls && !rest.starts_with("http://"))
      return invalid("--url should begin with http:// or https://, not " + text);
    rest.erase(0, scheme + 3);
  }
  while (rest.ends_with('/')) rest.pop_back();
  if (rest.ends_with("/v1")) rest.erase(rest.size() - 3);
  const size_t bracket = rest.find(']'), colon = rest.find(':', bracket == std::string::npos ? 0 : bracket);
  url.host = rest.substr(0, colon);
  url.port = colon == std::string::npos ? (url.tls ? "443" : "80") : rest.substr(colon + 1);
  const bool plain = std::all_of(rest.begin(), rest.end(), [](unsigned char c) {
    return std::isalnum(c) || c == '.' || c == '-' || c == '_' || c == ':' || c == '[' || c == ']';
  });
  const bool number = !url.port.empty() && url.port.size() <= 5 &&
                      std::all_of(url.port.begin(), url.port.end(), [](unsigned char c) { return std::isdigit(c); });
  if (url.host.empty() || !plain || !number)
    return invalid("--url should look like http://127.0.0.1:8000, not " + text);
  url.base = (url.tls ? "https://" : "http://") + rest;
  if (url.host.starts_with('[') && url.host.ends_with(']')) url.host = url.host.substr(1, url.host.size() - 2);
  return url;
}

Status probe_health(const ServerUrl& url, std::chrono::milliseconds timeout) {
  const Clock::time_point deadline = Clock::now() + timeout;
  addrinfo wanted{};
  wanted.ai_socktype = SOCK_STREAM;
  addrinfo* list = nullptr;
  if (const int error = getaddrinfo(url.host.c_str(), url.port.c_str(), &wanted, &list); error != 0)
    return nobody(url, gai_strerror(error));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> addresses(list, &freeaddrinfo);
  int error = ENOENT;
  for (const addrinfo* address = list; address; address = address->ai_next) {
    const Socket socket(::socket(address->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    error = socket.fd() < 0 ? errno : connect_to(socket.fd(), *address, deadline);
    if (error != 0) continue;
    const std::string authority = url.base.substr(url.base.find("://") + 3);
    return judge(url,
                 exchange(socket.fd(), "GET /health HTTP/1.1\r\nHost: " + authority + "\r\nConnection: close\r\n\r\n",
                          deadline));
  }
  return nobody(url, std::strerror(error));
}

}  // namespace thermocline::cli
