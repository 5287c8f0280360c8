// What systemd is told of a service: sd_notify's protocol, a datagram of VARIABLE=VALUE lines to $NOTIFY_SOCKET.
// Without that variable nothing is sent, so a server started by hand needs no other path.
#pragma once

#include <atomic>
#include <chrono>
#include <optional>
#include <string>

namespace thermocline::server {

/// Any thread, but for the constructor. What cannot be sent is logged once: a service does not fail of it.
class Systemd {
 public:
  using Micros = std::chrono::microseconds;

  /// Reads NOTIFY_SOCKET (a path, or an abstract name as @NAME), WATCHDOG_USEC and WATCHDOG_PID.
  Systemd();
  ~Systemd();
  Systemd(const Systemd&) = delete;
  Systemd& operator=(const Systemd&) = delete;

  /// Loading goes on: its share, and five more minutes for the start. Sent once a second at most, so a load that stands
  /// still runs out of time.
  void loading(double share);
  /// Serves: after loading, and after a reload.
  void ready(const std::string& status) { send("READY=1\nSTATUS=" + status); }
  /// The configuration is read again; ready() says that it was.
  void reloading();
  /// A drain began, which takes so long at most.
  void stopping(std::chrono::milliseconds drain);
  void alive() { send("WATCHDOG=1"); }

  /// How often alive() is to be called: half of what the unit's WatchdogSec allows. None: nobody waits for it.
  std::optional<Micros> alive_period() const { return alive_period_; }

 private:
  void connect(const std::string& address);
  void send(const std::string& message);

  int socket_ = -1;
  std::optional<Micros> alive_period_;
  std::chrono::steady_clock::time_point next_loading_{};  // of the loading thread
  std::atomic<bool> failed_{false};
};

}  // namespace thermocline::server
