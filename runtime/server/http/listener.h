// HTTP/1.1 on one network thread: the address, the connections, and the ways a server ends.
#pragma once

#include <functional>
#include <memory>

#include "runtime/server/http/handler.h"
#include "runtime/server/http/limits.h"

namespace thermocline::server {

/// Made and bound before a model is loaded, so that a wrong address costs nothing and a signal during loading is heard;
/// run() may serve from then on, with a handler that says "loading" (503) until it is not. One thread calls run();
/// stats(), drain() and stop() are for any thread.
class Listener {
 public:
  /// Listens, and from here on holds the signals (options.signals; SIGPIPE is ignored). Raises the soft limit of open
  /// files to what max_connections needs, as far as the hard one allows.
  /// Errors: invalid_argument for a host that is no address or an --allowed-host that is no name, io when the address
  /// cannot be bound; both name it.
  static Result<std::unique_ptr<Listener>> bind(const HttpOptions& options);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  /// The port that is listened on, and its URL ("http://127.0.0.1:8000", "http://[::1]:8000"); of a Unix socket 0 and
  /// "unix:/path".
  uint16_t port() const;
  std::string url() const;

  using OnDrain = std::function<void(Clock::time_point deadline)>;
  using OnHangup = std::function<void()>;
  /// Serves on this thread until it is stopped or a drain is over; then every connection is closed, every exchange that
  /// was not complete is cancelled, and none calls back any more. Called once.
  ///   on_drain  on this thread, once, when a drain begins: refuse new work (the handler goes on being asked), cancel
  ///             a load. Answers in progress go on until `deadline`, then end by Exchange::abort.
  ///   on_hangup on this thread, at every SIGHUP: read again what may change while it runs.
  void run(Handler& handler, OnDrain on_drain, OnHangup on_hangup = nullptr);

  /// What the first SIGINT or SIGTERM does: ends run() when no answer is in progress, at the latest at options.drain
  /// (and times.flush for what the aborted answers still say). Before run() too: it then ends at once.
  void drain();
  /// What the second one does: ends run() at once.
  void stop();

  /// Before run(): `task` runs on its thread at once and every `period` until it ends. Silence tells of a thread that
  /// is stuck.
  void every(Clock::duration period, std::function<void()> task);

  HttpStats stats() const;

 private:
  class Impl;
  explicit Listener(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace thermocline::server
