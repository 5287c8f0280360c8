// The transport: answers that take time, and clients that leave during them.
#include "tests/server/http_fixture.h"

namespace thermocline::server {
namespace {

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
  EXPECT_EQ(r.headers.at("cache-control"), "no-cache");
  EXPECT_EQ(r.headers.at("x-accel-buffering"), "no");
  EXPECT_TRUE(r.headers.at("x-request-id").starts_with("req_"));
  EXPECT_EQ(r.headers.at("request-id"), r.headers.at("x-request-id")) << "where Anthropic's client looks";
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

}  // namespace
}  // namespace thermocline::server
