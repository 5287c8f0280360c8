#include "runtime/server/http/listener.h"

#include <fmt/format.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ip/v6_only.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <csignal>

#include "runtime/base/log.h"
#include "runtime/server/http/connection.h"
#include "runtime/server/http/port_holder.h"

namespace thermocline::server {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;
using Stream = asio::generic::stream_protocol;
using Acceptor = asio::basic_socket_acceptor<Stream>;

constexpr size_t kTurnedAway = 64;     // connections that are being told there are too many
constexpr uint64_t kOtherFiles = 256;  // descriptors of the process besides connections

void allow_open_files(uint64_t connections) {
  rlimit limit{};
  const uint64_t wanted = connections + kTurnedAway + kOtherFiles;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
  limit.rlim_cur = std::min<uint64_t>(wanted, limit.rlim_max);
  setrlimit(RLIMIT_NOFILE, &limit);
  if (limit.rlim_cur < wanted)
    log_warn("the limit of open files is {}: {} connections need {} (ulimit -n)", limit.rlim_max, connections, wanted);
}

Status check_origins(const std::vector<std::string>& origins) {
  for (const std::string& origin : origins) {
    if (origin == "*" || is_origin(origin)) continue;
    Error error = invalid("--cors-origin '" + origin + "' is no origin: give http://name:port as a browser sends it" +
                          (origin == "null" ? "; any site can send null" : ""));
    error.field = "--cors-origin";
    return error;
  }
  return {};
}

Status check_allowed_hosts(const std::vector<std::string>& hosts) {
  for (const std::string& host : hosts)
    if (host != "*" && !parse_authority(host)) {
      Error error = invalid("--allowed-host '" + host + "' is no host name: give name or name:port, or * for all");
      error.field = "--allowed-host";
      return error;
    }
  return {};
}

std::string url_of(const std::string& address, uint16_t port) {
  if (address.starts_with("unix:")) return address;
  const bool v6 = address.find(':') != std::string::npos;
  return fmt::format("http://{}:{}", v6 ? "[" + address + "]" : address, port);
}

// A socket that nobody listens on any more is taken away; one that somebody does is in use.
error_code make_way(const asio::local::stream_protocol::endpoint& endpoint) {
  error_code error;
  asio::io_context context;
  asio::local::stream_protocol::socket probe(context);
  probe.connect(endpoint, error);
  if (!error) return asio::error::address_in_use;
  if (error == asio::error::connection_refused) unlink(endpoint.path().c_str());
  return {};
}

uint16_t port_of(const Acceptor& acceptor) {
  sockaddr_storage address{};
  socklen_t size = sizeof(address);
  getsockname(const_cast<Acceptor&>(acceptor).native_handle(), reinterpret_cast<sockaddr*>(&address), &size);
  if (address.ss_family == AF_INET) return ntohs(reinterpret_cast<sockaddr_in*>(&address)->sin_port);
  if (address.ss_family == AF_INET6) return ntohs(reinterpret_cast<sockaddr_in6*>(&address)->sin6_port);
  return 0;
}

std::string what_to_do(const error_code& error, bool local, uint16_t port) {
  if (local && error == asio::error::address_in_use) return "another server listens there";
  if (local) return "is its folder there, and yours to write?";
  if (error == asio::error::access_denied) return "ports below 1024 are the system's: another --port";
  if (error != asio::error::address_in_use) return "is it an address of this machine? --host 127.0.0.1 always is";
  const std::string holder = port_holder(port);
  return "another --port, or stop " + (holder.empty() ? "what listens there" : holder + ", which listens there");
}

Status listen_on(Acceptor& acceptor, const std::string& address, uint16_t port) {
  error_code error;
  const bool local = address.starts_with("unix:");
  Stream::endpoint endpoint;
  if (local) {
    const asio::local::stream_protocol::endpoint path(address.substr(5));
    error = make_way(path);
    endpoint = path;
  } else {
    endpoint = tcp::endpoint(asio::ip::make_address(address), port);
  }
  if (!error) acceptor.open(endpoint.protocol(), error);
  if (!error && !local) acceptor.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error && address == "::") acceptor.set_option(asio::ip::v6_only(false), error);  // :: serves IPv4 too
  const mode_t mask = umask(0117);  // a socket for its owner and group
  if (!error) acceptor.bind(endpoint, error);
  umask(mask);
  if (!error) acceptor.listen(asio::socket_base::max_listen_connections, error);
  if (!error) return {};
  const std::string where = local ? address : url_of(address, port).substr(7);
  return Error{ErrorCode::io,
               "cannot listen on " + where + ": " + error.message() + " (" + what_to_do(error, local, port) + ")",
               "--port"};
}

