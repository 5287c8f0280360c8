// The APIs: what a request may say of history, reasoning and time, and what of an answer is as clients count on it.
#include "tests/server/api_fixture.h"

namespace thermocline::server {
namespace {

const Json kFunction = Json::parse(R"([{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}])");

TEST_F(ApiTest, EffortsAreThoseOfTheModel) {
  const auto prompt = [&](const char* effort) {
    EXPECT_EQ(chat({{"reasoning_effort", effort}}).status, 200) << effort;
    return text_of(last());
  };
  EXPECT_EQ(prompt("none"), prompt("minimal"));
  EXPECT_EQ(prompt("medium"), prompt("high"));
  EXPECT_EQ(prompt("xhigh"), prompt("max"));
  EXPECT_EQ(std::set<std::string>({prompt("none"), prompt("high"), prompt("max")}).size(), 3u);
  EXPECT_EQ(prompt("low").find(prompt("none")), std::string::npos) << "it thinks";
}

TEST_F(ApiTest, HistoriesOfAllShapes) {
  const auto prompt = [&](const char* messages) {
    const Answer answer = chat({{"messages", Json::parse(messages)}});
    EXPECT_EQ(answer.status, 200) << answer.body;
    return text_of(last());
  };
  const std::string all = prompt(R"([{"role":"system","content":"Rules."},{"role":"developer","content":"More rules."},
    {"role":"user","content":[{"type":"text","text":"One"},{"type":"text","text":"two"}]},
    {"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":"{\"x\":7}"}}]},
    {"role":"tool","tool_call_id":"c","content":"Result."},{"role":"assistant","content":"First."},
    {"role":"assistant","content":"Second."},{"role":"user","content":"And?"}])");
  size_t at = 0;
  for (const char* part : {"Rules.", "More rules.", "One", "two", "f", "7", "Result.", "First.", "Second.", "And?"}) {
    at = all.find(part, at);
    ASSERT_NE(at, std::string::npos) << part << " in " << all;
  }
}

TEST_F(ApiTest, ReasoningIsReplayedUnderBothNamesAndNeverRequired) {
  const auto prompt = [&](Json assistant) {
    assistant["role"] = "assistant";
    assistant["content"] = nullptr;
    assistant["tool_calls"] = Json::parse(R"([{"id":"c","type":"function","function":{"name":"f","arguments":"{}"}}])");
    Json messages = kHello;
    messages.push_back(assistant);
    messages.push_back({{"role", "tool"}, {"tool_call_id", "c"}, {"content", "done"}});
    EXPECT_EQ(chat({{"messages", messages}, {"tools", kFunction}, {"thinking", {{"type", "enabled"}}}}).status, 200);
    return text_of(last());
  };
  const std::string thought = prompt({{"reasoning_content", "I thought of it."}});
  EXPECT_NE(thought.find("I thought of it."), std::string::npos) << "between calls it is part of the prompt";
  EXPECT_EQ(prompt({{"reasoning", "I thought of it."}}), thought);
  EXPECT_EQ(prompt(Json::object()).find("I thought"), std::string::npos);
}

TEST_F(ApiTest, ABudgetOfReasoningIsThatOfTheRequestOrTheServers) {
  const Json thinks = {{"thinking", {{"type", "enabled"}}}};
  const auto budget = [&](Json fields) {
    EXPECT_EQ(chat(std::move(fields)).status, 200);
    return std::pair(last().reasoning_budget, last().reasoning_end);
  };
  const int32_t end = *test::demo_tokenizer().id_of("</think>");
  Json limited = thinks;
  limited["thinking_token_budget"] = 5;
  EXPECT_EQ(budget(limited), std::pair(int64_t{5}, end));
  EXPECT_EQ(budget(thinks).first, -1);
  model.reasoning_budget = 9;
  EXPECT_EQ(budget(thinks), std::pair(int64_t{9}, end));
  EXPECT_EQ(budget(limited).first, 5);
  EXPECT_EQ(budget({{"thinking_token_budget", 5}}), std::pair(int64_t{-1}, -1)) << "nothing is thought";
  EXPECT_EQ(chat({{"thinking_token_budget", -3}}).param(), "thinking_token_budget");
  const Json messages = {{"messages", kHello}, {"thinking", {{"type", "enabled"}, {"budget_tokens", 7}}}};
  EXPECT_EQ(post("/v1/messages", messages).status, 200);
  EXPECT_EQ(last().reasoning_budget, 7);
}

