#include "runtime/server/http/connection.h"

#include <fmt/format.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/http/error.hpp>
#include <cstring>

#include "runtime/base/log.h"

namespace thermocline::server {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;

constexpr size_t kPieceBytes = 64 << 10;      // read at once, and at most held, of a body
constexpr size_t kPipelinedBytes = 16 << 10;  // held of what a client sends while its answer is on the way
constexpr std::chrono::seconds kPausedPoll{1};

// Calls into the APIs may throw; the connection still answers. `fallback` is the result then. `id`: whose request it
// is.
template <class Fn, class T>
T guarded(const char* what, T fallback, const Fn& fn, std::string_view id = "") {
  const char* const space = id.empty() ? "" : " ";
  try {
    return fn();
  } catch (const std::exception& e) {
    log_error("{}{}{} failed: {}", what, space, id, e.what());
  } catch (...) {
    log_error("{}{}{} failed with an exception of an unknown kind", what, space, id);
  }
  return fallback;
}

Reply internal_reply() {
  return error_reply(Error{ErrorCode::internal, "internal error, please report: the log of the server says more"});
}

Exchange::Output pull(Exchange& exchange, bool abort, const std::string& id) {
  const Exchange::Output broken{{}, internal_reply(), true};
  return guarded(
      "the answer to request", broken,
      [&] {
        return abort ? exchange.abort(Error{ErrorCode::unavailable, "the server is shutting down"}) : exchange.take();
      },
      id);
}

std::string chunk(const std::string& bytes, bool last) {
  std::string out = bytes.empty() ? "" : fmt::format("{:x}\r\n", bytes.size()) + bytes + "\r\n";
  return last ? out + "0\r\n\r\n" : out;
}

// Counts an answer in progress, which a drain waits for.
class Answering {
 public:
  explicit Answering(Network& network) : network_(network) { ++network_.answering; }
  ~Answering() {
    if (--network_.answering > 0 || !network_.draining) return;
    try {
      asio::post(network_.context, network_.on_quiet);
    } catch (...) {  // no memory for it: the drain's deadline ends the server instead
    }
  }
  Answering(const Answering&) = delete;
  Answering& operator=(const Answering&) = delete;

 private:
  Network& network_;
};

}  // namespace

// Brings an exchange's ready() from any thread to the connection: at most one post is on its way, and none after
// detach(), so a late call never meets a context that has ended.
class Connection::Waker : public std::enable_shared_from_this<Waker> {
 public:
  Waker(asio::io_context& context, Connection& connection) : context_(&context), connection_(connection) {}

  void wake() {
    const std::lock_guard lock(mutex_);
    if (!context_ || std::exchange(posted_, true)) return;
    asio::post(*context_, [self = shared_from_this()] { self->deliver(); });
  }
  void detach() {
    const std::lock_guard lock(mutex_);
    context_ = nullptr;
  }

 private:
  void deliver() {
    {
      const std::lock_guard lock(mutex_);
      posted_ = false;
      if (!context_) return;
    }
    connection_.notify();  // detached on this same thread before the connection ends
  }

  std::mutex mutex_;
  asio::io_context* context_;
  Connection& connection_;
  bool posted_ = false;
};

struct Connection::Following {
  std::shared_ptr<Exchange> exchange;
  std::shared_ptr<Waker> waker;
  std::chrono::milliseconds probe_interval;
  Clock::time_point spoke = Clock::now();  // the last bytes that went out
  Clock::time_point next_probe = spoke;    // counts once the peer has sent its FIN
  bool complete = false;                   // the last byte is out
  int status = 200;

  Following(std::shared_ptr<Exchange> what, Connection& connection)
      : exchange(std::move(what)),
        waker(std::make_shared<Waker>(connection.network_.context, connection)),
        probe_interval(connection.options_.times.probe) {
    exchange->on_ready([waker = waker] { waker->wake(); });
  }
  ~Following() {
    waker->detach();
    guarded("the end of an answer", true, [&] {
      exchange->on_ready(nullptr);
      if (!complete) exchange->cancel();
      exchange->closed(complete, status);
      return true;
    });
  }
  Following(const Following&) = delete;
  Following& operator=(const Following&) = delete;
};