void log_failure(const char* where, const std::exception_ptr& failure) {
  try {
    std::rethrow_exception(failure);
  } catch (const std::exception& e) {
    log_error("{} failed: {}", where, e.what());
  } catch (...) {
    log_error("{} failed with an exception of an unknown kind", where);
  }
}

}  // namespace

class Listener::Impl {
 public:
  Impl(const HttpOptions& options, std::string address)
      : options_(options),
        address_(std::move(address)),
        guard_(address_, options.allowed_hosts, options.cors_origins) {}
  ~Impl() {
    if (bound_ && address_.starts_with("unix:")) unlink(address_.c_str() + 5);
  }

  Status bind() {
    TC_RETURN_IF_ERROR(listen_on(acceptor_, address_, options_.port));
    bound_ = true;
    port_ = port_of(acceptor_);
    allow_open_files(options_.max_connections);
    std::signal(SIGPIPE, SIG_IGN);
    if (!options_.signals) return {};
    signals_.add(SIGINT);
    signals_.add(SIGTERM);
    signals_.add(SIGHUP);
    return {};
  }

  void run(Handler& handler, OnDrain on_drain, OnHangup on_hangup) {
    Network network{context_, Gate{options_, guard_, handler}, connections_, retained_bytes_};
    network.on_quiet = [this] { finish(); };
    network_ = &network;
    on_drain_ = std::move(on_drain);
    on_hangup_ = std::move(on_hangup);
    await_signal();
    if (task_) run_task();
    asio::co_spawn(context_, accept_all(), [this](const std::exception_ptr& failure) {
      if (failure) log_failure("accepting connections", failure);
      if (failure) finish();
    });
    while (true) {
      try {
        context_.run();  // returns when every connection has ended after finish()
        break;
      } catch (...) {
        log_failure("the network thread", std::current_exception());
      }
    }
    network_ = nullptr;
  }

  void drain() {
    asio::post(context_, [this] { begin_drain(); });
  }
  void stop() {
    asio::post(context_, [this] { finish(); });
  }

  void every(Clock::duration period, std::function<void()> task) {
    task_period_ = period;
    task_ = std::move(task);
  }

  uint16_t port() const { return port_; }
  std::string url() const { return url_of(address_, port_); }
  HttpStats stats() const { return {connections_, retained_bytes_, accepted_, turned_away_, evicted_, accept_pauses_}; }

 private:
  // ---- Connections.

  asio::awaitable<void> accept_all() {
    while (acceptor_.is_open()) {
      Stream::socket socket(context_);
      error_code error;
      co_await acceptor_.async_accept(socket, asio::redirect_error(asio::use_awaitable, error));
      if (error == asio::error::operation_aborted || finished_) co_return;
      if (!error) {
        take(std::move(socket));
      } else if (error != asio::error::connection_aborted) {
        note_refused_accept(error);
        pause_.expires_after(options_.times.accept_pause);
        co_await pause_.async_wait(asio::redirect_error(asio::use_awaitable, error));
      }
    }
  }

  // No descriptor or buffer is left (EMFILE, ENFILE, ENOBUFS): at once the same would come back, so a timer passes
  // first, and an idle connection gives its own.
  void note_refused_accept(const error_code& error) {
    ++accept_pauses_;
    evict();
    if (Clock::now() < next_accept_log_) return;
    next_accept_log_ = Clock::now() + std::chrono::minutes(1);
    log_warn("no connection can be accepted: {} ({} are open; ulimit -n); trying on", error.message(),
             network_->open.size());
  }

  bool evict() {
    if (network_->idle.empty()) return false;
    ++evicted_;
    network_->idle.front()->drop();
    return true;
  }

