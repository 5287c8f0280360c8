#include "runtime/server/systemd.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "runtime/base/log.h"

namespace thermocline::server {
namespace {

constexpr std::chrono::minutes kLoadGoesOn{5};
constexpr std::chrono::minutes kEndTakes{1};  // after the drain: KV that is still written, memory that is given back

std::string environment(const char* name) {
  const char* const value = std::getenv(name);
  return value ? value : "";
}

int64_t number(const std::string& text) {
  int64_t value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

std::string extension(Systemd::Micros time) { return fmt::format("\nEXTEND_TIMEOUT_USEC={}", time.count()); }

}  // namespace

Systemd::Systemd() {
  if (const std::string address = environment("NOTIFY_SOCKET"); !address.empty()) connect(address);
  const std::string pid = environment("WATCHDOG_PID");
  const int64_t limit = number(environment("WATCHDOG_USEC"));
  if (socket_ >= 0 && limit > 1 && (pid.empty() || number(pid) == getpid())) alive_period_ = Micros(limit / 2);
}

Systemd::~Systemd() {
  if (socket_ >= 0) close(socket_);
}

void Systemd::connect(const std::string& address) {
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  if ((address[0] != '/' && address[0] != '@') || address.size() < 2 || address.size() >= sizeof(to.sun_path))
    return log_warn("NOTIFY_SOCKET '{}' is no path of a socket: systemd is told nothing", address);
  std::memcpy(to.sun_path, address.data(), address.size());
  if (address[0] == '@') to.sun_path[0] = 0;
  const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + address.size());
  socket_ = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  const timeval patience{.tv_sec = 1, .tv_usec = 0};  // a stuck system does not stop the network thread
  if (socket_ >= 0) setsockopt(socket_, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
  if (socket_ >= 0 && ::connect(socket_, reinterpret_cast<const sockaddr*>(&to), size) == 0) return;
  log_warn("NOTIFY_SOCKET '{}': {}: systemd is told nothing", address, std::strerror(errno));
  if (socket_ >= 0) close(socket_);
  socket_ = -1;
}

void Systemd::send(const std::string& message) {
  if (socket_ < 0 || ::send(socket_, message.data(), message.size(), MSG_NOSIGNAL) >= 0) return;
  const int error = errno;
  if (!failed_.exchange(true)) log_warn("systemd could not be told {}: {}", message, std::strerror(error));
}

void Systemd::loading(double share) {
  const auto now = std::chrono::steady_clock::now();
  if (now < next_loading_) return;
  next_loading_ = now + std::chrono::seconds(1);
  send(fmt::format("STATUS=loading the model: {:.0f} %", 100 * share) + extension(kLoadGoesOn));
}

void Systemd::reloading() {
  timespec now{};  // Type=notify-reload compares it with the time of its own request
  clock_gettime(CLOCK_MONOTONIC, &now);
  send(fmt::format("RELOADING=1\nMONOTONIC_USEC={}\nSTATUS=reading the configuration again",
                   int64_t{now.tv_sec} * 1'000'000 + now.tv_nsec / 1000));
}

void Systemd::stopping(std::chrono::milliseconds drain) {
  send("STOPPING=1\nSTATUS=draining: answers in progress end" + extension(drain + kEndTakes));
}

}  // namespace thermocline::server
