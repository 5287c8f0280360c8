// The APIs: errors on the way, cancels, and what stands beside them: keys, ids, the access log, the prep pool.
#include "runtime/server/prep_pool.h"
#include "runtime/server/wire/ids.h"
#include "tests/server/api_fixture.h"

namespace thermocline::server {
namespace {

// --- errors on the way ---

TEST_F(ApiTest, ErrorsBeforeTheFirstByteAreStatuses) {
  backend.script = [](const Request&, RequestHandle& handle) {
    put_end(handle, 0, FinishReason::error, {ErrorCode::deadline, "the request's time is over"});
  };
  const Answer answer = streamed(kText, {{"prompt", "a"}});
  EXPECT_EQ(answer.status, 504);
  EXPECT_EQ(answer.error().at("code"), "deadline_exceeded");
}

TEST_F(ApiTest, ErrorsAfterTheFirstByteAreEvents) {
  backend.script = nullptr;
  const auto client = begin({{"prompt", {"a", "b"}}, {"stream", true}});
  const std::shared_ptr<RequestHandle> first = backend.await(0), second = backend.await(1);
  put_token(*first, 0, 5, "Hello");
  client->follow([](const Answer& answer) { return !answer.stream.empty(); });
  put_token(*first, 0, 5, " there");
  put_end(*first, 0, FinishReason::error, {ErrorCode::internal, "a device has failed"});
  client->follow();
  const std::vector<Json> events = client->answer.events();
  ASSERT_EQ(events.size(), 3u) << client->answer.stream;
  EXPECT_EQ(events[1].at("choices")[0].at("text"), " there") << "what came before the error is not lost";
  EXPECT_EQ(events[2].at("error").at("message"), "a device has failed");
  EXPECT_TRUE(second->cancelled()) << "the other prompt goes with it";
  client->close();
  EXPECT_EQ(log_lines().back().at("error"), "internal");
}

TEST_F(ApiTest, AServersEndIsToldToo) {
  backend.script = nullptr;
  const Error stopping{ErrorCode::unavailable, "the server is stopping"};
  for (const bool stream : {false, true}) {
    backend.handles.clear();
    const auto client = begin({{"prompt", "a"}, {"stream", stream}});
    const std::shared_ptr<RequestHandle> handle = backend.await(0);
    if (stream) put_token(*handle, 0, 5, "Hello");
    if (stream) client->follow([](const Answer& answer) { return !answer.stream.empty(); });
    const Exchange::Output out = client->exchange().abort(stopping);
    EXPECT_TRUE(out.finished);
    if (stream) {
      EXPECT_NE(out.bytes.find("the server is stopping"), std::string::npos);
      EXPECT_TRUE(out.bytes.ends_with("data: [DONE]\n\n"));
    } else {
      EXPECT_EQ(out.reply.value().status, 503);
    }
    // Prep may still be about to hand it over: it is cancelled then.
    api.reset();
    EXPECT_TRUE(handle->cancelled());
    api = std::make_unique<Api>(Api::Options{}, *log);
    api->serve(model);
  }
}

// Once a sign of life has committed the status line, a refusal can only be an event.
TEST_F(ApiTest, ARefusalAfterASignOfLifeIsAnEvent) {
  Gate gate;
  backend.on_submit = [&] { gate.pass(); };
  backend.refusal = Error{ErrorCode::overloaded, "the queue is full"};
  const auto client = begin({{"prompt", "a"}, {"stream", true}});
  gate.await_arrival();
  EXPECT_TRUE(client->exchange().streams());
  EXPECT_TRUE(client->exchange().keep_alive().starts_with(":"));
  gate.open();
  client->follow();
  const std::vector<Json> events = client->answer.events();
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].at("error").at("code"), "queue_full");
}

TEST_F(ApiTest, WhatThrowsIsAnInternalError) {
  backend.on_submit = [] { throw std::runtime_error("planted"); };
  const Answer answer = post(kText, {{"prompt", "a"}});
  EXPECT_EQ(answer.status, 500);
  EXPECT_EQ(answer.body.find("planted"), std::string::npos) << "that is for the log";
  backend.on_submit = nullptr;
  EXPECT_EQ(post(kText, {{"prompt", "a"}}).status, 200);
  EXPECT_EQ(backend.counters->waiting().requests, 0);
}