Connection::Connection(Stream::socket socket, Network& network)
    : socket_(std::move(socket)), network_(network), options_(network.gate.options), wake_(network.context) {
  error_code ignored;
  socket_.non_blocking(true, ignored);
  socket_.set_option(asio::ip::tcp::no_delay(true), ignored);
  socket_.set_option(asio::socket_base::keep_alive(true), ignored);  // a peer without power is gone after minutes
  const int idle_s = 60;
  setsockopt(socket_.native_handle(), IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
  local_ = socket_address(socket_.native_handle(), getsockname);
  peer_ = socket_address(socket_.native_handle(), getpeername);
  network_.open.insert(this);
  ++network_.connections;
}

Connection::~Connection() {
  rest(false);
  retain(0);
  network_.open.erase(this);
  --network_.connections;
}

asio::awaitable<void> Connection::serve() {
  while (true) {
    const bool began = co_await await_request();
    if (!began) co_return;
    const bool goes_on = co_await serve_request();
    if (!goes_on) break;
  }
  co_await linger();
}

asio::awaitable<void> Connection::turn_away() {
  request_.facts.id = mint_request_id();
  Reply reply = error_reply(Error{ErrorCode::unavailable, "too many connections: try again in a moment"});
  co_await send(std::move(reply));
  co_await linger();
}

void Connection::drop() {
  rest(false);
  lose("dropped");
}

void Connection::abort_answer() {
  abort_ = true;
  notify();
}

// ---- Waiting. Conditions are looked at right before, on the same thread: no wake-up is lost.

asio::awaitable<void> Connection::wait_until(Clock::time_point deadline) {
  error_code ignored;
  wake_.expires_at(deadline);
  co_await wake_.async_wait(asio::redirect_error(asio::use_awaitable, ignored));
}

void Connection::notify() { wake_.cancel(); }

/// Waits until there is more in the buffer than now.
asio::awaitable<Connection::Input> Connection::more(Clock::time_point deadline) {
  const size_t before = buffer_.size();
  if (before >= read_limit_) co_return Input::full;
  pump();
  while (buffer_.size() == before && !end_ && !gone_ && Clock::now() < deadline) co_await wait_until(deadline);
  if (gone_) co_return Input::gone;
  if (buffer_.size() > before) co_return Input::data;
  co_return end_ ? Input::end : Input::late;
}

// ---- The socket.

/// Keeps a read pending while the buffer has room. Memory is taken when there is something to read, so that an idle
/// connection holds none.
void Connection::pump() {
  if (reading_ || end_ || gone_ || buffer_.size() >= read_limit_) return;
  reading_ = true;
  socket_.async_wait(Stream::socket::wait_read, [self = shared_from_this()](error_code error) {
    self->reading_ = false;
    if (error || self->gone_) return;
    const bool read = guarded("reading", false, [&] {
      self->on_readable();
      return true;
    });
    if (!read) self->lose("out of memory");
  });
}

void Connection::on_readable() {
  if (buffer_.size() >= read_limit_) return;  // the limit fell while the wait was pending
  error_code error;
  const size_t room = std::min(read_limit_ - buffer_.size(), kPieceBytes);
  const size_t n = socket_.read_some(buffer_.prepare(room), error);
  buffer_.commit(n);
  if (error == asio::error::eof) {
    end_ = true;
    watch_for_reset();  // reads say nothing any more
  } else if (error && error != asio::error::would_block && error != asio::error::interrupted) {
    lose("reset by the client");
  }
  notify();
  pump();
}

/// Notices a reset where no read is pending: after a FIN, and while a full buffer holds pipelined requests.
void Connection::watch_for_reset() {
  if (watching_ || gone_) return;
  watching_ = true;
  socket_.async_wait(Stream::socket::wait_error, [self = shared_from_this()](error_code error) {
    if (error || self->gone_) return;
    pollfd poll_fd{self->socket_.native_handle(), 0, 0};
    const bool reset = poll(&poll_fd, 1, 0) > 0 && (poll_fd.revents & (POLLERR | POLLHUP)) != 0;
    if (reset) self->lose("reset by the client");  // else urgent data: not watched again, that would spin
  });
}

// With a full buffer a FIN waits behind what is not read: the state of the connection still tells.
void Connection::check_paused_peer() {
  if (reading_ || end_ || gone_) return;
  tcp_info info{};
  socklen_t size = sizeof(info);
  if (getsockopt(socket_.native_handle(), IPPROTO_TCP, TCP_INFO, &info, &size) != 0) return;
  if (info.tcpi_state == TCP_CLOSE_WAIT) end_ = true;
  if (info.tcpi_state == TCP_CLOSE) lose("reset by the client");
}

void Connection::lose(const char* why) {
  if (std::exchange(gone_, true)) return;
  log_debug("connection of {}: {}", peer_, why);
  error_code ignored;
  socket_.close(ignored);
  notify();
}

/// Sends what is staged. False when the client is gone.
asio::awaitable<bool> Connection::flush() {
  const size_t total = out_head_.size() + out_body_.size();
  size_t done = 0;
  while (done < total && !gone_) {
    const size_t head = std::min(done, out_head_.size()), body = done - head;
    const std::array<asio::const_buffer, 2> rest = {asio::buffer(out_head_) + head, asio::buffer(out_body_) + body};
    error_code error;
    done += socket_.write_some(rest, error);
    if (error == asio::error::would_block)
      co_await writable();
    else if (error && error != asio::error::interrupted)
      lose("writing failed");
  }
  out_head_ = {};
  out_body_ = {};
  co_return !gone_;
}

/// When a client that has taken nothing since then is given up. During a drain this is looked at again and again, as an
/// exchange that ends behind a full buffer says nothing.
Clock::time_point Connection::stalled_at(Clock::time_point since) const {
  const Clock::time_point end = since + options_.times.write_stall;
  if (!network_.draining) return end;
  const std::shared_ptr<Exchange> exchange = followed_.lock();
  const bool made = last_ || (exchange && exchange->ended());
  return made ? std::min(end, std::max(since, network_.drained_since) + options_.times.flush) : end;
}

/// Bytes that the client has not acknowledged.
int Connection::unsent() {
  int bytes = 0;
  return ioctl(socket_.native_handle(), SIOCOUTQ, &bytes) == 0 ? bytes : 0;
}

/// A large buffer is writable only when much of it is free again: who takes bytes slowly shows in what is left.
asio::awaitable<void> Connection::writable() {
  Clock::time_point since = Clock::now();
  int left = unsent();
  if (!std::exchange(writing_, true))
    socket_.async_wait(Stream::socket::wait_write, [self = shared_from_this()](error_code) {
      self->writing_ = false;
      self->notify();
    });
  while (writing_ && !gone_) {
    const Clock::time_point now = Clock::now();
    if (const int still = unsent(); still < left) {
      left = still;
      since = now;
    }
    const Clock::time_point end = stalled_at(since);
    if (now >= end) break;
    co_await wait_until(network_.draining ? std::min(end, now + kPausedPoll) : end);
  }
  if (writing_) lose("the client takes nothing");
}

/// After a last answer: a client that is still sending must not be met by a reset, which would throw away the answer
/// that it has not read yet. So what comes is read and dropped, within bounds.
asio::awaitable<void> Connection::linger() {
  error_code ignored;
  if (!gone_) socket_.shutdown(Stream::socket::shutdown_send, ignored);
  const Clock::time_point end = Clock::now() + options_.times.linger;
  read_limit_ = kPieceBytes;
  uint64_t dropped = 0;
  while (!gone_ && !end_ && dropped < options_.max_linger_bytes) {
    dropped += buffer_.size();
    buffer_.consume(buffer_.size());
    const Input input = co_await more(std::min(end, Clock::now() + options_.times.linger_silence));
    if (input != Input::data || Clock::now() >= end) break;
  }
}

// ---- A request comes in.

void Connection::rest(bool idle) {
  if (idle == is_idle_) return;
  is_idle_ = idle;
  if (idle)
    idle_ = network_.idle.insert(network_.idle.end(), this);
  else
    network_.idle.erase(idle_);
}

void Connection::retain(uint64_t bytes) {
  network_.retained_bytes += bytes - retained_;  // wraps around zero where it falls
  retained_ = bytes;
}

/// Empty lines before a request are ignored (RFC 9112, 2.2). Whether something else is there.
bool Connection::skip_empty_lines() {
  while (true) {
    const auto* bytes = static_cast<const char*>(buffer_.data().data());
    if (buffer_.size() < 2 || bytes[0] != '\r' || bytes[1] != '\n')
      return buffer_.size() > 1 || (buffer_.size() == 1 && bytes[0] != '\r');
    buffer_.consume(2);
  }
}

/// Whether the line in front of the buffer ends without its carriage return.
bool Connection::ends_in_bare_line_feed() const {
  const std::string_view bytes(static_cast<const char*>(buffer_.data().data()), buffer_.size());
  const size_t end = bytes.find('\n');
  return end != std::string_view::npos && (end == 0 || bytes[end - 1] != '\r');
}

asio::awaitable<bool> Connection::await_request() {
  parser_.reset();
  if (buffer_.size() == 0) buffer_.shrink_to_fit();
  read_limit_ = options_.max_header_bytes + 1024;
  const Clock::time_point deadline = Clock::now() + options_.times.idle;
  rest(true);
  Input input = Input::data;
  while (!skip_empty_lines() && input == Input::data) input = co_await more(deadline);
  rest(false);
  co_return input == Input::data && !gone_;
}

namespace {

std::optional<Reply> unfinished(bool late, bool end) {
  if (late)
    return error_reply(408, "timeout_error", "request_timeout", "the request did not arrive in the time it has");
  if (end) return error_reply(400, "invalid_request_error", "bad_request", "the request ended before it was complete");
  return error_reply(400, "invalid_request_error", "bad_request", "a line of the request is too long");
}

}  // namespace

asio::awaitable<bool> Connection::serve_request() {
  request_ = {};
  request_.facts.id = mint_request_id();  // for answers to what turns out to be no request
  prefixed_ = 0;
  committed_ = last_ = false;
  followed_.reset();
  std::optional<Reply> refusal = co_await read_header();
  if (!refusal && !gone_) {
    const Admission broken{request_.facts, {}, 0, internal_reply()};
    request_ = guarded(
        "request", broken, [&] { return admit(network_.gate, *parser_, local_, peer_); }, request_.facts.id);
    refusal = std::move(request_.refusal);
  }
  if (!refusal && !gone_) {
    refusal = co_await read_body();
    if (refusal) refusal = network_.gate.handler.shaped(request_.head, *refusal);
  }
  if (gone_) co_return false;
  if (!refusal) co_return co_await answer();
  if (!parser_->is_done()) parser_.reset();  // with what there is of the body
  retain(0);
  co_return co_await send(std::move(*refusal));
}

asio::awaitable<std::optional<Reply>> Connection::read_header() {
  const Clock::time_point deadline = Clock::now() + options_.times.header;
  parser_.emplace();
  parser_->header_limit(options_.max_header_bytes);
  parser_->body_limit(boost::none);  // the length is looked at when Host and target have been
  size_t header_bytes = 0;           // Beast's limit is for a line of what is not parsed yet
  while (true) {
    error_code error;
    const size_t used = parser_->put(buffer_.data(), error);
    buffer_.consume(used);
    header_bytes += used;
    if (header_bytes > options_.max_header_bytes) error = http::error::header_limit;
    if (error == http::error::bad_version && ends_in_bare_line_feed()) error = http::error::bad_line_ending;
    if (error && error != http::error::need_more)
      co_return malformed_reply(error, options_, parser_->get().target().empty());
    if (parser_->is_header_done()) co_return std::nullopt;
    const Input input = co_await more(deadline);
    if (input == Input::gone) co_return std::nullopt;
    if (input != Input::data) co_return unfinished(input == Input::late, input == Input::end);
  }
}

/// Parses what is buffered of the body.
std::optional<Reply> Connection::put(error_code& error) {
  const size_t used = parser_->put(buffer_.data(), error);
  buffer_.consume(used);
  retain(parser_->get().body().size());
  if (error == http::error::body_limit)
    return error_reply(413, "invalid_request_error", "request_too_large",
                       fmt::format("the body has more than {} bytes", request_.body_limit));
  if (error && error != http::error::need_more) return malformed_reply(error, options_, false);
  if (network_.retained_bytes > options_.max_retained_bytes)
    return error_reply(Error{ErrorCode::unavailable, "too many large requests are coming in: try again in a moment"});
  return std::nullopt;
}

asio::awaitable<std::optional<Reply>> Connection::read_body() {
  if (parser_->is_done()) co_return std::nullopt;
  if (request_.facts.expects_continue) {
    out_head_ = "HTTP/1.1 100 Continue\r\n\r\n";
    co_await flush();
  }
  parser_->eager(true);
  parser_->body_limit(request_.body_limit);
  read_limit_ = kPieceBytes;
  const Clock::time_point start = Clock::now();
  while (!gone_) {
    error_code error;
    std::optional<Reply> refusal = put(error);
    if (refusal || parser_->is_done()) co_return refusal;
    const Input input = co_await more(body_deadline(options_, start, retained_));
    if (input == Input::data) continue;
    if (input != Input::gone) co_return unfinished(input == Input::late, input == Input::end);
  }
  co_return std::nullopt;
}

// ---- An answer goes out.

std::variant<Reply, std::shared_ptr<Exchange>> Connection::hand_over() {
  HttpRequest request{std::move(request_.head), std::move(parser_->get().body())};
  retain(0);  // the APIs count it from here on
  std::variant<Reply, std::shared_ptr<Exchange>> broken = internal_reply();
  return guarded(
      "request", std::move(broken), [&] { return network_.gate.handler.handle(std::move(request)); },
      request_.facts.id);
}

asio::awaitable<bool> Connection::answer() {
  const Answering answering(network_);
  read_limit_ = kPipelinedBytes;
  std::variant<Reply, std::shared_ptr<Exchange>> outcome = hand_over();
  if (Reply* reply = std::get_if<Reply>(&outcome)) co_return co_await send(std::move(*reply));
  co_return co_await follow(std::move(std::get<std::shared_ptr<Exchange>>(outcome)));
}

bool Connection::closes() const {
  const bool unread = !parser_ || !parser_->is_done();
  return unread || !request_.facts.keep_alive || network_.draining || (end_ && buffer_.size() == 0);
}

/// Whether the connection goes on afterwards.
asio::awaitable<bool> Connection::send(Reply reply) {
  close_ = closes();
  last_ = true;
  out_head_ = reply_head(reply, request_.facts, close_).substr(prefixed_);
  if (!request_.facts.head_only && reply.status != 204 && reply.status != 304) out_body_ = std::move(reply.body);
  const bool sent = co_await flush();
  co_return sent && !close_;
}

/// The connection pulls: what comes next is taken when the last bytes are out, so a slow client fills the exchange's
/// own bounded buffer and nothing here.
///
/// A peer's FIN means "I send no more", which a client that closed and one that only shut down its writing half say
/// alike. The second still wants its answer; for the first every further step is wasted. Only a write tells them
/// apart: a closed peer answers it with a reset. So after a FIN something is written at once, and again at doubling
/// intervals: a sign of life in a stream that has begun, else the next byte of "HTTP/1.1 ", which starts every answer.
/// An interim 1xx answer would do too, but some clients take 102 for the answer, and HTTP/1.0 has none.
asio::awaitable<bool> Connection::follow(std::shared_ptr<Exchange> exchange) {
  followed_ = exchange;
  Following f(std::move(exchange), *this);
  abort_ = false;
  pump();
  watch_for_reset();
  while (!gone_ && !(committed_ && request_.facts.head_only)) {
    const bool aborted = abort_;
    Exchange::Output out = pull(*f.exchange, aborted, request_.facts.id);
    const bool last = out.finished || aborted;
    if (!committed_ && (out.reply || (last && out.bytes.empty()))) {
      Reply reply = out.reply ? std::move(*out.reply) : internal_reply();
      f.status = reply.status;
      const bool goes_on = co_await send(std::move(reply));
      f.complete = !gone_;
      co_return goes_on;
    }
    if (out.reply) {
      lose("a stream ended in a reply");
    } else if (last || !out.bytes.empty()) {
      last_ = last;
      stage_piece(*f.exchange, std::move(out.bytes), last);
      co_await flush();
      f.spoke = Clock::now();
      f.complete = last && !gone_;
      if (last) break;
    } else if (stage_sign_of_life(f)) {
      co_await flush();
    } else {
      co_await wait_until(next_sign(f));
      check_paused_peer();
    }
  }
  co_return f.complete && !close_;
}

void Connection::stage_piece(const Exchange& exchange, std::string bytes, bool last) {
  if (!std::exchange(committed_, true)) {
    close_ = closes() || !request_.facts.http11 || request_.facts.head_only;
    out_head_ = stream_head(request_.facts, close_, exchange.headers()).substr(prefixed_);
  }
  if (request_.facts.head_only) return;
  out_body_ = request_.facts.http11 ? chunk(bytes, last) : std::move(bytes);
}

/// A comment after a long silence, and the probe of a peer that has sent its FIN. Whether something is staged.
bool Connection::stage_sign_of_life(Following& f) {
  const Clock::time_point now = Clock::now();
  const bool streams = committed_ || f.exchange->streams();
  const bool silent = streams && now >= f.spoke + options_.times.keep_alive;
  const bool probes = end_ && now >= f.next_probe;
  if (!silent && !probes) return false;
  if (silent || committed_)
    stage_piece(*f.exchange, f.exchange->keep_alive(), false);
  else
    out_head_ = kStatusPrefix[prefixed_++];
  if (silent || committed_) f.spoke = now;
  f.next_probe = !committed_ && prefixed_ == kStatusPrefix.size() ? Clock::time_point::max() : now + f.probe_interval;
  f.probe_interval *= 2;
  return true;
}

/// When the next sign of life is due, or a paused read is looked after.
Clock::time_point Connection::next_sign(const Following& f) const {
  Clock::time_point next = Clock::time_point::max();
  if (committed_ || f.exchange->streams()) next = f.spoke + options_.times.keep_alive;
  if (end_) next = std::min(next, f.next_probe);
  if (!reading_ && !end_) next = std::min(next, Clock::now() + kPausedPoll);
  return next;
}

}  // namespace thermocline::server
