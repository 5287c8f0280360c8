// The transport: what is a request and what is none, before its body, in time, from whom.
#include "runtime/server/http/guard.h"
#include "tests/server/http_fixture.h"

namespace thermocline::server {
namespace {

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

// Where the body of an unknown coding ends nobody knows: what follows may be another's request.
TEST(Http, AnUnknownTransferCodingEndsItsConnection) {
  Server server;
  Client client(server);
  client.send(
      "POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n"
      "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
  const Response refused = client.response();
  EXPECT_EQ(refused.status, 501);
  EXPECT_EQ(refused.headers.at("connection"), "close");
  EXPECT_TRUE(client.ends());
}

// What the transport refuses is told in the words of the API that was asked.
TEST(Http, RefusalsAreShapedByTheHandler) {
  const Server server;
  for (const auto& [lines, status] : {std::pair("Host: evil.example\r\n", 403),
                                      {"Host: a b\r\n", 400},
                                      {"Host: localhost\r\nOrigin: http://evil.example\r\n", 403},
                                      {"Host: localhost\r\nContent-Encoding: gzip\r\n", 415},
                                      {"Host: localhost\r\nTransfer-Encoding: gzip\r\n", 501},
                                      {"Host: localhost\r\nExpect: cake\r\n", 417}}) {
    Response refused = answer_to(server, std::string("POST /echo HTTP/1.1\r\n") + lines + "\r\n");
    EXPECT_EQ(refused.status, status) << lines;
    EXPECT_EQ(refused.headers["x-shaped-for"], "/echo") << lines;
  }
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
  EXPECT_FALSE(loopback.allows_origin("http://localhost:3000", self)) << "another page of this machine";
  EXPECT_TRUE(loopback.allows_origin("http://box.example:80", self));
  EXPECT_FALSE(loopback.allows_origin("http://box.example:81", self));
  EXPECT_FALSE(loopback.allows_origin("https://evil.example", self));
  EXPECT_FALSE(loopback.allows_origin("null", self));
  EXPECT_FALSE(named.allows_origin("https://box.example", std::nullopt)) << "a name of the server is no grant";
  EXPECT_FALSE(HostGuard("127.0.0.1", {"*"}).allows_origin("null", self));
  const HostGuard listed("127.0.0.1", {}, {"http://LocalHost:3000", "https://ui.example"});
  EXPECT_TRUE(listed.allows_origin("http://localhost:3000", self));
  EXPECT_TRUE(listed.allows_origin("https://ui.example", self));
  for (const char* other : {"http://localhost:3001", "https://localhost:3000", "http://ui.example", "null",
                            "https://ui.example.evil.example", "https://ui.example:444"})
    EXPECT_FALSE(listed.allows_origin(other, self)) << other;
  EXPECT_TRUE(HostGuard("127.0.0.1", {}, {"*"}).allows_origin("null", self));
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
  HttpOptions with;
  with.cors_origins = {"http://localhost:3000", "http://127.0.0.1:5", "http://localhost:1"};
  Server server(with);
  const std::string get = "GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: ";
  const Response local = answer_to(server, get + "http://localhost:3000\r\n\r\n");
  EXPECT_EQ(local.status, 200);
  EXPECT_EQ(local.headers.at("access-control-allow-origin"), "http://localhost:3000");
  EXPECT_EQ(local.headers.at("vary"), "Origin");
  for (const char* origin : {"https://evil.example", "null", "nonsense", "http://localhost:3001"}) {
    const Response refused = answer_to(server, get + origin + "\r\n\r\n");
    EXPECT_EQ(refused.status, 403);
    EXPECT_NE(refused.body.find("--cors-origin"), std::string::npos);
    const bool advised = refused.body.find(std::string("start it with --cors-origin ") + origin) != std::string::npos;
    EXPECT_EQ(advised, is_origin(origin)) << "what the option takes, and nothing else";
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

}  // namespace
}  // namespace thermocline::server
