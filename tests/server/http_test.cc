#include <sys/stat.h>
// The transport: many connections, the address, and how a listener ends.
#include "runtime/server/http/port_holder.h"
#include "tests/server/http_fixture.h"
#include "tests/support/fixtures.h"

namespace thermocline::server {
namespace {

// ---- The port.

TEST(Http, APortInUseSaysWhoHasIt) {
  Server server;
  HttpOptions options;
  options.signals = false;
  options.port = server.listener->port();
  const auto second = Listener::bind(options);
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.error().field, "--port");
  EXPECT_NE(second.error().message.find("(pid " + std::to_string(getpid()) + ")"), std::string::npos)
      << second.error().message;
}

TEST(Http, WhoHoldsAPortIsUnknownWhereProcDoesNotTell) {
  const Server server;
  EXPECT_NE(port_holder(server.listener->port()), "");
  EXPECT_EQ(port_holder(server.listener->port(), "/no/such/proc"), "");
  EXPECT_EQ(port_holder(1), "");
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

// An answer that is made and that nobody takes, in whatever state, holds a drain for times.flush; one that is not made
// yet for as long as it may.
TEST(HttpListener, AStalledClientOfAnAnswerThatIsMadeHoldsADrainForAFlush) {
  HttpOptions options;
  options.drain = seconds(1000);
  options.times.flush = milliseconds(100);
  options.times.write_stall = 2 * kPatience;
  const std::string much(16 << 20, 'x');
  const std::vector<std::function<void(FakeExchange&)>> ends = {[](FakeExchange& e) { e.made = true; },
                                                                [&](FakeExchange& e) { e.push(much, true); },
                                                                [&](FakeExchange& e) {
                                                                  e.finish({200, much});
                                                                },
                                                                [&](FakeExchange& e) { e.push(much); }};
  for (size_t i = 0; i < ends.size(); ++i) {
    Server server(options);
    Client client(server, "127.0.0.1", 4096);
    client.get(i == 2 ? "/wait" : "/stream");
    const auto exchange = server.handler.exchange();
    if (i == 0) exchange->push(much);
    ends[i](*exchange);
    EXPECT_TRUE(client.read_for("xxx"));
    server.listener->drain();
    if (i == 3) {
      EXPECT_TRUE(eventually([&] { return server.drained.load(); }));
      std::this_thread::sleep_for(3 * options.times.flush);
      EXPECT_FALSE(server.ended);
      exchange->made = true;  // behind what is not taken: no ready() goes with it
    }
    EXPECT_TRUE(eventually([&] { return server.ended.load(); })) << i;
    EXPECT_EQ(exchange->state, 2);
  }
}

// Its socket is not writable for a long time, as much of a large buffer has to be free for that.
TEST(HttpListener, AClientThatTakesLittleByLittleIsNoStalledOne) {
  HttpOptions options;
  options.drain = seconds(1000);
  options.times.flush = milliseconds(200);
  Server server(options);
  Client client(server, "127.0.0.1", 4096);
  client.get("/wait");
  const auto exchange = server.handler.exchange();
  exchange->finish({200, std::string(16 << 20, 'x')});
  EXPECT_TRUE(client.read_for("xxx"));
  server.listener->drain();
  const auto end = Clock::now() + 8 * options.times.flush;
  for (size_t bytes = 4096; Clock::now() < end; bytes += 4096) {
    ASSERT_TRUE(client.read_until([&](const std::string& in) { return in.size() >= bytes; })) << bytes;
    std::this_thread::sleep_for(milliseconds(20));
  }
  EXPECT_FALSE(server.ended);
  EXPECT_TRUE(eventually([&] { return server.ended.load(); })) << "it takes nothing any more";
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
  const auto header = [](ErrorCode code, const char* name) {
    for (const auto& [one, value] : error_reply(Error{code, "x"}).headers)
      if (one == name) return value;
    return std::string();
  };
  for (const ErrorCode again : {ErrorCode::overloaded, ErrorCode::unavailable, ErrorCode::out_of_memory})
    EXPECT_GT(std::stoi(header(again, "Retry-After")), 0);
  for (const ErrorCode never : {ErrorCode::internal, ErrorCode::io, ErrorCode::corrupt, ErrorCode::deadline})
    EXPECT_EQ(header(never, "x-should-retry"), "false");
  const Reply full = error_reply(
      Error{ErrorCode::context_length, "too \xff long", "messages", {{"n_prompt_tokens", 9}, {"n_ctx", 8}}});
  EXPECT_EQ(full.body,
            "{\"error\":{\"message\":\"too \xef\xbf\xbd long\",\"type\":\"invalid_request_error\","
            "\"param\":\"messages\",\"code\":\"context_length_exceeded\",\"n_prompt_tokens\":9,\"n_ctx\":8}}");
  EXPECT_EQ(error_reply(Error{ErrorCode::overloaded, "x"}).headers.front().first, "Retry-After");
}

TEST(Http, AHangupReloadsAndServesOn) {
  Server server({}, true);
  EXPECT_TRUE(healthy(server));
  for (int times = 1; times <= 2; ++times) {
    kill(getpid(), SIGHUP);
    eventually([&] { return server.hangups == times; });
    EXPECT_TRUE(healthy(server));
  }
  EXPECT_FALSE(server.drained);
}

// ---- Unix sockets.

TEST(Http, AUnixSocketServesItsOwnerAndGroup) {
  const test::TempDir folder;
  const std::string path = (folder.path() / "thermocline.sock").string();
  HttpOptions options;
  options.host = "unix:" + path;
  {
    Server server(options);
    EXPECT_EQ(server.listener->url(), "unix:" + path);
    EXPECT_EQ(server.listener->port(), 0);
    struct stat info {};
    ASSERT_EQ(stat(path.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0660u);
    Client client(path);
    client.send("GET /health HTTP/1.1\r\nHost: anything.example\r\n\r\n");  // no browser gets here
    EXPECT_EQ(client.response().status, 200);
    Client stream(path);
    stream.get("/stream");
    server.handler.exchange()->push("data: 1\n\n", true);
    EXPECT_EQ(stream.response().body, "data: 1\n\n");
    Client gone(path);
    gone.get("/stream");
    const auto exchange = server.handler.exchange(1);
    gone.close();
    eventually([&] { return exchange->cancelled.load(); });
    const auto second = Listener::bind(options);
    ASSERT_FALSE(second);
    EXPECT_NE(second.error().message.find("another server listens there"), std::string::npos);
  }
  EXPECT_FALSE(std::filesystem::exists(path)) << "it goes with its server";
}

TEST(Http, ASocketThatACrashLeftIsTakenOver) {
  const test::TempDir folder;
  const std::string path = (folder.path() / "left.sock").string();
  const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  path.copy(to.sun_path, sizeof(to.sun_path) - 1);
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)), 0);
  close(fd);
  HttpOptions options;
  options.host = "unix:" + path;
  Server server(options);
  Client client(path);
  client.get("/health");
  EXPECT_EQ(client.response().status, 200);
}

TEST(Http, PathsThatAreNoSocketAreRefused) {
  for (const std::string& host :
       {std::string("unix:"), std::string("unix:relative"), "unix:/" + std::string(200, 'x')}) {
    const auto refused = listen_address(host);
    ASSERT_FALSE(refused) << host;
    EXPECT_EQ(refused.error().field, "--host");
  }
  HttpOptions options;
  options.host = "unix:/nowhere/at/all.sock";
  const auto refused = Listener::bind(options);
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().message.find("/nowhere/at/all.sock"), std::string::npos);
}

TEST(Http, ATaskRunsUntilTheListenerEnds) {
  FakeHandler handler;
  HttpOptions options;
  options.port = 0;
  options.signals = false;
  const std::unique_ptr<Listener> listener = std::move(Listener::bind(options)).value();
  std::atomic<int> runs = 0;
  listener->every(milliseconds(5), [&] { ++runs; });
  std::thread thread([&] { listener->run(handler, {}); });
  EXPECT_TRUE(eventually([&] { return runs >= 4; }));
  listener->stop();
  thread.join();
  const int last = runs;
  std::this_thread::sleep_for(milliseconds(50));
  EXPECT_EQ(runs, last);
}

}  // namespace
}  // namespace thermocline::server