TEST_F(ApiTest, TheServersTimeIsEveryRequests) {
  model.request_timeout = std::chrono::seconds(100);
  const auto seconds = [&](const Json& fields) {
    EXPECT_EQ(chat(fields).status, 200);
    return std::chrono::duration<double>(last().deadline - Request::Clock::now()).count();
  };
  EXPECT_NEAR(seconds(Json::object()), 100, 30);
  EXPECT_NEAR(seconds({{"timeout", 1000}}), 100, 30) << "a client cannot have more";
  EXPECT_LT(seconds({{"timeout", 10}}), 11);
}

// However many tokens come at once: clients measure the time between tokens by events.
TEST_F(ApiTest, EveryTokenIsAnEventAndTheFirstHasTheRole) {
  backend.script = saying({"a", "b", "c", "d"});
  const std::vector<Json> events = streamed(kChat, {{"stream_options", {{"include_usage", true}}}}).events();
  ASSERT_EQ(events.size(), 6u);
  for (const char* same : {"id", "created", "model", "system_fingerprint", "object"})
    for (const Json& event : events) EXPECT_EQ(event.at(same), events[0].at(same)) << same;
  EXPECT_EQ(events[0].at("choices")[0].at("delta"), Json({{"role", "assistant"}, {"content", "a"}}));
  for (size_t i = 1; i < 4; ++i) EXPECT_EQ(events[i].at("choices")[0].at("delta").size(), 1u);
  EXPECT_EQ(events[4].at("choices")[0].at("delta"), Json::object());
  EXPECT_EQ(events[4].at("choices")[0].at("finish_reason"), "stop");
  EXPECT_TRUE(events[5].at("choices").empty());
  EXPECT_EQ(events[5].at("usage").at("completion_tokens"), 4);
}

TEST_F(ApiTest, ReasoningMayHaveBothNames) {
  backend.script = saying({"why", "</think>", "so"});
  const Json thinks = {{"thinking", {{"type", "enabled"}}}};
  EXPECT_FALSE(chat(thinks).json().at("choices")[0].at("message").contains("reasoning"));
  model.reasoning_twice = true;
  const Json message = chat(thinks).json().at("choices")[0].at("message");
  EXPECT_EQ(message.at("reasoning"), "why");
  EXPECT_EQ(message.at("reasoning_content"), "why");
  const Json delta = streamed(kChat, thinks).events()[0].at("choices")[0].at("delta");
  EXPECT_EQ(delta.at("reasoning"), "why");
  EXPECT_EQ(delta.at("reasoning_content"), "why");
}

TEST_F(ApiTest, ProgressIsToldWhereItIsAskedFor) {
  backend.script = [](const Request& request, RequestHandle& handle) {
    for (const int64_t processed : {3, 7}) {
      if (!request.report_progress) break;
      TokenEvent event;
      event.kind = TokenEvent::Kind::progress;
      event.processed_tokens = processed;
      event.stats = {.prompt_tokens = 9, .cached_tokens = 3, .prefill_seconds = .25};
      handle.stream().push(std::move(event));
    }
    put_token(handle, 0, 100, "x");
    put_end(handle, 0, FinishReason::stop, {}, {.cached_tokens = 3});
  };
  for (const auto& [path, fields] : {std::pair(kChat, Json::object()), {kText, Json({{"prompt", "a"}})}}) {
    Json asked = fields;
    asked["return_progress"] = true;
    const std::vector<Json> events = streamed(path, asked).events();
    ASSERT_GE(events.size(), 3u) << path;
    for (size_t i = 0; i < 2; ++i) EXPECT_TRUE(events[i].at("choices").empty()) << "no token for whoever counts them";
    EXPECT_EQ(events[1].at("prompt_progress"), Json({{"total", 9}, {"cache", 3}, {"processed", 7}, {"time_ms", 250}}));
    EXPECT_EQ(events[0].at("object"), events[2].at("object"));
    for (const Json& event : streamed(path, fields).events()) EXPECT_FALSE(event.contains("prompt_progress"));
    Json whole = asked;
    if (!whole.contains("prompt")) whole["messages"] = kHello;
    EXPECT_EQ(post(path, whole).status, 200);
    EXPECT_FALSE(last().report_progress) << "a reply has no place for it";
  }
}

TEST_F(ApiTest, AnswersSayHowLongTheyTook) {
  for (Answer answer : {chat({}), streamed(kChat, {})})
    EXPECT_GE(std::stoi(answer.headers.at("openai-processing-ms")), 0);
  EXPECT_FALSE(post("/v1/messages", {{"messages", kHello}}).headers.contains("openai-processing-ms"));
}

}  // namespace
}  // namespace thermocline::server
