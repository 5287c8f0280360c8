// /v1/stats, /v1/experts, /v1/plan and /metrics over a scripted engine.
#include <cstring>

#include "tests/server/api_fixture.h"

namespace thermocline::server {
namespace {

class StatsTest : public ApiTest {
 protected:
  Json stats() {
    const Answer answer = get("/v1/stats");
    EXPECT_EQ(answer.status, 200);
    return answer.json();
  }
  std::string metrics() { return get("/metrics").body; }
  /// The value of a series as it is written; nothing where there is none.
  std::string value(const std::string& series) {
    const std::string text = "\n" + metrics();
    const size_t at = text.find("\n" + series + " ");
    if (at == std::string::npos) return "";
    const size_t begin = at + series.size() + 2;
    return text.substr(begin, text.find('\n', begin) - begin);
  }
  std::shared_ptr<Exchange> watch() {
    return std::get<std::shared_ptr<Exchange>>(api->handle({head_of("GET", "/v1/stats?stream=1"), ""}));
  }
  static size_t pictures(const Answer& answer) {
    size_t count = 0;
    for (size_t at = answer.stream.find("data: {"); at != std::string::npos; at = answer.stream.find("data: {", at + 1))
      ++count;
    return count;
  }
};

TEST_F(StatsTest, SayWhatTheEngineSays) {
  EngineStats& s = backend.counted;
  s.prompt_tokens = 70;
  s.kept_tokens = 20;
  s.fetched_tokens = 10;
  s.admitted_tokens = 100;
  s.answer_tokens = 50;
  s.kv_tokens_used = 256;
  s.kv_tokens_total = 8192;
  s.experts.slots = 8;
  s.experts.fills = 3;
  s.measures.resident_experts = 4;
  s.measures.experts.pairs[0][1][0] = 30;
  s.measures.experts.pairs[1][0][2] = 10;
  s.recent = {10, {.prompt_tokens = 40, .answer_tokens = 20, .read_bytes = 3'000'000'000, .step_seconds = 2}};
  s.forecast.steps = 2;
  s.forecast.measured.total = 3e9;
  s.forecast.predicted.total = 2e9;
  s.forecast.measured[sched::Phase::attention] = 1e9;
  backend.tiers = {{"ram", 1000, {{"kv", 100, 40}}}};
  backend.stream = 3e9;
  const Json j = stats();
  EXPECT_EQ(j["model"], "org/demo");
  EXPECT_EQ(j["state"], "ready");
  EXPECT_FALSE(j.contains("progress"));
  EXPECT_EQ(j["requests"]["running"], 3);
  EXPECT_EQ(j["requests"]["waiting"], 2);
  EXPECT_EQ(j["tokens"], (Json{{"prompt_total", 100},
                               {"cached_total", 30},
                               {"answer_total", 50},
                               {"prompt_per_second", 4.0},
                               {"answer_per_second", 2.0}}));
  EXPECT_EQ(j["kv"]["tokens_used"], 256);
  EXPECT_EQ(j["kv"]["hit_rate"], .3);
  EXPECT_EQ(
      j["tiers"],
      Json::parse(R"([{"tier":"ram","capacity_bytes":1000,"parts":[{"kind":"kv","bytes":100,"used_bytes":40}]}])"));
  EXPECT_EQ(
      j["experts"],
      (Json{{"hit_rate", .75}, {"gpu", 30}, {"cpu", 10}, {"slots", 4}, {"slots_total", 8}, {"installs_total", 3}}));
  EXPECT_EQ(j["speed"]["read_bytes_per_second"], 1.5e9);
  EXPECT_EQ(j["speed"]["share"], .5);
  EXPECT_EQ(j["forecast"]["steps"], 2);
  EXPECT_EQ(j["forecast"]["measured_seconds"], 3.0);
  EXPECT_EQ(j["forecast"]["phases"],
            Json::parse(R"([{"phase":"attention","measured_seconds":1.0,"predicted_seconds":0.0}])"));
}

TEST_F(StatsTest, WhatIsNotKnownIsNull) {
  const Json j = stats();
  EXPECT_TRUE(j["latency"]["ttft_ms"]["p50"].is_null());
  EXPECT_TRUE(j["latency"]["tpot_ms"]["p95"].is_null());
  EXPECT_TRUE(j["kv"]["hit_rate"].is_null());
  EXPECT_TRUE(j["experts"]["hit_rate"].is_null());
  EXPECT_TRUE(j["speed"]["stream_bytes_per_second"].is_null());
  EXPECT_TRUE(j["speed"]["share"].is_null());
  EXPECT_EQ(j["speed"]["read_bytes_per_second"], 0.0);
  EXPECT_EQ(j["forecast"]["steps"], 0);
}

TEST_F(StatsTest, RequestsAreShownWhileTheyRunAndAfterwards) {
  backend.script = [](const Request&, RequestHandle& handle) { put_token(handle, 0, 100, "Hello"); };
  const auto client = begin({{"prompt", "a b c"}, {"stream", true}});
  client->follow([](const Answer& a) { return !a.stream.empty(); });
  Json j = stats();
  ASSERT_EQ(j["requests"]["active"].size(), 1u);
  const Json active = j["requests"]["active"][0];
  EXPECT_EQ(active["id"], "req-1");
  EXPECT_EQ(active["path"], kText);
  EXPECT_EQ(active["completion_tokens"], 1);
  EXPECT_GT(active["prompt_tokens"], 0);
  EXPECT_TRUE(active["phase"] == "waiting" || active["phase"] == "prefill" || active["phase"] == "decode") << active;
  EXPECT_TRUE(j["requests"]["recent"].empty());
  put_token(*backend.await(0), 0, 101, " you");
  put_end(*backend.await(0), 0, FinishReason::stop, {},
          {.cached_tokens = 2, .queue_seconds = .5, .decode_seconds = .25});
  client->follow();
  client->close();
  (void)get("/v1/models");  // looking is not a request
  j = stats();
  EXPECT_TRUE(j["requests"]["active"].empty());
  ASSERT_EQ(j["requests"]["recent"].size(), 1u);
  const Json recent = j["requests"]["recent"][0];
  EXPECT_EQ(recent["status"], 200);
  EXPECT_EQ(recent["finish"], "stop");
  EXPECT_EQ(recent["cached_tokens"], 2);
  EXPECT_EQ(recent["completion_tokens"], 2);
  EXPECT_EQ(recent["queue_ms"], 500.0);
  EXPECT_EQ(recent["tpot_ms"], 250.0) << "one token after the first";
  EXPECT_EQ(j["latency"]["tpot_ms"]["p50"], 250.0);
  EXPECT_GT(j["latency"]["ttft_ms"]["p95"], 0.0);
}

TEST_F(StatsTest, OfOthersOnlyAdminsSeeRequests) {
  ASSERT_TRUE(
      api->keys().load({.keys = {"secret-one", "secret-two"}, .admin_keys = {"secret-chief"}, .file = ""}).ok());
  const auto as = [](HttpHead head, const std::string& key) {
    head.authorization = "Bearer secret-" + key;
    return head;
  };
  const std::string body = R"({"prompt":"hello","max_tokens":1})";
  EXPECT_EQ(ask_with(as(head_of("POST", kText, body), "one"), body).status, 200);
  const auto recent = [&](const std::string& key) {
    return ask_with(as(head_of("GET", "/v1/stats"), key), "").json()["requests"]["recent"].size();
  };
  EXPECT_EQ(recent("one"), 1u);
  EXPECT_EQ(recent("two"), 0u);
  EXPECT_EQ(recent("chief"), 1u);
  for (const char* path : {"/v1/stats", "/v1/stats?stream=1", "/v1/experts", "/v1/plan", "/metrics"})
    EXPECT_EQ(get(path).status, 401) << path;
  EXPECT_EQ(ask_with(as(head_of("GET", "/metrics"), "two"), "").status, 200);
}

TEST_F(StatsTest, AStreamShowsPicturesUntilTheServerDrains) {
  Client client(watch());
  EXPECT_TRUE(client.exchange().streams());
  client.follow([](const Answer& a) { return pictures(a) >= 3; });  // ticks, nobody else wakes it
  EXPECT_NE(client.answer.stream.find("\"state\":\"ready\""), std::string::npos);
  api->drain();
  client.follow();
  client.close();
  const std::string last = client.answer.stream.substr(client.answer.stream.rfind("data: ") + 6);
  EXPECT_EQ(parse_json(last).value()["state"], "draining");
  EXPECT_TRUE(client.answer.stream.ends_with("\n\n"));
}

TEST_F(StatsTest, AStreamThatIsGoneIsForgotten) {
  std::weak_ptr<Exchange> gone;
  {
    Client client(watch());
    client.follow([](const Answer& a) { return pictures(a) >= 1; });
    gone = std::static_pointer_cast<Exchange>(watch());
  }
  Client other(watch());
  other.follow([](const Answer& a) { return pictures(a) >= 3; });
  EXPECT_TRUE(gone.expired());
}

TEST_F(StatsTest, FaultsAndLoadingShow) {
  backend.now = {EngineHealth::State::failed, "a device is gone"};
  Json j = stats();
  EXPECT_EQ(j["state"], "failed");
  EXPECT_EQ(j["reason"], "a device is gone");
  EXPECT_EQ(value("thermocline_ready"), "0");

  Api loading({.prep_threads = 1}, *log);
  loading.loading(.25);
  const auto ask = [&](const char* path) { return std::get<Reply>(loading.handle({head_of("GET", path), ""})); };
  for (const char* path : {"/v1/stats", "/metrics", "/v1/experts", "/v1/plan"})
    EXPECT_FALSE(loading.check(head_of("GET", path)).has_value()) << path;
  j = parse_json(ask("/v1/stats").body).value();
  EXPECT_EQ(j["state"], "loading");
  EXPECT_EQ(j["progress"], .25);
  EXPECT_EQ(j["kv"]["tokens_total"], 0);
  const Reply text = ask("/metrics");
  EXPECT_EQ(text.status, 200);
  EXPECT_NE(text.body.find("thermocline_loaded_ratio 0.25"), std::string::npos) << text.body;
  EXPECT_EQ(ask("/v1/experts").status, 503);
  EXPECT_EQ(ask("/v1/plan").status, 503);
}

TEST_F(StatsTest, ExpertsAsNumbersAndAsBytes) {
  backend.map = {2, 3, {0, 5, 10, 1, 70000, 255}, {0, 1, 2, .5, 8, 4}, {1, 0, 0, 0, 1, 0}};
  const Json j = get("/v1/experts").json();
  EXPECT_EQ(j["layers"], 2);
  EXPECT_EQ(j["experts"], 3);
  EXPECT_EQ(j["first_layer"], 0);
  EXPECT_EQ(j["tiers"], Json::parse(R"(["gcc","cgc"])"));
  EXPECT_EQ(j["use"], Json::parse("[[0,32,64],[16,255,128]]"));
  EXPECT_EQ(j["tokens"], Json::parse("[[0,5,10],[1,70000,255]]"));
  const Answer raw = get("/v1/experts?fmt=u16");
  EXPECT_EQ(raw.headers.at("Content-Type"), "application/octet-stream");
  ASSERT_EQ(raw.body.size(), 2u * 2 * 3);
  const auto count = [&](size_t i) {
    return static_cast<unsigned char>(raw.body[2 * i]) + 256 * static_cast<unsigned char>(raw.body[2 * i + 1]);
  };
  EXPECT_EQ(count(4), 65535) << "scaled to what fits";
  EXPECT_EQ(count(5), 255 * 65535 / 70000);
  EXPECT_EQ(get("/v1/experts?fmt=png").status, 400);
  EXPECT_EQ(get("/v1/experts?fmt=png").param(), "fmt");
}

TEST_F(StatsTest, ThePlanIsWhatTheServerWasGiven) {
  EXPECT_EQ(get("/v1/plan").status, 404);
  model.plan = R"({"fits":true})";
  EXPECT_EQ(get("/v1/plan").body, model.plan);
}

TEST_F(StatsTest, RequestsAreCountedByOutcomeAndPath) {
  backend.script = saying({"Hello", " there"}, FinishReason::length);
  EXPECT_EQ(chat({{"max_tokens", 7}}).status, 200);
  backend.script = saying({"Hello"});
  EXPECT_EQ(post(kText, {{"prompt", "a"}}).status, 200);
  EXPECT_EQ(post(kText, {{"prompt", 5}}).status, 400);
  const auto left = begin({{"prompt", "a"}});
  left->close(false);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(get("/nowhere/" + std::to_string(i)).status, 404);
  const auto outcome = [&](const char* name) {
    return value(std::string("thermocline_requests_total{outcome=\"") + name + "\"}");
  };
  EXPECT_EQ(outcome("length"), "1");
  EXPECT_EQ(outcome("stop"), "1");
  EXPECT_EQ(outcome("rejected"), "1");
  EXPECT_EQ(outcome("abort_client"), "1");
  EXPECT_EQ(outcome("error"), "0");
  EXPECT_EQ(value("thermocline_request_generation_tokens_sum"), "3");
  EXPECT_EQ(value("thermocline_request_max_num_generation_tokens_sum"), "23") << "7, and the 16 of completions";
  const auto http = [&](const std::string& handler, int status) {
    return value("thermocline_http_requests_total{handler=\"" + handler + "\",status=\"" + std::to_string(status) +
                 "\"}");
  };
  EXPECT_EQ(http(kChat, 200), "1");
  EXPECT_EQ(http(kText, 200), "1");
  EXPECT_EQ(http(kText, 400), "1");
  EXPECT_EQ(http("other", 404), "5") << "a path of a client's is no series";
  EXPECT_EQ(metrics().find("nowhere"), std::string::npos);
}

TEST_F(StatsTest, ErrorsAndTheEndAreOutcomesOfTheirOwn) {
  backend.script = [](const Request&, RequestHandle& handle) {
    put_end(handle, 0, FinishReason::error, {ErrorCode::internal, "a fault"});
  };
  EXPECT_EQ(post(kText, {{"prompt", "a"}}).status, 500);
  backend.script = nullptr;
  const auto running = begin({{"prompt", "a"}});
  (void)backend.await(1);
  api->drain();
  running->exchange().abort({ErrorCode::unavailable, "the server is shutting down"});
  running->close();
  EXPECT_EQ(value("thermocline_requests_total{outcome=\"error\"}"), "1");
  EXPECT_EQ(value("thermocline_requests_total{outcome=\"abort_shutdown\"}"), "1");
}

TEST_F(StatsTest, WaitingRequestsSayWhy) {
  backend.script = nullptr;
  const auto waiting = begin({{"prompt", "a"}});
  (void)backend.await(0);
  while (value("thermocline_requests_waiting{reason=\"queued\"}") != "1") std::this_thread::yield();
  EXPECT_EQ(value("thermocline_requests_waiting{reason=\"preparing\"}"), "0");
  waiting->exchange().cancel();
  waiting->close(false);
  EXPECT_EQ(value("thermocline_requests_waiting{reason=\"queued\"}"), "0");
}

}  // namespace
}  // namespace thermocline::server
