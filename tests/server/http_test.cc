// The transport from outside: raw sockets against a listener whose handler does what the test says. Waits are for
// events, with a limit that only a broken server reaches.
#include "runtime/server/http/listener.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <map>
#include <thread>

#include "runtime/server/http/guard.h"

namespace thermocline::server {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr seconds kPatience{30};  // a test that waits this long has failed

template <class Fn>
bool eventually(const Fn& fn) {
  for (const auto end = Clock::now() + kPatience; Clock::now() < end; std::this_thread::sleep_for(milliseconds(1)))
    if (fn()) return true;
  return fn();
}

std::string lower(std::string text) {
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
  std::string keep_alive() const override { return ": alive\n\n"; }
  void cancel() override { cancelled = true; }
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

  std::atomic<bool> cancelled = false, aborted = false;
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
  std::thread thread;

  explicit Server(HttpOptions options = {}, bool signals = false) {
    options.port = 0;
    options.signals = signals;
    Result<std::unique_ptr<Listener>> bound = Listener::bind(options);
    listener = std::move(bound).value();
    thread = std::thread([this] {
      listener->run(handler, [this](Clock::time_point) { drained = handler.draining = true; });
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

bool healthy(const Server& server) {
  Client client(server);
  client.get("/health");
  return client.response().status == 200;
}

// What the server says to `bytes` on a connection of their own.
Response answer_to(const Server& server, const std::string& bytes) {
  Client client(server);
  client.send(bytes);
  return client.response();
}

// ---- Plain requests.

TEST(Http, KeepsAConnectionAndEchoesRequestIds) {
  Server server;
  Client client(server);
  client.post("/echo", "hello", "Content-Type: APPLICATION/json\r\nX-Request-Id: mine-1\r\n");
  const Response first = client.response();
  EXPECT_EQ(first.status, 200);
  EXPECT_EQ(first.body, "POST APPLICATION/json mine-1 5");
  EXPECT_EQ(first.headers.at("x-request-id"), "mine-1");
  EXPECT_EQ(first.headers.at("content-type"), "text/plain");
  EXPECT_EQ(first.headers.at("connection"), "keep-alive");
  client.get("/health", "x-request-id: " + std::string(129, 'x') + "\r\n");
  const Response second = client.response();
  EXPECT_EQ(second.body, R"({"status":"ok"})");
  EXPECT_EQ(second.headers.at("content-type"), "application/json");
  EXPECT_TRUE(second.headers.at("x-request-id").starts_with("req_"));
  EXPECT_EQ(second.headers.at("x-request-id").size(), 36u);
  client.get("/health", "x-request-id: two words\r\n");
  EXPECT_NE(client.response().headers.at("x-request-id"), second.headers.at("x-request-id"));
}

TEST(Http, HeadHasTheHeaderOfGetAndNoBody) {
  Server server;
  Client client(server);
  client.send("HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
  const Response head = client.response(true);
  client.get("/health");
  const Response get = client.response();
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.headers.at("content-length"), std::to_string(get.body.size()));
  EXPECT_EQ(get.status, 200) << "bytes of a body before the second answer";
  client.send("HEAD /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n");
  EXPECT_EQ(client.response(true).status, 404);
}

TEST(Http, Http10ClosesUnlessAsked) {
  Server server;
  Client closing(server);
  closing.send("GET /health HTTP/1.0\r\n\r\n");
  EXPECT_EQ(closing.response().headers.at("connection"), "close");
  EXPECT_TRUE(closing.ends());
  Client keeping(server);
  keeping.send("GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
  EXPECT_EQ(keeping.response().headers.at("connection"), "keep-alive");
  keeping.get("/health");
  EXPECT_EQ(keeping.response().status, 200);
}

TEST(Http, EmptyLinesBeforeARequestAreIgnored) {
  Server server;
  Client client(server);
  client.send("\r\n");
  client.send("\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n\r\n");
  EXPECT_EQ(client.response().status, 200);
  client.get("/health");
  EXPECT_EQ(client.response().status, 200);
}

TEST(Http, AHandlersExceptionIsAnInternalErrorAndTheConnectionGoesOn) {
  Server server;
  Client client(server);
  client.post("/throw", "{}");
  const Response failed = client.response();
  EXPECT_EQ(failed.status, 500);
  EXPECT_EQ(failed.headers.at("x-should-retry"), "false");
  EXPECT_EQ(failed.body.find("planted"), std::string::npos) << "what() is for the log";
  client.get("/health");
  EXPECT_EQ(client.response().status, 200);
  client.get("/throw/check");
  EXPECT_EQ(client.response().status, 500);
  EXPECT_TRUE(healthy(server));
}

// ---- The contract list: requests that are none.

struct Malformed {
  const char* name;
  std::string bytes;
  std::vector<int> statuses;
};

std::string many_headers() {
  std::string lines = "GET /health HTTP/1.1\r\nHost: localhost\r\n";
  for (int i = 0; i < 5000; ++i) lines += "a: b\r\n";
  return lines + "\r\n";
}

std::vector<Malformed> malformed_requests() {
  const std::string post = "POST /echo HTTP/1.1\r\nHost: localhost\r\n", get = "GET /health HTTP/1.1\r\n";
  const std::string host = "Host: localhost\r\n", chunked = post + "Transfer-Encoding: chunked\r\n\r\n";
  return {
      {"LengthAndChunked", post + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc", {400}},
      {"ChunkedAndLength", post + "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc", {400}},
      {"TwoLengths", post + "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", {400}},
      {"NegativeLength", post + "Content-Length: -1\r\n\r\n", {400}},
      {"TwentyDigitLength", post + "Content-Length: 99999999999999999999\r\n\r\n", {400}},
      {"NegativeChunk", chunked + "-2\r\nabc\r\n", {400}},
      {"ChunkNear2To64", chunked + "fffffffffffffff0\r\nabc", {413}},
      {"ChunkOver2To64", chunked + "fffffffffffffffff\r\nabc", {400}},
      {"ChunkWithoutLineEnd", chunked + "3\r\nabcdef\r\n", {400}},
      {"EndlessChunkExtension", chunked + "3;" + std::string(200'000, 'x'), {400}},
      {"HeaderOf64K", get + host + "X: " + std::string(64 << 10, 'x') + "\r\n\r\n", {431}},
      {"FiveThousandHeaders", many_headers(), {431}},
      {"TargetOf100K", "GET /" + std::string(100'000, 'x') + " HTTP/1.1\r\n" + host + "\r\n", {414}},
      {"TargetOf9K", "GET /" + std::string(9'000, 'x') + " HTTP/1.1\r\n" + host + "\r\n", {414}},
      {"NulInHeader", get + host + std::string("X: a\0b\r\n\r\n", 10), {400}},
      {"BareLineFeeds", "GET /health HTTP/1.1\nHost: localhost\n\n", {400, 505}},
      {"SpaceBeforeColon", get + "Host : localhost\r\n\r\n", {400}},
      {"Version9", "GET /health HTTP/9.9\r\n" + host + "\r\n", {505}},
      {"Version2Preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {505}},
      {"TlsHello", std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 and more \r\n\r\n", 25), {400}},
      {"NoHost", get + "\r\n", {400}},
      {"TwoHosts", get + host + host + "\r\n", {400}},
      {"EmptyHost", get + "Host:\r\n\r\n", {400}},
      {"HostWithPath", get + "Host: localhost/x\r\n\r\n", {400}},
      {"TransferCodingGzip", post + "Transfer-Encoding: gzip\r\n\r\n", {501}},
      {"TransferCodingGzipChunked", post + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", {501}},
      {"TransferCodingChunkedGzip", post + "Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", {400, 501}},
      {"TransferCodingTwice", post + "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", {501}},
      {"TransferCodingIn10", "POST /echo HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", {400}},
      {"GzipBody", post + "Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", {415}},
      {"Expectation", post + "Expect: 200-ok\r\nContent-Length: 3\r\n\r\nabc", {417}},
  };
}

TEST(Http, MalformedRequestsGetTheirStatusAndTheServerGoesOn) {
  Server server;
  for (const Malformed& request : malformed_requests()) {
    SCOPED_TRACE(request.name);
    Client client(server);
    client.send(request.bytes);
    const Response r = client.response();
    EXPECT_EQ(std::count(request.statuses.begin(), request.statuses.end(), r.status), 1) << r.status << r.body;
    EXPECT_TRUE(r.ended);
    EXPECT_NE(r.body.find("\"error\""), std::string::npos);
    EXPECT_EQ(r.headers.count("x-request-id"), 1u);
    client.shut_down_writing();
    client.ends();
    EXPECT_FALSE(client.was_reset());
  }
  EXPECT_TRUE(healthy(server));
}

TEST(Http, HeadersInManyPiecesMeetTheSameLimit) {
  Server server;
  Client client(server);
  client.send("GET /health HTTP/1.1\r\nHost: localhost\r\n");
  std::string line = "x: " + std::string(500, 'y') + "\r\n";
  bool open = true;
  for (int i = 0; i < 40 && open; ++i) {
    open = client.send(line);
    std::this_thread::sleep_for(milliseconds(2));
  }
  EXPECT_EQ(client.response().status, 431);
}

TEST(Http, CodingsAreNamedAndIdentityIsFine) {
  Server server;
  const std::string post = "POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n";
  EXPECT_NE(answer_to(server, post + "Content-Encoding: zstd\r\n\r\nabc").body.find("'zstd'"), std::string::npos);
  EXPECT_EQ(answer_to(server, post + "Content-Encoding: Identity\r\n\r\nabc").status, 200);
  EXPECT_EQ(answer_to(server,
                      "POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: Chunked\r\n\r\n"
                      "3;ext=1\r\nabc\r\n2\r\nde\r\n0\r\nTrailer: x\r\n\r\n")
                .body,
            "POST   5");
}

TEST(Http, AbsoluteTargetsNameTheHost) {
  Server server;
  EXPECT_EQ(answer_to(server, "GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n").status, 200);
  EXPECT_EQ(answer_to(server, "GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n").status, 403);
  EXPECT_EQ(answer_to(server, "GET //health HTTP/1.1\r\nHost: localhost\r\n\r\n").status, 404);
  EXPECT_EQ(answer_to(server, "GET /%2e%2e/health HTTP/1.1\r\nHost: localhost\r\n\r\n").status, 404);
}

// ---- Before the body.

TEST(Http, ABodyOverTheLimitIsRefusedByItsHeaderAlone) {
  HttpOptions options;
  options.max_body_bytes = 1 << 20;
  Server server(options);
  const std::string head = "POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: ";
  EXPECT_EQ(answer_to(server, head + "1048577\r\n\r\n").status, 413);
  EXPECT_EQ(answer_to(server, "POST /echo/small HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1001\r\n\r\n").status,
            413);
  EXPECT_EQ(answer_to(server, "POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048577\r\n\r\n").status,
            404);
  Client exact(server);
  exact.post("/echo", std::string(1 << 20, 'x'));
  EXPECT_EQ(exact.response().body, "POST   1048576");
}

TEST(Http, ChunksAreCountedWhileTheyCome) {
  Server server;
  Client client(server);
  client.send("POST /echo/small HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n");
  const std::string chunk = "fa\r\n" + std::string(250, 'x') + "\r\n";
  for (int i = 0; i < 5; ++i) client.send(chunk);  // never ended: the fifth is over
  EXPECT_EQ(client.response().status, 413);
  EXPECT_EQ(answer_to(server, "POST /echo/small HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" +
                                  chunk + chunk + chunk + chunk + "0\r\n\r\n")
                .status,
            200);
}

TEST(Http, ContinueIsSaidAfterTheCheckOnly) {
  Server server;
  Client client(server);
  const std::string expect = "Expect: 100-Continue\r\n";
  client.send("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n" + expect + "\r\n");
  const Response interim = client.response();
  EXPECT_EQ(interim.raw, "HTTP/1.1 100 Continue\r\n\r\n");
  EXPECT_EQ(server.handler.checks, 1);
  client.send("hello");
  EXPECT_EQ(client.response().body, "POST   5");
  for (const auto& [target, status] : std::map<std::string, int>{{"/nowhere", 404}, {"/stopped", 429}}) {
    const Response refused =
        answer_to(server, "POST " + target + " HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n" + expect + "\r\n");
    EXPECT_EQ(refused.status, status);
    EXPECT_EQ(refused.headers.at("connection"), "close");
  }
}

TEST(Http, AClientThatSendsEightMegabytesBeforeItReadsSeesTheRefusal) {
  Server server;
  for (const char* target : {"/stopped", "/echo/small"}) {
    Client client(server);
    const std::string body(8 << 20, 'x');
    EXPECT_TRUE(client.send("POST " + std::string(target) + " HTTP/1.1\r\nHost: localhost\r\nContent-Length: " +
                            std::to_string(body.size()) + "\r\n\r\n"));
    EXPECT_TRUE(client.send(body)) << "a reset while it was sending";
    const Response r = client.response();
    EXPECT_EQ(r.status, std::string(target) == "/stopped" ? 429 : 413);
    EXPECT_TRUE(r.ended);
    EXPECT_FALSE(client.was_reset());
  }
}

TEST(Http, LingeringIsBoundedInBytes) {
  HttpOptions options;
  options.max_linger_bytes = 1 << 20;
  Server server(options);
  Client client(server);
  client.send("POST /stopped HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n");
  const std::string piece(1 << 20, 'x');
  bool open = true;
  for (int i = 0; i < 900 && open; ++i) open = client.send(piece);
  EXPECT_FALSE(open) << "900 MB were read after a refusal";
}

TEST(Http, BodiesThatComeInAreBoundedTogether) {
  HttpOptions options;
  options.max_retained_bytes = 1'000'000;
  Server server(options);
  const auto post = [&] {
    Client client(server);
    client.post("/echo", std::string(900'000, 'x'));
    return client.response();
  };
  Client slow(server);
  slow.send("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n" + std::string(600'000, 'x'));
  EXPECT_TRUE(eventually([&] { return server.listener->stats().retained_bytes == 600'000; }));
  EXPECT_EQ(post().status, 503) << "while the other's bytes are held";
  slow.send(std::string(300'000, 'x'));
  EXPECT_EQ(slow.response().status, 200);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(post().status, 200) << "handed over, so no longer held";
}

// ---- Timers.

HttpTimes short_times() {
  HttpTimes times;
  times.idle = milliseconds(300);
  times.header = times.body_grace = milliseconds(200);
  return times;
}

TEST(Http, HalfARequestThenSilenceIs408) {
  HttpOptions options;
  options.times = short_times();
  Server server(options);
  Client header(server), body(server);
  header.send("GET /health HT");
  body.send("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nabc");
  for (Client* client : {&header, &body}) {
    const Response r = client->response();
    EXPECT_EQ(r.status, 408);
    EXPECT_NE(r.body.find("timeout_error"), std::string::npos);
    EXPECT_EQ(r.headers.at("connection"), "close");
    EXPECT_TRUE(client->ends());
  }
}

TEST(Http, AByteAtATimeIs408InHeaderAndBody) {
  HttpOptions options;
  options.times = short_times();
  Server server(options);
  const std::string body_head = "POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n";
  for (const std::string& start : {std::string("GET /health HTTP/1.1\r\nX: "), body_head}) {
    Client client(server);
    client.send(start);
    std::atomic<bool> stop = false;
    std::thread drip([&] {
      while (!stop && client.send("x")) std::this_thread::sleep_for(milliseconds(20));
    });
    EXPECT_EQ(client.response().status, 408);
    stop = true;
    drip.join();
  }
}

TEST(Http, ABodyEarnsItsTime) {
  HttpOptions options;
  const Clock::time_point start{};
  EXPECT_EQ(body_deadline(options, start, 0) - start, options.times.body_grace);
  EXPECT_EQ(body_deadline(options, start, 20'000) - start, options.times.body_grace + seconds(20));
  EXPECT_EQ(body_deadline(options, start, 1 << 30) - start, options.times.body);
}

TEST(Http, AnIdleConnectionIsClosedWithoutAWord) {
  HttpOptions options;
  options.times = short_times();
  Server server(options);
  Client silent(server), kept(server);
  kept.get("/health");
  EXPECT_EQ(kept.response().status, 200);
  EXPECT_TRUE(silent.ends());
  EXPECT_TRUE(kept.ends());
}

TEST(Http, ARequestThatEndsEarlyIsTold) {
  Server server;
  Client client(server);
  client.send("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nabc");
  client.shut_down_writing();
  EXPECT_EQ(client.response().status, 400);
  EXPECT_TRUE(client.ends());
}

// ---- Host and Origin.

TEST(HttpGuard, Authorities) {
  EXPECT_EQ(parse_authority("LocalHost:8000")->host, "localhost");
  EXPECT_EQ(parse_authority("[::1]:8000")->host, "::1");
  EXPECT_EQ(parse_authority("[0:0:0:0:0:0:0:1]")->host, "::1");
  EXPECT_EQ(parse_authority("name.")->host, "name");
  EXPECT_EQ(parse_authority("a:80")->port, "80");
  for (const char* bad : {"", ":80", "a b", "a:b", "a:123456", "[::1", "[x]", "[::1]80", "a/b", "user@host", "é"})
    EXPECT_FALSE(parse_authority(bad)) << bad;
}

TEST(HttpGuard, HostsAndOrigins) {
  const auto host = [](const HostGuard& guard, const char* name, const char* local = "127.0.0.1") {
    return guard.allows_host(*parse_authority(name), local);
  };
  const HostGuard loopback("127.0.0.1", {});
  for (const char* good : {"localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "127.0.0.2"})
    EXPECT_TRUE(host(loopback, good)) << good;
  for (const char* bad : {"evil.example", "10.0.0.1", "localhost.evil.example", "box.example.ts.net"})
    EXPECT_FALSE(host(loopback, bad)) << bad;
  const HostGuard named("127.0.0.1", {"Box.Example", "other:81"});
  EXPECT_TRUE(host(named, "box.example:9"));
  EXPECT_TRUE(host(named, "other:81"));
  EXPECT_FALSE(host(named, "other:82"));
  EXPECT_TRUE(host(HostGuard("0.0.0.0", {}), "anything.example")) << "its names are not known";
  const HostGuard open("0.0.0.0", {"box"});
  EXPECT_FALSE(host(open, "anything.example"));
  EXPECT_TRUE(host(open, "192.168.1.5:8000", "192.168.1.5")) << "the address the connection came in on";
  EXPECT_FALSE(host(open, "192.168.1.6:8000", "192.168.1.5"));
  EXPECT_TRUE(host(HostGuard("127.0.0.1", {"*"}), "evil.example"));

  const auto self = parse_authority("box.example:80");
  EXPECT_TRUE(loopback.allows_origin("http://localhost:3000", self));
  EXPECT_TRUE(loopback.allows_origin("http://box.example:80", self));
  EXPECT_FALSE(loopback.allows_origin("http://box.example:81", self));
  EXPECT_FALSE(loopback.allows_origin("https://evil.example", self));
  EXPECT_FALSE(loopback.allows_origin("null", self));
  EXPECT_TRUE(named.allows_origin("https://box.example", std::nullopt));
  EXPECT_TRUE(HostGuard("127.0.0.1", {"*"}).allows_origin("null", self));
}

TEST(Http, AStrangersNameIs403AndSaysWhatToDo) {
  Server server;
  const Response r = answer_to(server, "GET /health HTTP/1.1\r\nHost: evil.example:8000\r\n\r\n");
  EXPECT_EQ(r.status, 403);
  EXPECT_NE(r.body.find("evil.example"), std::string::npos);
  EXPECT_NE(r.body.find("--allowed-host"), std::string::npos);
  EXPECT_EQ(server.handler.checks, 0);
  EXPECT_EQ(answer_to(server, "GET /health HTTP/1.1\r\nHost: [::1]:8000\r\n\r\n").status, 200);
}

TEST(Http, PagesOfAllowedOriginsMayRead) {
  Server server;
  const std::string get = "GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: ";
  const Response local = answer_to(server, get + "http://localhost:3000\r\n\r\n");
  EXPECT_EQ(local.status, 200);
  EXPECT_EQ(local.headers.at("access-control-allow-origin"), "http://localhost:3000");
  EXPECT_EQ(local.headers.at("vary"), "Origin");
  for (const char* origin : {"https://evil.example", "null"}) {
    const Response refused = answer_to(server, get + origin + "\r\n\r\n");
    EXPECT_EQ(refused.status, 403);
    EXPECT_EQ(refused.headers.count("access-control-allow-origin"), 0u);
  }
  const std::string options =
      "OPTIONS /echo HTTP/1.1\r\nHost: localhost\r\nAccess-Control-Request-Method: POST\r\n"
      "Access-Control-Request-Headers: authorization,content-type,x-stainless-os\r\nOrigin: ";
  const Response preflight = answer_to(server, options + "http://127.0.0.1:5\r\n\r\n");
  EXPECT_EQ(preflight.status, 204);
  EXPECT_EQ(preflight.headers.at("access-control-allow-headers"), "authorization,content-type,x-stainless-os");
  EXPECT_NE(preflight.headers.at("access-control-allow-methods").find("POST"), std::string::npos);
  EXPECT_EQ(preflight.headers.count("content-length"), 0u);
  EXPECT_EQ(answer_to(server, options + "https://evil.example\r\n\r\n").status, 403);
  Client stream(server);
  stream.get("/stream", "Origin: http://localhost:1\r\n");
  server.handler.exchange()->push("data: 1\n\n", true);
  EXPECT_EQ(stream.response().headers.at("access-control-allow-origin"), "http://localhost:1");
  EXPECT_EQ(answer_to(server, "GET /nowhere HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n\r\n")
                .headers.at("access-control-allow-origin"),
            "http://localhost");
}

// ---- Answers that take time.

TEST(Http, StreamsArriveInPiecesAndTheConnectionGoesOn) {
  Server server;
  Client client(server);
  client.post("/stream", "{}");
  const auto exchange = server.handler.exchange();
  exchange->push("data: 1\n\n");
  EXPECT_TRUE(client.read_for("data: 1\n\n"));
  exchange->push("data: 2\n\n");
  EXPECT_TRUE(client.read_for("data: 2\n\n"));
  exchange->push("data: [DONE]\n\n", true);
  const Response r = client.response();
  EXPECT_EQ(r.body, "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n");
  EXPECT_TRUE(r.ended);
  EXPECT_EQ(r.headers.at("content-type"), "text/event-stream; charset=utf-8");
  EXPECT_TRUE(eventually([&] { return exchange->state == 1; }));
  EXPECT_FALSE(exchange->cancelled);
  client.get("/health");
  EXPECT_EQ(client.response().status, 200);
  EXPECT_EQ(exchange->closes, 1);
}

TEST(Http, AStreamOfHttp10IsEndedByTheConnection) {
  Server server;
  Client client(server);
  client.send("GET /stream HTTP/1.0\r\n\r\n");
  server.handler.exchange()->push("data: 1\n\n", true);
  const Response r = client.response();
  EXPECT_EQ(r.body, "data: 1\n\n");
  EXPECT_EQ(r.headers.count("transfer-encoding"), 0u);
  EXPECT_EQ(r.headers.at("connection"), "close");
}

TEST(Http, AReplyMayComeLateAndKeepsItsStatus) {
  Server server;
  Client client(server);
  client.post("/stream", "{}");
  server.handler.exchange()->finish(error_reply(Error{ErrorCode::overloaded, "full"}));
  EXPECT_EQ(client.response().status, 429);
  client.post("/wait", "{}");
  server.handler.exchange(1)->finish({200, "{}"});
  EXPECT_EQ(client.response().status, 200);
}

TEST(Http, SilenceCommitsAStreamAndFillsIt) {
  HttpOptions options;
  options.times.keep_alive = milliseconds(50);
  Server server(options);
  Client stream(server), plain(server);
  stream.post("/stream", "{}");
  EXPECT_TRUE(stream.read_for(": alive\n\n"));
  EXPECT_TRUE(stream.in_.starts_with("HTTP/1.1 200 OK\r\n"));
  EXPECT_TRUE(stream.read_until([](const std::string& in) {
    const size_t first = in.find(": alive");
    return first != std::string::npos && in.find(": alive", first + 1) != std::string::npos;
  }));
  const auto exchange = server.handler.exchange();
  exchange->push("data: 1\n\n", true);
  EXPECT_TRUE(stream.response().ended);
  plain.post("/wait", "{}");
  const auto waiting = server.handler.exchange(1);
  std::this_thread::sleep_for(milliseconds(200));
  EXPECT_TRUE(plain.in_.empty());
  waiting->finish({200, "{}"});
  EXPECT_EQ(plain.response().body, "{}");
}

TEST(Http, ReadyFromManyThreadsLosesNothing) {
  Server server;
  Client client(server);
  client.get("/stream");
  const auto exchange = server.handler.exchange();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 500; ++i) exchange->push("x");
    });
  for (std::thread& thread : threads) thread.join();
  exchange->push("", true);
  EXPECT_EQ(client.response().body, std::string(2000, 'x'));
}

TEST(Http, HeadOfAnEndlessAnswerEnds) {
  HttpOptions options;
  options.times.keep_alive = milliseconds(20);
  Server server(options);
  Client client(server);
  client.send("HEAD /stream HTTP/1.1\r\nHost: localhost\r\n\r\n");
  EXPECT_EQ(client.response(true).status, 200);
  EXPECT_TRUE(client.ends());
  EXPECT_TRUE(server.handler.exchange()->cancelled);
}

// ---- Clients that leave.

TEST(Http, AClientThatClosesDuringAPrefillCancelsIt) {
  Server server;
  for (const char* target : {"/wait", "/stream"}) {
    const size_t n = server.handler.count();
    Client client(server);
    client.post(target, "{}");
    const auto exchange = server.handler.exchange(n);
    client.close();
    EXPECT_TRUE(eventually([&] { return exchange->cancelled.load(); })) << target;
    EXPECT_TRUE(eventually([&] { return exchange->state == 2; }));
    EXPECT_EQ(exchange->closes, 1);
  }
}

TEST(Http, AnHttp10ClientThatClosesIsSeenToo) {
  Server server;
  Client client(server);
  client.send("POST /wait HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}");
  const auto exchange = server.handler.exchange();
  client.close();
  EXPECT_TRUE(eventually([&] { return exchange->cancelled.load(); }));
}

TEST(Http, ACloseIsSeenBehindStrayBytesAndPipelinedRequests) {
  Server server;
  const std::string next = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n";
  for (const std::string& stray : {std::string("\r\n"), std::string("x"), next, std::string(100'000, 'y')}) {
    const size_t n = server.handler.count();
    Client client(server);
    client.post("/wait", "{}");
    const auto exchange = server.handler.exchange(n);
    client.send(stray);
    std::this_thread::sleep_for(milliseconds(20));
    EXPECT_FALSE(exchange->cancelled) << "stray bytes are no close";
    client.close();
    EXPECT_TRUE(eventually([&] { return exchange->cancelled.load(); })) << stray.substr(0, 10);
  }
}

TEST(Http, AResetCancelsWithoutAProbe) {
  HttpOptions options;
  options.times.probe = seconds(1000);
  Server server(options);
  Client client(server);
  client.post("/wait", "{}");
  const auto exchange = server.handler.exchange();
  client.reset();
  EXPECT_TRUE(eventually([&] { return exchange->cancelled.load(); }));
}

TEST(Http, AHalfClosedClientGetsItsAnswer) {
  Server server;
  for (const char* version : {"HTTP/1.1", "HTTP/1.0"})
    for (const char* target : {"/wait", "/stream"}) {
      SCOPED_TRACE(std::string(version) + target);
      const size_t n = server.handler.count();
      Client client(server);
      client.send("POST " + std::string(target) + " " + version + "\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}");
      client.shut_down_writing();
      const auto exchange = server.handler.exchange(n);
      EXPECT_TRUE(client.read_for("H")) << "the probe";
      EXPECT_FALSE(exchange->cancelled);
      if (std::string(target) == "/wait")
        exchange->finish({201, "{\"answer\":1}"});
      else
        exchange->push("data: 1\n\n", true);
      const Response r = client.response();
      EXPECT_EQ(r.status, std::string(target) == "/wait" ? 201 : 200);
      EXPECT_TRUE(r.ended);
      EXPECT_TRUE(client.ends());
      EXPECT_TRUE(eventually([&] { return exchange->state == 1; }));
    }
}

TEST(Http, ProbesSpellTheStatusLine) {
  HttpOptions options;
  options.times.probe = milliseconds(1);
  Server server(options);
  Client client(server);
  client.post("/wait", "{}");
  client.shut_down_writing();
  const auto exchange = server.handler.exchange();
  EXPECT_TRUE(client.read_for("HTTP/1.1 "));  // all that can be said, after 2^9 ms
  exchange->finish({200, "{}"});
  EXPECT_EQ(client.response().body, "{}");
}

TEST(Http, AClientThatClosesAfterItsHalfCloseIsGone) {
  HttpOptions options;
  options.times.probe = milliseconds(20);
  Server server(options);
  Client client(server);
  client.post("/wait", "{}");
  client.shut_down_writing();
  const auto exchange = server.handler.exchange();
  EXPECT_TRUE(client.read_for("H"));
  EXPECT_FALSE(exchange->cancelled);
  client.close();
  EXPECT_TRUE(eventually([&] { return exchange->cancelled.load(); }));
}

TEST(Http, AHalfClosedStreamThatHasBegunIsProbedByComments) {
  Server server;
  Client client(server);
  client.get("/stream");
  const auto exchange = server.handler.exchange();
  exchange->push("data: 1\n\n");
  EXPECT_TRUE(client.read_for("data: 1"));
  client.shut_down_writing();
  EXPECT_TRUE(client.read_for(": alive"));
  exchange->push("data: 2\n\n", true);
  EXPECT_TRUE(client.response().ended);
}

TEST(Http, PipelinedRequestsAreServedInOrderAfterTheStream) {
  Server server;
  Client client(server);
  client.get("/stream");
  client.get("/health");
  client.get("/echo");
  const auto exchange = server.handler.exchange();
  exchange->push("data: 1\n\n");
  EXPECT_TRUE(client.read_for("data: 1"));
  EXPECT_FALSE(exchange->cancelled);
  exchange->push("data: 2\n\n", true);
  EXPECT_EQ(client.response().body, "data: 1\n\ndata: 2\n\n");
  EXPECT_EQ(client.response().body, R"({"status":"ok"})");
  EXPECT_TRUE(client.response().body.starts_with("GET"));
}

TEST(Http, AResetDuringAWriteIsSurvived) {
  Server server;
  Client client(server, "127.0.0.1", 4096);
  client.get("/stream");
  const auto exchange = server.handler.exchange();
  exchange->push(std::string(16 << 20, 'x'));  // more than any socket buffer
  EXPECT_TRUE(client.read_for("xxx"));
  client.reset();
  EXPECT_TRUE(eventually([&] { return exchange->cancelled.load(); }));
  EXPECT_TRUE(healthy(server));
}

TEST(Http, AClientThatStopsReadingIsDroppedAndOthersAreServed) {
  HttpOptions options;
  options.times.write_stall = milliseconds(300);
  Server server(options);
  Client client(server, "127.0.0.1", 4096);
  client.get("/stream");
  const auto exchange = server.handler.exchange();
  exchange->push(std::string(16 << 20, 'x'));
  EXPECT_TRUE(client.read_for("xxx"));
  const int takes = exchange->takes;
  EXPECT_TRUE(healthy(server));
  exchange->push("more");
  EXPECT_EQ(exchange->takes, takes) << "nothing is pulled while a write is in flight";
  EXPECT_TRUE(eventually([&] { return exchange->cancelled.load(); }));
  EXPECT_TRUE(healthy(server));
}

// ---- Many connections.

TEST(Http, IdleConnectionsGiveWayAndBusyOnesAreKept) {
  HttpOptions options;
  options.max_connections = 8;
  Server server(options);
  std::vector<std::unique_ptr<Client>> busy, idle;
  for (int i = 0; i < 4; ++i) {
    busy.push_back(std::make_unique<Client>(server));
    busy.back()->post("/wait", "{}");
  }
  const auto last = server.handler.exchange(3);
  for (int i = 0; i < 50; ++i) idle.push_back(std::make_unique<Client>(server));
  EXPECT_TRUE(healthy(server));
  EXPECT_TRUE(idle.front()->ends());
  EXPECT_GE(server.listener->stats().evicted, 40u);
  for (size_t i = 0; i < 4; ++i) server.handler.exchange(i)->finish({200, "{}"});
  for (const auto& client : busy) EXPECT_EQ(client->response().status, 200);
}

TEST(Http, OverTheCapWithNoneIdleIs503) {
  HttpOptions options;
  options.max_connections = 2;
  Server server(options);
  Client first(server), second(server);
  first.post("/wait", "{}");
  second.post("/wait", "{}");
  const auto exchange = server.handler.exchange(1);
  Client third(server);
  third.get("/health");
  const Response r = third.response();
  EXPECT_EQ(r.status, 503);
  EXPECT_EQ(r.headers.count("retry-after"), 1u);
  EXPECT_TRUE(third.ends());
  first.close();
  EXPECT_TRUE(eventually([&] { return server.listener->stats().connections <= 1; }));
  EXPECT_TRUE(healthy(server));
  EXPECT_FALSE(exchange->cancelled);
}

TEST(Http, NoDescriptorsLeftWaitsOnATimer) {
  HttpOptions options;
  options.times.accept_pause = milliseconds(50);
  Server server(options);
  EXPECT_TRUE(healthy(server));
  EXPECT_TRUE(eventually([&] { return server.listener->stats().connections == 0; }));
  rlimit before{};
  getrlimit(RLIMIT_NOFILE, &before);
  const int next = dup(0);
  close(next);
  const rlimit tight{static_cast<rlim_t>(next) + 1, before.rlim_max};  // the client's socket, and none to accept it
  setrlimit(RLIMIT_NOFILE, &tight);
  const auto start = Clock::now();
  Client client(server);
  client.get("/health");
  EXPECT_TRUE(eventually([&] { return server.listener->stats().accept_pauses >= 3; }));
  const uint64_t pauses = server.listener->stats().accept_pauses;
  const auto elapsed = Clock::now() - start;
  setrlimit(RLIMIT_NOFILE, &before);
  EXPECT_LE(pauses, static_cast<uint64_t>(elapsed / options.times.accept_pause) + 2) << "accept spins";
  EXPECT_EQ(client.response().status, 200) << "it is served when there are descriptors again";
}

// A thousand silent connections, and a body of 32 MB on its way in a hostile shape (one-byte chunks among them): health
// is answered between its pieces. The slowest answers are reported, not judged: the machine is shared.
TEST(Http, HealthIsAnsweredWhileLargeBodiesComeInAndManyAreIdle) {
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  const int idle_count = files.rlim_max >= 3000 ? 1000 : 100;
  Server server;
  std::vector<std::unique_ptr<Client>> idle;
  for (int i = 0; i < idle_count; ++i) idle.push_back(std::make_unique<Client>(server));
  std::atomic<bool> stop = false;
  std::atomic<int> bodies = 0;
  std::vector<std::thread> senders;
  for (const bool chunked : {false, true})
    senders.emplace_back([&, chunked] {
      std::string body = std::string(32 << 20, '[');
      if (chunked) {
        std::string pieces;
        for (int i = 0; i < 1'000'000; ++i) pieces += "1\r\n[\r\n";
        body = pieces + "0\r\n\r\n";
      }
      while (!stop) {
        Client client(server);
        client.send("POST /echo HTTP/1.1\r\nHost: localhost\r\n" +
                    (chunked ? "Transfer-Encoding: chunked" : "Content-Length: " + std::to_string(body.size())) +
                    "\r\n\r\n");
        client.send(body);
        if (client.response().status == 200) ++bodies;
      }
    });
  std::vector<double> ms;
  Client client(server);
  while (ms.size() < 100 || (bodies < 2 && ms.size() < 100'000)) {
    const auto start = Clock::now();
    client.get("/health");
    ASSERT_EQ(client.response().status, 200);
    ms.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  }
  stop = true;
  for (std::thread& sender : senders) sender.join();
  EXPECT_GE(bodies, 2);
  EXPECT_EQ(server.listener->stats().evicted, 0u);
  std::sort(ms.begin(), ms.end());
  RecordProperty("health_p99_ms", std::to_string(ms[ms.size() * 99 / 100]));
  std::printf("health p50 %.2f ms, p99 %.2f ms, of %zu\n", ms[ms.size() / 2], ms[ms.size() * 99 / 100], ms.size());
}

// ---- The address, and the ends.

TEST(HttpListener, WrongAddressesAreRefusedBeforeAnythingElse) {
  for (const char* host : {"nosuch.invalid", "", "10.0.0", "[::1", "::1]"}) {
    HttpOptions options;
    options.host = host;
    const auto bound = Listener::bind(options);
    ASSERT_FALSE(bound) << host;
    EXPECT_EQ(bound.error().code, ErrorCode::invalid_argument);
    EXPECT_EQ(bound.error().field, "--host");
  }
  HttpOptions foreign;
  foreign.host = "203.0.113.1";  // of nobody's machine
  foreign.port = 0;
  const auto bound = Listener::bind(foreign);
  ASSERT_FALSE(bound);
  EXPECT_EQ(bound.error().code, ErrorCode::io);
  EXPECT_NE(bound.error().message.find("203.0.113.1"), std::string::npos);
  HttpOptions names;
  names.allowed_hosts = {"http://x"};
  EXPECT_FALSE(Listener::bind(names));
  EXPECT_EQ(*listen_address("localhost"), "127.0.0.1");
  EXPECT_EQ(*listen_address("[::1]"), "::1");
  EXPECT_EQ(*listen_address("::"), "::");
}

TEST(HttpListener, APortInUseIsNamed) {
  Server server;
  HttpOptions options;
  options.port = server.listener->port();
  options.signals = false;
  const auto second = Listener::bind(options);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, ErrorCode::io);
  EXPECT_NE(second.error().message.find(std::to_string(options.port)), std::string::npos);
  EXPECT_EQ(server.listener->url(), "http://127.0.0.1:" + std::to_string(options.port));
}

TEST(HttpListener, AnIdleServerDrainsAtOnce) {
  HttpOptions options;
  options.drain = seconds(1000);
  Server server(options);
  Client idle(server), kept(server);
  kept.get("/health");
  EXPECT_EQ(kept.response().status, 200);
  server.listener->drain();
  EXPECT_TRUE(eventually([&] { return server.ended.load(); }));
  EXPECT_TRUE(server.drained);
  EXPECT_TRUE(idle.ends());
}

TEST(HttpListener, ADrainLetsAnswersEndAndHealthSaysSo) {
  HttpOptions options;
  options.drain = seconds(1000);
  Server server(options);
  Client client(server);
  client.get("/stream");
  const auto exchange = server.handler.exchange();
  server.listener->drain();
  server.listener->drain();  // is no stop()
  EXPECT_TRUE(eventually([&] { return server.drained.load(); }));
  EXPECT_EQ(answer_to(server, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").status, 503);
  EXPECT_FALSE(server.ended);
  exchange->push("data: 1\n\n", true);
  const Response r = client.response();
  EXPECT_EQ(r.body, "data: 1\n\n");
  EXPECT_TRUE(r.ended);
  EXPECT_TRUE(eventually([&] { return server.ended.load(); }));
  EXPECT_FALSE(exchange->cancelled);
  EXPECT_EQ(exchange->state, 1);
}

TEST(HttpListener, AnswersEndWithAnErrorWhenTheDrainIsOver) {
  HttpOptions options;
  options.drain = milliseconds(100);
  Server server(options);
  Client stream(server), begun(server), plain(server);
  stream.get("/stream");
  server.handler.exchange(0);
  begun.get("/stream");
  server.handler.exchange(1)->push("data: 1\n\n");
  EXPECT_TRUE(begun.read_for("data: 1"));
  plain.get("/wait");
  const auto waiting = server.handler.exchange(2);
  server.listener->drain();
  for (Client* client : {&stream, &begun}) {
    const Response r = client->response();
    EXPECT_EQ(r.status, 200);
    EXPECT_TRUE(r.ended);
    EXPECT_TRUE(r.body.ends_with("data: [DONE]\n\n")) << r.body;
    EXPECT_NE(r.body.find("shutting down"), std::string::npos);
  }
  EXPECT_EQ(plain.response().status, 503);
  EXPECT_TRUE(eventually([&] { return server.ended.load(); }));
  EXPECT_TRUE(waiting->aborted);
}

TEST(HttpListener, AClientThatTakesNothingDoesNotHoldTheEnd) {
  HttpOptions options;
  options.drain = options.times.flush = milliseconds(100);
  Server server(options);
  Client client(server, "127.0.0.1", 4096);
  client.get("/stream");
  const auto exchange = server.handler.exchange();
  exchange->push(std::string(16 << 20, 'x'));
  EXPECT_TRUE(client.read_for("xxx"));
  server.listener->drain();
  EXPECT_TRUE(eventually([&] { return server.ended.load(); }));
  EXPECT_TRUE(exchange->cancelled);
}

TEST(HttpListener, AStopCancelsAndNothingCallsBackAfterwards) {
  std::shared_ptr<FakeExchange> exchange;
  {
    Server server;
    Client client(server);
    client.get("/stream");
    exchange = server.handler.exchange();
    server.listener->stop();
    EXPECT_TRUE(eventually([&] { return server.ended.load(); }));
    EXPECT_TRUE(exchange->cancelled);
    EXPECT_EQ(exchange->state, 2);
  }
  exchange->push("data: late\n\n");  // its listener is gone
}

TEST(HttpListener, TheFirstSignalDrainsAndTheSecondEnds) {
  HttpOptions options;
  options.drain = seconds(1000);
  for (const int signal : {SIGTERM, SIGINT}) {
    Server server(options, true);
    Client client(server);
    client.get("/wait");
    const auto exchange = server.handler.exchange();
    kill(getpid(), signal);
    EXPECT_TRUE(eventually([&] { return server.drained.load(); }));
    EXPECT_FALSE(exchange->cancelled);
    EXPECT_FALSE(server.ended);
    kill(getpid(), signal);
    EXPECT_TRUE(eventually([&] { return server.ended.load(); }));
    EXPECT_TRUE(exchange->cancelled);
  }
}

TEST(HttpListener, ASignalBeforeServingIsHeard) {
  HttpOptions options;
  options.port = 0;
  auto listener = std::move(Listener::bind(options)).value();
  kill(getpid(), SIGTERM);
  FakeHandler handler;
  bool drained = false;
  listener->run(handler, [&](Clock::time_point) { drained = true; });  // returns
  EXPECT_TRUE(drained);
}

TEST(HttpListener, Ipv6IsServed) {
  HttpOptions options;
  options.host = "::";
  options.port = 0;
  options.signals = false;
  if (!Listener::bind(options)) GTEST_SKIP() << "no IPv6 here";
  Server server(options);
  EXPECT_TRUE(healthy(server)) << ":: serves IPv4 too";
}

TEST(HttpErrors, EveryCodeHasItsStatusAndCountsAreFields) {
  const std::map<ErrorCode, int> statuses = {{ErrorCode::invalid_argument, 400},
                                             {ErrorCode::context_length, 400},
                                             {ErrorCode::unsupported, 400},
                                             {ErrorCode::not_found, 501},
                                             {ErrorCode::corrupt, 500},
                                             {ErrorCode::out_of_memory, 503},
                                             {ErrorCode::overloaded, 429},
                                             {ErrorCode::unavailable, 503},
                                             {ErrorCode::deadline, 504},
                                             {ErrorCode::cancelled, 503},
                                             {ErrorCode::io, 500},
                                             {ErrorCode::internal, 500}};
  for (const auto& [code, status] : statuses) EXPECT_EQ(error_reply(Error{code, "x"}).status, status);
  const Reply full = error_reply(
      Error{ErrorCode::context_length, "too \xff long", "messages", {{"n_prompt_tokens", 9}, {"n_ctx", 8}}});
  EXPECT_EQ(full.body,
            "{\"error\":{\"message\":\"too \xef\xbf\xbd long\",\"type\":\"invalid_request_error\","
            "\"param\":\"messages\",\"code\":\"context_length_exceeded\",\"n_prompt_tokens\":9,\"n_ctx\":8}}");
  EXPECT_EQ(error_reply(Error{ErrorCode::overloaded, "x"}).headers.front().first, "Retry-After");
}

}  // namespace
}  // namespace thermocline::server
