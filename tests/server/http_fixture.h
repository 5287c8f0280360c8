// For the tests of the transport: raw sockets against a listener whose handler does what the test says. Waits are for
// events, with a limit that only a broken server reaches.
#pragma once
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <map>
#include <thread>

#include "runtime/server/http/listener.h"

namespace thermocline::server {

using std::chrono::milliseconds;
using std::chrono::seconds;

inline constexpr seconds kPatience{30};  // a test that waits this long has failed

template <class Fn>
bool eventually(const Fn& fn) {
  for (const auto end = Clock::now() + kPatience; Clock::now() < end; std::this_thread::sleep_for(milliseconds(1)))
    if (fn()) return true;
  return fn();
}

inline std::string lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

// ---- What the handler answers with: the test holds it too.

class FakeExchange : public Exchange {
 public:
  explicit FakeExchange(bool streams) : streams_(streams) {}

  Output take() override {
    const std::lock_guard lock(mutex_);
    ++takes;
    return std::exchange(output_, {});
  }
  bool streams() const override { return streams_; }
  std::string keep_alive() override { return ": alive\n\n"; }
  void cancel() override { cancelled = true; }
  bool ended() const override { return made; }
  Output abort(const Error& error) override {
    aborted = true;
    if (!streams_) return {{}, error_reply(error), true};
    return {"data: {\"error\":\"" + error.message + "\"}\n\ndata: [DONE]\n\n", {}, true};
  }
  void closed(bool complete, int code) override {
    status = code;
    state = complete ? 1 : 2;
    ++closes;
  }

  void push(const std::string& bytes, bool finished = false) {
    {
      const std::lock_guard lock(mutex_);
      output_.bytes += bytes;
      output_.finished = finished;
    }
    ready();
  }
  void finish(Reply reply) {
    {
      const std::lock_guard lock(mutex_);
      output_.reply = std::move(reply);
      output_.finished = true;
    }
    ready();
  }

  std::atomic<bool> cancelled = false, aborted = false, made = false;
  std::atomic<int> closes = 0, takes = 0, status = 0, state = 0;  // state 1: complete, 2: not

 private:
  std::mutex mutex_;
  Output output_;
  const bool streams_;
};

// /stream and /wait give an exchange to the test; /echo says what arrived; the rest is refused in check().
class FakeHandler : public Handler {
 public:
  std::optional<Reply> check(const HttpHead& head) override {
    ++checks;
    if (head.target == "/throw/check") throw std::runtime_error("planted");
    if (head.target == "/stopped") return error_reply(Error{ErrorCode::overloaded, "the queue is full"});
    const bool known = head.target == "/health" || head.target.starts_with("/echo") || head.target == "/stream" ||
                       head.target == "/wait" || head.target == "/throw";
    if (!known) return error_reply(404, "not_found_error", "not_found", "no such path");
    return std::nullopt;
  }
  uint64_t body_limit(const HttpHead& head) const override {
    return head.target == "/echo/small" ? 1000 : uint64_t{1} << 40;
  }
  Reply shaped(const HttpHead& head, const Reply& reply) const override {
    Reply shaped = reply;
    shaped.headers.emplace_back("x-shaped-for", head.target);
    return shaped;
  }
  std::variant<Reply, std::shared_ptr<Exchange>> handle(HttpRequest request) override {
    if (request.head.target == "/throw") throw std::runtime_error("planted");
    if (request.head.target == "/health")
      return draining ? error_reply(Error{ErrorCode::unavailable, "draining"}) : Reply{200, R"({"status":"ok"})"};
    if (request.head.target.starts_with("/echo")) {
      const bool minted = request.head.request_id.starts_with("req_");
      std::string body = request.head.method + " " + request.head.content_type + " " +
                         (minted ? "" : request.head.request_id) + " " + std::to_string(request.body.size());
      return Reply{200, std::move(body), {{"content-type", "text/plain"}}};
    }
    const std::lock_guard lock(mutex_);
    exchanges_.push_back(std::make_shared<FakeExchange>(request.head.target == "/stream"));
    return exchanges_.back();
  }

  // The exchange of the n-th request that got one.
  std::shared_ptr<FakeExchange> exchange(size_t n = 0) {
    eventually([&] { return count() > n; });
    const std::lock_guard lock(mutex_);
    return exchanges_.at(n);
  }
  size_t count() {
    const std::lock_guard lock(mutex_);
    return exchanges_.size();
  }

  std::atomic<int> checks = 0;
  std::atomic<bool> draining = false;

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<FakeExchange>> exchanges_;
};

struct Server {
  FakeHandler handler;
  std::unique_ptr<Listener> listener;
  std::atomic<bool> drained = false, ended = false;
  std::atomic<int> hangups = 0;
  std::thread thread;