TEST_F(ApiTest, BrokenTemplatesAreTheServersFault) {
  model.constants = Error{ErrorCode::corrupt, "encoding_dsv4.py: TOOLS_TEMPLATE is missing"};
  const Answer answer = chat({});
  EXPECT_EQ(answer.status, 500);
  EXPECT_NE(answer.body.find("encoding_dsv4.py"), std::string::npos);
  EXPECT_EQ(post(kText, {{"prompt", "a"}}).status, 200);
}

// --- cancels ---

TEST_F(ApiTest, ACancelEndsEveryState) {
  Gate gate;
  backend.script = nullptr;
  backend.on_submit = [&] { gate.pass(); };
  const auto handed_over = begin({{"prompt", "first"}});  // holds the only prep thread
  gate.await_arrival();
  const auto waiting = begin({{"prompt", "second"}});
  EXPECT_EQ(backend.counters->waiting().requests, 2);
  for (const auto* client : {&handed_over, &waiting}) {
    (*client)->exchange().cancel();
    (*client)->exchange().cancel();
    (*client)->close(false);
  }
  gate.open();
  const auto running = begin({{"prompt", "third"}});
  const std::shared_ptr<RequestHandle> first = backend.await(0), third = backend.await(1);
  EXPECT_TRUE(first->cancelled()) << "cancelled while it was handed over";
  EXPECT_FALSE(third->cancelled());
  running->exchange().cancel();
  api.reset();  // prep is over
  EXPECT_TRUE(third->cancelled());
  ASSERT_EQ(backend.requests.size(), 2u) << "the second was never submitted";
  EXPECT_TRUE(text_of(backend.requests[1]).ends_with("third"));
  put_end(*third, 0, FinishReason::cancelled);
  running->follow();
  running->exchange().cancel();
  EXPECT_EQ(backend.counters->waiting().requests, 0);
  EXPECT_EQ(backend.counters->waiting().bytes, 0);
  EXPECT_EQ(log_lines()[0].at("finish"), "cancelled");
}

// --- names ---

