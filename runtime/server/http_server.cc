#include "runtime/server/http_server.h"

#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http.hpp>

#include <chrono>
#include <optional>

namespace thermocline::server {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;
using std::chrono::seconds;

constexpr uint32_t kMaxHeaderBytes = 64 << 10;
constexpr seconds kReadTimeout{60};   // between requests of a connection, and for one to arrive
constexpr seconds kWriteTimeout{60};  // a client that takes nothing for this long is gone
constexpr seconds kKeepAlive{10};     // silence in a stream before a comment fills it

/// One connection. Every await ends with an error code, so nothing throws on the network path.
class Connection {
 public:
  Connection(tcp::socket socket, const HttpOptions& options, const Handler& handler)
      : stream_(std::move(socket)), options_(options), handler_(handler) {}

  asio::awaitable<void> run() {
    while (true) {
      http::request_parser<http::string_body> parser;
      parser.header_limit(kMaxHeaderBytes);
      parser.body_limit(options_.max_body_bytes);
      stream_.expires_after(kReadTimeout);
      error_code error;
      co_await http::async_read(stream_, buffer_, parser, asio::redirect_error(asio::use_awaitable, error));
      if (error) {
        co_await refuse(error);
        break;
      }
      const http::request<http::string_body> request = parser.release();
      const bool keep = co_await answer(request);
      if (!keep) break;
    }
    error_code ignored;
    stream_.socket().shutdown(tcp::socket::shutdown_send, ignored);
  }

 private:
  // What could not be read as a request still gets a JSON error, where the client is there to hear it.
  asio::awaitable<void> refuse(error_code error) {
    Reply reply;
    if (error == http::error::body_limit)
      reply = error_reply(413, "invalid_request_error", "request_too_large",
                          "the body is larger than " + std::to_string(options_.max_body_bytes) + " bytes");
    else if (error == http::error::header_limit)
      reply = error_reply(431, "invalid_request_error", "headers_too_large",
                          "the headers are larger than " + std::to_string(kMaxHeaderBytes) + " bytes");
    else if (error.category() == make_error_code(http::error::bad_method).category() &&
             error != http::error::end_of_stream && error != http::error::partial_message)
      reply = error_reply(400, "invalid_request_error", "bad_request", "not an HTTP request: " + error.message());
    else
      co_return;
    co_await write(reply, 11, false);
    // The client may still be sending: reading on for a moment lets it see the answer instead of a reset.
    for (int i = 0; i < 64 && !error; ++i) {
      stream_.expires_after(seconds(1));
      co_await stream_.async_read_some(buffer_.prepare(65536), asio::redirect_error(asio::use_awaitable, error));
    }
  }

  asio::awaitable<bool> answer(const http::request<http::string_body>& request) {
    const auto coding = request.find(http::field::transfer_encoding);
    if (coding != request.end() && !beast::iequals(coding->value(), "chunked")) {
      co_await write(
          error_reply(501, "not_supported", "transfer_coding", "transfer codings other than chunked are not supported"),
          request.version(), false);
      co_return false;
    }
    HttpRequest plain{std::string(request.method_string()), std::string(request.target()),
                      std::string(request[http::field::content_type]), request.body()};
    Outcome outcome = handler_(plain);
    if (Reply* reply = std::get_if<Reply>(&outcome))
      co_return co_await write(*reply, request.version(), request.keep_alive());
    co_return co_await follow(std::get<std::shared_ptr<Exchange>>(outcome), request.version(), request.keep_alive());
  }

  asio::awaitable<bool> write(const Reply& reply, unsigned version, bool keep_alive) {
    http::response<http::string_body> response{static_cast<http::status>(reply.status), version};
    response.set(http::field::content_type, "application/json");
    for (const auto& [name, value] : reply.headers) response.set(name, value);
    response.keep_alive(keep_alive);
    response.body() = reply.body;
    response.prepare_payload();
    stream_.expires_after(kWriteTimeout);
    error_code error;
    co_await http::async_write(stream_, response, asio::redirect_error(asio::use_awaitable, error));
    co_return !error && keep_alive;
  }

  // Waits for a generation and passes it on, event by event where the client asked for a stream.
  asio::awaitable<bool> follow(std::shared_ptr<Exchange> exchange, unsigned version, bool keep_alive) {
    const auto wake = std::make_shared<asio::steady_timer>(stream_.get_executor());
    exchange->on_ready([wake] { asio::post(wake->get_executor(), [wake] { wake->cancel(); }); });
    watch_for_close(exchange, wake);
    bool headers_sent = false, alive = true;
    while (alive) {
      const auto [piece, finished] = exchange->take();
      if (exchange->stream && !piece.empty()) alive = co_await send_piece(piece, version, headers_sent);
      if (finished) break;
      if (exchange->cancel) alive = false;
      if (!alive || !piece.empty()) continue;
      wake->expires_after(kKeepAlive);
      error_code error;
      co_await wake->async_wait(asio::redirect_error(asio::use_awaitable, error));
      if (!error && exchange->stream) alive = co_await send_piece(": still working\n\n", version, headers_sent);
    }
    if (!alive) exchange->cancel = true;
    exchange->on_ready(nullptr);
    stop_watching();
    if (!alive || exchange->cancel) co_return false;
    const Reply reply = exchange->take_reply();
    if (!headers_sent) co_return co_await write(reply, version, keep_alive);
    if (version < 11) co_return false;
    error_code error;
    stream_.expires_after(kWriteTimeout);
    co_await asio::async_write(stream_, http::make_chunk_last(), asio::redirect_error(asio::use_awaitable, error));
    co_return !error && keep_alive;
  }