  explicit Server(HttpOptions options = {}, bool signals = false) {
    options.port = 0;
    options.signals = signals;
    Result<std::unique_ptr<Listener>> bound = Listener::bind(options);
    listener = std::move(bound).value();
    thread = std::thread([this] {
      listener->run(
          handler, [this](Clock::time_point) { drained = handler.draining = true; }, [this] { ++hangups; });
      ended = true;
    });
  }
  ~Server() {
    listener->stop();
    thread.join();
  }
};

// ---- What a test sends and gets.

struct Response {
  int status = 0;
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body, raw;                       // of a chunked body the content
  bool ended = false;                          // the body was whole
};

class Client {
 public:
  /// By its Unix socket.
  explicit Client(const std::string& path) {
    fd_ = socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un to{};
    to.sun_family = AF_UNIX;
    path.copy(to.sun_path, sizeof(to.sun_path) - 1);
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof(to)) == 0;
  }
  explicit Client(const Server& server, const char* address = "127.0.0.1", int receive_bytes = 0) {
    fd_ = socket(AF_INET, SOCK_STREAM, 0);
    if (receive_bytes > 0) setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_bytes, sizeof(receive_bytes));
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(server.listener->port());
    inet_pton(AF_INET, address, &to.sin_addr);
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof(to)) == 0;
  }
  ~Client() { close(); }
  Client(const Client&) = delete;

  bool connected() const { return connected_; }
  /// False when the server has closed.
  bool send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(n));
    }
    return true;
  }
  void get(const std::string& target, const std::string& lines = "") {
    send("GET " + target + " HTTP/1.1\r\nHost: localhost\r\n" + lines + "\r\n");
  }
  void post(const std::string& target, const std::string& body, const std::string& lines = "") {
    send("POST " + target + " HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + std::to_string(body.size()) + "\r\n" +
         lines + "\r\n" + body);
  }
  void shut_down_writing() const { shutdown(fd_, SHUT_WR); }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }
  void reset() {
    const linger now{1, 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
    close();
  }

  /// Reads until `done` of everything that is there, the end, or the patience is over.
  template <class Fn>
  bool read_until(const Fn& done) {
    const auto end = Clock::now() + kPatience;
    while (!done(in_)) {
      pollfd p{fd_, POLLIN, 0};
      if (poll(&p, 1, 100) <= 0) {
        if (Clock::now() < end) continue;
        return false;
      }
      char bytes[65536];
      const ssize_t n = recv(fd_, bytes, sizeof(bytes), 0);
      reset_ |= n < 0;
      if (n <= 0) return eof_ = true, done(in_);
      in_.append(bytes, static_cast<size_t>(n));
    }
    return true;
  }
  bool read_for(const std::string& text) {
    return read_until([&](const std::string& in) { return in.find(text) != std::string::npos; });
  }
  /// Whether the server ends the connection, without more bytes.
  bool ends() {
    read_until([](const std::string&) { return false; });
    return eof_ && in_.empty();
  }
  bool was_reset() const { return reset_; }

  Response response(bool bodiless = false) {
    Response r;
    if (!read_for("\r\n\r\n")) return r;
    const size_t head = in_.find("\r\n\r\n") + 4;
    parse_head(in_.substr(0, head), r);
    in_.erase(0, head);
    if (bodiless || r.status == 204 || r.status < 200)
      r.ended = true;
    else if (r.headers.count("content-length"))
      read_sized(std::stoul(r.headers["content-length"]), r);
    else if (r.headers.count("transfer-encoding"))
      read_chunks(r);
    else
      read_until([](const std::string&) { return false; }), r.body = std::exchange(in_, ""), r.ended = eof_;
    return r;
  }

  std::string in_;

 private:
  static void parse_head(const std::string& head, Response& r) {
    r.raw = head;
    r.status = head.starts_with("HTTP/1.1 ") ? std::stoi(head.substr(9, 3)) : 0;
    size_t at = head.find("\r\n") + 2;
    while (at + 2 < head.size()) {
      const size_t end = head.find("\r\n", at), colon = head.find(": ", at);
      r.headers[lower(head.substr(at, colon - at))] = head.substr(colon + 2, end - colon - 2);
      at = end + 2;
    }
  }
  void read_sized(size_t size, Response& r) {
    r.ended = read_until([&](const std::string& in) { return in.size() >= size; });
    r.body = in_.substr(0, size);
    in_.erase(0, r.body.size());
  }
  void read_chunks(Response& r) {
    while (read_for("\r\n")) {
      const size_t line = in_.find("\r\n") + 2, size = std::stoul(in_, nullptr, 16);
      if (!read_until([&](const std::string& in) { return in.size() >= line + size + 2; })) return;
      r.body += in_.substr(line, size);
      in_.erase(0, line + size + 2);
      if (size == 0) return void(r.ended = true);
    }
  }

  int fd_ = -1;
  bool connected_ = false, eof_ = false, reset_ = false;
};

inline bool healthy(const Server& server) {
  Client client(server);
  client.get("/health");
  return client.response().status == 200;
}

// What the server says to `bytes` on a connection of their own.
inline Response answer_to(const Server& server, const std::string& bytes) {
  Client client(server);
  client.send(bytes);
  return client.response();
}

}  // namespace thermocline::server