TEST(Keys, NameWithoutTelling) {
  const auto name = [](const std::string& authorization, const std::string& api_key) {
    HttpHead head;
    head.authorization = authorization;
    head.api_key = api_key;
    return key_name(head);
  };
  EXPECT_EQ(name("", ""), "");
  EXPECT_EQ(name("Bearer ", ""), "");
  EXPECT_EQ(name("Bearer secret", ""), name("", "secret"));
  EXPECT_EQ(name("bearer   secret", ""), name("Bearer secret", ""));
  EXPECT_NE(name("Bearer secret", ""), name("Bearer secreu", ""));
  EXPECT_EQ(name("Bearer secret", "").find("secret"), std::string::npos);
  EXPECT_LT(name("Bearer " + std::string(100'000, 'x'), "").size(), 32u);
}

TEST(Ids, NeverRepeat) {
  std::set<std::string> ids;
  for (int i = 0; i < 1000; ++i) ids.insert(random_id("cmpl-"));
  EXPECT_EQ(ids.size(), 1000u);
  EXPECT_TRUE(ids.begin()->starts_with("cmpl-"));
  EXPECT_EQ(ids.begin()->find_first_not_of("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-"),
            std::string::npos);
}

TEST_F(ApiTest, TheAccessLogHasALineARequest) {
  backend.script = [](const Request& request, RequestHandle& handle) {
    put_token(handle, 0, 5, "the answer's words");
    put_end(handle, 0, FinishReason::length, {},
            {.prompt_tokens = static_cast<int64_t>(request.prompt.size()),
             .completion_tokens = 1,
             .cached_tokens = 1,
             .queue_seconds = 0.001,
             .prefill_seconds = 0.002,
             .decode_seconds = 0.003});
  };
  HttpHead head = head_of("POST", "/v1/completions?x=1\n{\"id\":\"forged\"}");
  head.authorization = "Bearer the secret";
  ask_with(head, R"({"prompt":"the prompt's words"})");
  chat({{"temperature", "hot"}});
  get("/v1/nothing");
  get("/health");  // a probe
  post_text(kText, "{");
  const std::vector<Json> lines = log_lines();
  ASSERT_EQ(lines.size(), 4u);
  const Json& line = lines[0];
  EXPECT_EQ(line.at("id"), "req-1");
  EXPECT_EQ(line.at("key"), key_name(head));
  EXPECT_EQ(line.at("method"), "POST");
  EXPECT_EQ(line.at("path"), head.target);
  EXPECT_EQ(line.at("status"), 200);
  EXPECT_EQ(line.at("prompt_tokens"), static_cast<int64_t>(last().prompt.size()));
  EXPECT_EQ(line.at("cached_tokens"), 1);
  EXPECT_EQ(line.at("completion_tokens"), 1);
  EXPECT_EQ(line.at("queue_ms"), 1);
  EXPECT_EQ(line.at("prefill_ms"), 2);
  EXPECT_EQ(line.at("decode_ms"), 3);
  EXPECT_EQ(line.at("finish"), "length");
  EXPECT_EQ(line.at("error"), "");
  EXPECT_EQ(lines[1].at("status"), 400);
  EXPECT_EQ(lines[1].at("error"), "invalid_value");
  EXPECT_EQ(lines[2].at("status"), 404);
  EXPECT_EQ(lines[2].at("error"), "not_found");
  EXPECT_EQ(lines[3].at("error"), "invalid_json");
  const std::string text = read_text_file(folder.path() / "access.jsonl", 1 << 20).value();
  for (const char* secret : {"words", "secret"}) EXPECT_EQ(text.find(secret), std::string::npos) << secret;
}

// Of a request whose client has gone: as the engine told its end, or up to now where it has not yet.
TEST_F(ApiTest, TheAccessLogHasTheTimesOfWhatWasCancelled) {
  using std::chrono::milliseconds;
  for (const bool told : {false, true}) {
    const auto base = std::chrono::steady_clock::now();
    backend.script = [&](const Request&, RequestHandle& handle) {
      const auto now = std::chrono::steady_clock::now();
      handle.note_admitted(now + milliseconds(20));
      handle.note_admitted(now + milliseconds(90));  // another choice
      handle.note_first_token(now + milliseconds(50));
      put_token(handle, 0, 100, "one");
    };
    const auto client = begin({{"prompt", "a"}, {"stream", true}});
    client->follow([](const Answer& answer) { return !answer.stream.empty(); });
    EXPECT_FALSE(client->exchange().ended());
    if (told)
      put_end(*backend.await(1), 0, FinishReason::cancelled, {},
              {.queue_seconds = 0.001, .prefill_seconds = 0.002, .decode_seconds = 0.003});
    else
      std::this_thread::sleep_until(base + milliseconds(70));
    EXPECT_EQ(client->exchange().ended(), told) << "whether anybody took it or not";
    client->close(false);
  }
  const std::vector<Json> lines = log_lines();
  ASSERT_EQ(lines.size(), 2u);
  for (const Json& line : lines) EXPECT_EQ(line.at("finish"), "cancelled");
  EXPECT_GE(lines[0].at("queue_ms"), 20);
  EXPECT_EQ(lines[0].at("prefill_ms"), 30);
  EXPECT_GT(lines[0].at("decode_ms"), 0);
  EXPECT_LT(lines[0].at("decode_ms"), lines[0].at("total_ms"));
  EXPECT_EQ(lines[1].at("queue_ms"), 1);
  EXPECT_EQ(lines[1].at("prefill_ms"), 2);
  EXPECT_EQ(lines[1].at("decode_ms"), 3);
}

TEST(AccessLog, AFileThatCannotBeOpenedIsNamed) {
  const auto log = AccessLog::open("/proc/nowhere/access.jsonl");
  ASSERT_FALSE(log);
  EXPECT_NE(log.error().message.find("/proc/nowhere/access.jsonl"), std::string::npos);
}

TEST(PrepPool, RunsEverythingAndWaits) {
  for (const int threads : {0, 1}) {
    std::atomic<int> count = 0;
    PrepPool pool(threads);
    for (int i = 0; i < 200; ++i)
      pool.run([&] {
        if (++count % 100 == 0) throw std::runtime_error("planted");
      });
    pool.wait();
    EXPECT_EQ(count, 200);
  }
}

TEST(PrepPool, RunsNothingOnTheCallersThread) {
  PrepPool pool(1);
  Gate gate;
  std::thread::id there;
  pool.run([&] {
    there = std::this_thread::get_id();
    gate.pass();
  });
  gate.await_arrival();  // this thread came back while the task stands still
  gate.open();
  pool.wait();
  EXPECT_NE(there, std::this_thread::get_id());
}

}  // namespace
}  // namespace thermocline::server