  void take(Stream::socket socket) {
    ++accepted_;
    const bool over = network_->open.size() >= options_.max_connections;
    const bool turned_away = over && !evict();
    if (turned_away) ++turned_away_;
    if (turned_away && network_->open.size() >= options_.max_connections + kTurnedAway) return;  // closed unheard
    const auto connection = std::make_shared<Connection>(std::move(socket), *network_);
    const auto run = [connection, turned_away] { return turned_away ? connection->turn_away() : connection->serve(); };
    asio::co_spawn(context_, run, [connection](const std::exception_ptr& failure) {
      if (failure) log_failure("a connection", failure);
      connection->drop();
    });
  }

  void run_task() {
    task_();
    task_timer_.expires_after(task_period_);
    task_timer_.async_wait([this](error_code error) {
      if (!error && !finished_) run_task();
    });
  }

  // ---- The end.

  void await_signal() {
    if (!options_.signals) return;
    signals_.async_wait([this](error_code error, int signal) {
      if (error) return;
      if (signal == SIGHUP)
        hang_up();
      else if (network_->draining)
        finish();
      else
        begin_drain();
      if (!finished_) await_signal();
    });
  }

  void hang_up() {
    try {
      if (on_hangup_) on_hangup_();
    } catch (...) {
      log_failure("a reload", std::current_exception());
    }
  }

  void begin_drain() {
    if (finished_ || std::exchange(network_->draining, true)) return;
    const Clock::time_point deadline = Clock::now() + options_.drain;
    log_info("draining: {} answers in progress have {} s; a second signal ends at once", network_->answering,
             options_.drain.count() / 1000);
    if (on_drain_) on_drain_(deadline);
    if (network_->answering == 0) return finish();
    network_->drained_since = Clock::now();
    for (Connection* connection : network_->open) connection->hurry();
    end_timer_.expires_at(deadline);
    end_timer_.async_wait([this](error_code error) {
      if (!error) abort_answers();
    });
  }

  void abort_answers() {
    log_warn("the drain is over: {} answers are aborted", network_->answering);
    for (Connection* connection : network_->open) connection->abort_answer();
    end_timer_.expires_after(options_.times.flush);
    end_timer_.async_wait([this](error_code error) {
      if (!error) finish();
    });
  }

  // Nothing keeps the context busy afterwards, so run() returns when the last coroutine has seen it.
  void finish() {
    if (std::exchange(finished_, true)) return;
    error_code ignored;
    acceptor_.close(ignored);
    signals_.cancel(ignored);
    pause_.cancel();
    end_timer_.cancel();
    task_timer_.cancel();
    for (Connection* connection : network_->open) connection->drop();
  }

  const HttpOptions options_;
  const std::string address_;
  const HostGuard guard_;
  std::atomic<uint64_t> connections_ = 0, retained_bytes_ = 0, accepted_ = 0, turned_away_ = 0, evicted_ = 0,
                        accept_pauses_ = 0;
  asio::io_context context_{1};
  Acceptor acceptor_{context_};
  asio::signal_set signals_{context_};
  asio::steady_timer pause_{context_}, end_timer_{context_}, task_timer_{context_};
  uint16_t port_ = 0;
  Network* network_ = nullptr;  // while run() runs
  OnDrain on_drain_;
  OnHangup on_hangup_;
  std::function<void()> task_;
  Clock::duration task_period_{};
  bool bound_ = false, finished_ = false;
  Clock::time_point next_accept_log_ = Clock::time_point::min();
};

Result<std::unique_ptr<Listener>> Listener::bind(const HttpOptions& options) {
  TC_ASSIGN(std::string address, listen_address(options.host));
  TC_RETURN_IF_ERROR(check_allowed_hosts(options.allowed_hosts));
  TC_RETURN_IF_ERROR(check_origins(options.cors_origins));
  auto impl = std::make_unique<Impl>(options, std::move(address));
  TC_RETURN_IF_ERROR(impl->bind());
  return std::unique_ptr<Listener>(new Listener(std::move(impl)));
}

Listener::Listener(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Listener::~Listener() = default;

uint16_t Listener::port() const { return impl_->port(); }
std::string Listener::url() const { return impl_->url(); }
void Listener::run(Handler& handler, OnDrain on_drain, OnHangup on_hangup) {
  impl_->run(handler, std::move(on_drain), std::move(on_hangup));
}
void Listener::drain() { impl_->drain(); }
void Listener::stop() { impl_->stop(); }
void Listener::every(Clock::duration period, std::function<void()> task) { impl_->every(period, std::move(task)); }
HttpStats Listener::stats() const { return impl_->stats(); }

}  // namespace thermocline::server