  asio::awaitable<bool> send_piece(const std::string& piece, unsigned version, bool& headers_sent) {
    error_code error;
    stream_.expires_after(kWriteTimeout);
    if (!headers_sent) {
      http::response<http::empty_body> response{http::status::ok, version};
      response.set(http::field::content_type, "text/event-stream; charset=utf-8");
      response.set(http::field::cache_control, "no-cache");
      response.set("X-Accel-Buffering", "no");
      if (version >= 11)
        response.chunked(true);
      else
        response.keep_alive(false);
      http::response_serializer<http::empty_body> serializer{response};
      co_await http::async_write_header(stream_, serializer, asio::redirect_error(asio::use_awaitable, error));
      headers_sent = true;
    }
    if (error) co_return false;
    if (version >= 11)
      co_await asio::async_write(stream_, http::make_chunk(asio::buffer(piece)),
                                 asio::redirect_error(asio::use_awaitable, error));
    else
      co_await asio::async_write(stream_, asio::buffer(piece), asio::redirect_error(asio::use_awaitable, error));
    co_return !error;
  }

  // While nothing is read from the socket, readability means a close, or the next request of a pipelining client.
  void watch_for_close(const std::shared_ptr<Exchange>& exchange, const std::shared_ptr<asio::steady_timer>& wake) {
    stream_.expires_never();
    watching_ = std::make_shared<bool>(true);
    stream_.socket().async_wait(tcp::socket::wait_read, [this, exchange, wake, watching = watching_](error_code error) {
      if (error || !*watching) return;
      char byte;
      const ssize_t n = recv(stream_.socket().native_handle(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
      if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))) return;
      exchange->cancel = true;
      wake->cancel();
    });
  }

  void stop_watching() {
    *watching_ = false;
    error_code ignored;
    stream_.socket().cancel(ignored);
  }

  beast::tcp_stream stream_;
  beast::flat_buffer buffer_;
  const HttpOptions& options_;
  const Handler& handler_;
  std::shared_ptr<bool> watching_;
};

asio::awaitable<void> serve_connection(tcp::socket socket, const HttpOptions& options, const Handler& handler) {
  Connection connection(std::move(socket), options, handler);
  co_await connection.run();
}

asio::awaitable<void> accept_connections(tcp::acceptor& acceptor, const HttpOptions& options, const Handler& handler) {
  while (acceptor.is_open()) {
    error_code error;
    tcp::socket socket = co_await acceptor.async_accept(asio::redirect_error(asio::use_awaitable, error));
    if (error) continue;
    error_code ignored;
    socket.set_option(tcp::no_delay(true), ignored);
    asio::co_spawn(acceptor.get_executor(), serve_connection(std::move(socket), options, handler), asio::detached);
  }
}

Result<tcp::acceptor> listen(asio::io_context& context, const HttpOptions& options) {
  error_code error;
  const asio::ip::address address =
      asio::ip::make_address(options.host == "localhost" ? "127.0.0.1" : options.host, error);
  if (error) return invalid("--host '" + options.host + "' is no IP address");
  const tcp::endpoint endpoint(address, options.port);
  tcp::acceptor acceptor(context);
  acceptor.open(endpoint.protocol(), error);
  if (!error) acceptor.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error) acceptor.bind(endpoint, error);
  if (!error) acceptor.listen(asio::socket_base::max_listen_connections, error);
  if (error)
    return Error{ErrorCode::io, "cannot listen on " + options.host + ":" + std::to_string(options.port) + ": " +
                                    error.message() + " (another --port?)"};
  return acceptor;
}

}  // namespace

Status serve_http(const HttpOptions& options, const Handler& handler, const std::function<void(uint16_t port)>& ready,
                  const std::function<void()>& stop) {
  asio::io_context context(1);
  TC_ASSIGN(tcp::acceptor acceptor, listen(context, options));
  asio::signal_set signals(context, SIGINT, SIGTERM);
  signals.async_wait([&](error_code, int) { context.stop(); });
  asio::co_spawn(context, accept_connections(acceptor, options, handler), asio::detached);
  ready(acceptor.local_endpoint().port());
  context.run();
  stop();  // while the context is still there to post to
  return {};
}

}  // namespace thermocline::server
