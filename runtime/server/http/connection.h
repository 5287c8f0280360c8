// One client: reads a request, hands it over, sends the answer, and notices when the client has gone. Everything runs
// on the network thread.
//
// The socket is never awaited itself: callbacks keep reading into a bounded buffer and note what happened, and the
// coroutine awaits one timer, which they cancel. So a close is seen in every state, and any wait can have a deadline.
#pragma once

#include <array>
#include <atomic>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <unordered_set>

#include "runtime/server/http/admission.h"

namespace thermocline::server {

class Connection;

/// What the connections of one listener share.
struct Network {
  boost::asio::io_context& context;
  Gate gate;
  std::atomic<uint64_t>& connections;     // open; this and the next are read by any thread
  std::atomic<uint64_t>& retained_bytes;  // of bodies that are coming in
  std::unordered_set<Connection*> open = {};
  std::list<Connection*> idle = {};  // between requests; the longest is first
  uint64_t answering = 0;            // requests handed over whose answer is not out
  bool draining = false;             // answers close their connection
  Clock::time_point drained_since = {};
  std::function<void()> on_quiet = {};  // posted when nothing is answered any more while draining
};

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  using Stream = boost::asio::generic::stream_protocol;  // TCP, or a Unix socket

  Connection(Stream::socket socket, Network& network);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  /// Serves requests until the client or a limit ends it. At most one of the two runs, once.
  boost::asio::awaitable<void> serve();
  /// Says 503 and closes: there are too many connections.
  boost::asio::awaitable<void> turn_away();
  /// Closes now; what is being answered is cancelled.
  void drop();
  /// A drain has begun: who takes nothing of an answer that is made has less time.
  void hurry() { notify(); }
  /// Ends the answer in progress with Exchange::abort.
  void abort_answer();

 private:
  enum class Input { data, end, gone, late, full };
  struct Following;  // an exchange that is being followed
  class Waker;

  boost::asio::awaitable<bool> await_request();
  boost::asio::awaitable<bool> serve_request();
  boost::asio::awaitable<std::optional<Reply>> read_header();
  boost::asio::awaitable<std::optional<Reply>> read_body();
  boost::asio::awaitable<bool> answer();
  boost::asio::awaitable<bool> follow(std::shared_ptr<Exchange> exchange);
  boost::asio::awaitable<bool> send(Reply reply);
  boost::asio::awaitable<bool> flush();
  int unsent();
  boost::asio::awaitable<void> writable();
  Clock::time_point stalled_at(Clock::time_point since) const;
  boost::asio::awaitable<Input> more(Clock::time_point deadline);
  boost::asio::awaitable<void> wait_until(Clock::time_point deadline);
  boost::asio::awaitable<void> linger();

  void pump();
  void on_readable();
  void watch_for_reset();
  void check_paused_peer();
  void notify();
  void lose(const char* why);
  void rest(bool idle);
  bool skip_empty_lines();
  bool ends_in_bare_line_feed() const;
  void retain(uint64_t bytes);
  std::optional<Reply> put(boost::system::error_code& error);
  std::variant<Reply, std::shared_ptr<Exchange>> hand_over();
  bool closes() const;
  void stage_piece(const Exchange& exchange, std::string bytes, bool last);
  bool stage_sign_of_life(Following& following);
  Clock::time_point next_sign(const Following& following) const;

  Stream::socket socket_;
  Network& network_;
  const HttpOptions& options_;
  boost::asio::steady_timer wake_;  // what the coroutine awaits
  std::string local_, peer_;        // addresses

  boost::beast::flat_buffer buffer_;                           // read and not yet parsed
  size_t read_limit_ = 0;                                      // reading pauses while the buffer holds this much
  bool reading_ = false, writing_ = false, watching_ = false;  // a wait for the socket is pending
  bool end_ = false;    // FIN: the client sends nothing more, and may or may not read on
  bool gone_ = false;   // reset, stalled or dropped: nothing can be sent
  bool abort_ = false;  // the answer is to end by Exchange::abort

  std::optional<RequestParser> parser_;
  Admission request_;
  uint64_t retained_ = 0;
  std::list<Connection*>::iterator idle_;
  bool is_idle_ = false;

  std::string out_head_, out_body_;  // staged for flush()
  size_t prefixed_ = 0;              // bytes of the status line that are out already
  bool committed_ = false;           // the head of an event stream is out
  bool last_ = false;                // nothing follows what is staged
  std::weak_ptr<Exchange> followed_;
  bool close_ = false;  // the head said that the connection ends with this answer
};

}  // namespace thermocline::server
