// Anthropic's /v1/messages: how bodies become prompts, and answers events in their order.
#include "runtime/server/api/anthropic_translation.h"
#include "tests/server/api_fixture.h"

namespace thermocline::server {
namespace {

constexpr const char* kMessages = "/v1/messages";

/// The events of a stream: their names, and their data.
std::vector<std::pair<std::string, Json>> named_events(const std::string& stream) {
  std::vector<std::pair<std::string, Json>> events;
  for (size_t at = 0; at < stream.size();) {
    const size_t end = stream.find("\n\n", at), line = stream.find('\n', at);
    EXPECT_TRUE(stream.compare(at, 7, "event: ") == 0 && stream.compare(line + 1, 6, "data: ") == 0) << stream;
    events.emplace_back(stream.substr(at + 7, line - at - 7),
                        parse_json(stream.substr(line + 7, end - line - 7)).value());
    EXPECT_EQ(events.back().first, events.back().second.at("type"));
    at = end + 2;
  }
  return events;
}

Json ask(const std::string& text) {
  return {{"max_tokens", 100}, {"messages", Json::array({Json{{"role", "user"}, {"content", text}}})}};
}

class MessagesTest : public ApiTest {
 protected:
  std::string prompt_of(const Json& body) {
    const Answer answer = post(kMessages, body);
    EXPECT_EQ(answer.status, 200) << answer.body;
    return text_of(last());
  }
  std::string refused(const Json& body, const std::string& words) {
    const Answer answer = post(kMessages, body);
    EXPECT_EQ(answer.status, 400) << dump_json(body);
    EXPECT_EQ(answer.json().at("type"), "error");
    EXPECT_EQ(answer.json().at("request_id"), "req-1");
    EXPECT_EQ(answer.error().at("type"), "invalid_request_error");
    const std::string message = answer.error().at("message");
    EXPECT_NE(message.find(words), std::string::npos) << message;
    return message;
  }
};

TEST_F(MessagesTest, AnAnswerIsAMessageWithUsage) {
  const Answer answer = post(kMessages, ask("Hello"));
  const Json body = answer.json();
  EXPECT_EQ(body.at("type"), "message");
  EXPECT_EQ(body.at("role"), "assistant");
  EXPECT_TRUE(body.at("id").get<std::string>().starts_with("msg_"));
  EXPECT_EQ(body.at("content"), Json::parse(R"([{"type":"text","text":"Hello there"}])"));
  EXPECT_EQ(body.at("stop_reason"), "end_turn");
  EXPECT_TRUE(body.at("stop_sequence").is_null());
  EXPECT_EQ(body.at("usage").at("input_tokens"), static_cast<int64_t>(last().prompt.size()));
  EXPECT_EQ(body.at("usage").at("output_tokens"), 2);
  EXPECT_FALSE(body.contains("timings"));
  EXPECT_EQ(last().max_tokens, 100);
}

TEST_F(MessagesTest, CachedTokensCountOnceAndFromTheStart) {
  backend.script = saying_behind_cached(3);
  Json body = ask("Hello");
  const Json usage = post(kMessages, body).json().at("usage");
  const int64_t prompt = static_cast<int64_t>(last().prompt.size());
  EXPECT_EQ(usage.at("cache_read_input_tokens"), 3);
  EXPECT_EQ(usage.at("input_tokens"), prompt - 3);
  body["stream"] = true;
  const auto events = named_events(post(kMessages, body).stream);
  EXPECT_EQ(events.front().second.at("message").at("usage").at("cache_read_input_tokens"), 3);
  EXPECT_EQ(events.at(events.size() - 2).second.at("usage").at("cache_read_input_tokens"), 3);
}

TEST_F(MessagesTest, AStreamHasTheOrderThatClientsCountOn) {
  const std::string dsml = test::demo_prose().dsml_token;
  backend.script = saying(characters_of("because</think>I look.\n\n<" + dsml + "tool_calls>\n<" + dsml +
                                        "invoke name=\"find\">\n<" + dsml + "parameter name=\"q\" string=\"true\">x</" +
                                        dsml + "parameter>\n</" + dsml + "invoke>\n</" + dsml + "tool_calls>"));
  Json body = ask("Look it up");
  body["stream"] = true;
  body["thinking"] = {{"type", "adaptive"}};
  body["tools"] = Json::array(
      {Json{{"name", "find"}, {"input_schema", {{"type", "object"}, {"properties", {{"q", {{"type", "string"}}}}}}}}});
  const Answer answer = post(kMessages, body);
  std::string order, thinking, text, arguments;
  int64_t last_index = -1;
  const auto events = named_events(answer.stream);
  for (const auto& [name, data] : events) {
    if (name == "content_block_start") {
      EXPECT_EQ(data.at("index"), ++last_index);
      order += "start:" + data.at("content_block").at("type").get<std::string>() + " ";
    } else if (name == "content_block_delta") {
      EXPECT_EQ(data.at("index"), last_index);
      const Json& delta = data.at("delta");
      const std::string type = delta.at("type");
      if (!order.ends_with(type + " ")) order += type + " ";
      if (type == "thinking_delta") thinking += delta.at("thinking");
      if (type == "text_delta") text += delta.at("text");
      if (type == "input_json_delta") arguments += delta.at("partial_json");
      EXPECT_NE(delta.value("signature", "some"), "");
    } else {
      order += name + " ";
    }
  }
  EXPECT_EQ(order,
            "message_start start:thinking thinking_delta signature_delta content_block_stop start:text text_delta "
            "content_block_stop start:tool_use input_json_delta content_block_stop message_delta message_stop ");
  EXPECT_EQ(thinking, "because");
  EXPECT_EQ(text, "I look.");
  EXPECT_EQ(Json::parse(arguments), Json::parse(R"({"q":"x"})"));
  EXPECT_GT(events.front().second.at("message").at("usage").at("input_tokens"), 0);
  EXPECT_EQ(events[events.size() - 2].second.at("delta").at("stop_reason"), "tool_use");
}

TEST_F(MessagesTest, AllOfAConversationIsInThePrompt) {
  const Json body = Json::parse(R"({"max_tokens": 5,
    "system": [{"type":"text","text":"x-anthropic-billing-header: cc_version=2; cch=abc12;"},
               {"type":"text","text":"Be brief.","cache_control":{"type":"ephemeral"}}],
    "messages": [
      {"role":"user","content":[{"type":"text","text":"What is the weather?"}]},
      {"role":"assistant","content":[{"type":"thinking","thinking":"I ask.","signature":"somebody else's"},
                                     {"type":"redacted_thinking","data":"?"},
                                     {"type":"text","text":"One moment."},
                                     {"type":"tool_use","id":"toolu_1","name":"weather","input":{"city":"Oslo"}}]},
      {"role":"user","content":[{"type":"tool_result","tool_use_id":"toolu_1","content":[{"type":"text","text":"sunny"}]},
                                {"type":"text","text":"And now?"}]},
      {"role":"system","content":"A reminder in the middle."},
      {"role":"user","content":"Go on."}],
    "tools": [{"name":"weather","description":"of a city","input_schema":{"type":"object","properties":{"city":{"type":"string"}}}},
              {"type":"web_search_20250305","name":"web_search"}],
    "thinking": {"type":"enabled","budget_tokens":1024}, "metadata": {"user_id":"u"},
    "context_management": {"edits": []}, "service_tier": "auto"})");
  const std::string prompt = prompt_of(body);
  for (const char* part : {"Be brief.", "What is the weather?", "I ask.", "One moment.", "weather", "Oslo", "sunny",
                           "And now?", "A reminder in the middle.", "Go on."})
    EXPECT_NE(prompt.find(part), std::string::npos) << part;
  for (const char* absent : {"x-anthropic-billing-header", "web_search", "somebody else's"})
    EXPECT_EQ(prompt.find(absent), std::string::npos) << absent;
  EXPECT_LT(prompt.find("And now?"), prompt.find("A reminder"));
  EXPECT_LT(prompt.find("A reminder"), prompt.find("Go on."));
}

TEST_F(MessagesTest, TheBillingLineChangesNoPrompt) {
  Json body = ask("Hello");
  body["system"] = "x-anthropic-billing-header: cch=1;\nYou help.";
  const std::string one = prompt_of(body);
  body["system"] = Json::parse(
      R"([{"type":"text","text":"x-anthropic-billing-header: cch=2;"},{"type":"text","text":"You help."}])");
  EXPECT_EQ(prompt_of(body), one);
}

TEST_F(MessagesTest, TheLastWordsOfTheAssistantAreGoneOnWith) {
  Json body = ask("Say it");
  body["messages"].push_back({{"role", "assistant"}, {"content", "The answer is"}});
  EXPECT_TRUE(prompt_of(body).ends_with("The answer is"));
}

TEST_F(MessagesTest, TheEndSaysWhy) {
  backend.script = [](const Request&, RequestHandle& handle) {
    put_token(handle, 0, 1, "one ");
    TokenEvent end;
    end.kind = TokenEvent::Kind::finish;
    end.stop = "STOP";
    handle.stream().finish(std::move(end));
  };
  Json body = ask("Count");
  body["stop_sequences"] = Json::array({"STOP"});
  Json reply = post(kMessages, body).json();
  EXPECT_EQ(reply.at("stop_reason"), "stop_sequence");
  EXPECT_EQ(reply.at("stop_sequence"), "STOP");
  EXPECT_EQ(last().stop, std::vector<std::string>{"STOP"});
  backend.script = saying({"one"}, FinishReason::length);
  EXPECT_EQ(post(kMessages, body).json().at("stop_reason"), "max_tokens");
}

TEST_F(MessagesTest, ErrorsNameTheFieldAsItWasSent) {
  refused({{"max_tokens", 1}}, "messages is missing");
  refused({{"messages", Json::array()}}, "messages should be a list");
  refused({{"messages", Json::array({1})}}, "messages[0] should be an object");
  refused({{"messages", Json::array({Json{{"role", "user"}}})}}, "messages[0].content is missing");
  refused({{"messages", Json::array({Json{{"role", 3}, {"content", "x"}}})}}, "messages[0].role should be a string");
  refused({{"messages", Json::array({Json{{"role", "robot"}, {"content", "x"}}})}}, "messages[0].role should be user");
  Json image = ask("x");
  image["messages"][0]["content"] = Json::parse(R"([{"type":"text","text":"a"},{"type":"image","source":{}}])");
  refused(image, "messages[0].content[1] is of type 'image'");
  image["messages"][0]["content"] = Json::parse(R"(["a", 3])");
  refused(image, "messages[0].content[1] should be an object");
  image = ask("x");
  image["system"] = Json::parse(R"([{"type":"text","text":"a"},{"type":"image","source":{}}])");
  refused(image, "system[1] is of type 'image'");
  Json result = ask("x");
  result["messages"][0]["content"] = Json::parse(R"([{"type":"tool_result","content":"a"}])");
  refused(result, "messages[0].content[0].tool_use_id is missing");
  for (const auto& [field, value, words] : std::vector<std::tuple<const char*, Json, const char*>>{
           {"temperature", "hot", "temperature should be"},
           {"top_k", "x", "top_k"},
           {"stop_sequences", "x", "stop_sequences should be a list"},
           {"stop_sequences", Json::array({""}), "stop_sequences[0] should be"},
           {"tool_choice", {{"type", "any"}}, "tool_choice of type any is not offered"},
           {"thinking", {{"type", "on"}}, "thinking.type should be"},
           {"max_tokens", 0, "max_tokens should be at least 1"},
           {"max_tokens", 1e300, "max_tokens"},
           {"tools", Json::array({Json{{"input_schema", Json::object()}}}), "tools[0].name is missing"},
           {"tools", Json::array({Json{{"name", "f"}, {"description", 5}}}), "tools[0].description should be"},
           {"output_config", Json::array(), "output_config should be an object"},
           {"output_config", {{"effort", "huge"}}, "output_config.effort should be"},
           {"output_config", {{"format", {{"type", "json_schema"}}}}, "output_config.format is not offered"}}) {
    Json body = ask("x");
    body[field] = value;
    refused(body, words);
  }
}

TEST_F(MessagesTest, EffortsAreCheckedWhereNobodyThinks) {
  Json body = ask("x");
  body["thinking"] = {{"type", "disabled"}};
  body["output_config"] = {{"effort", "huge"}};
  refused(body, "output_config.effort should be");
  body["output_config"] = {{"effort", "max"}};
  EXPECT_EQ(post(kMessages, body).status, 200);
}

TEST_F(MessagesTest, TheInputOfACallIsAnObject) {
  Json body = ask("x");
  body["messages"].push_back(
      Json::parse(R"({"role":"assistant","content":[{"type":"tool_use","id":"t","name":"f","input":[1]}]})"));
  refused(body, "messages[1].content[0].input should be an object");
}

// The words by which its clients know to make a conversation shorter.
TEST_F(MessagesTest, APromptOverTheContextIsTooLong) {
  const Json much = ask(std::string(model.most_text_bytes() + 1, 'x'));
  const std::string message = refused(much, " tokens > 1023 maximum");
  EXPECT_TRUE(message.starts_with("prompt is too long: at least 10")) << message;
  EXPECT_EQ(post("/v1/messages/count_tokens", much).error().at("message"), message);
  backend.refusal = Error{ErrorCode::context_length, "the prompt has 1024 tokens; the context holds 1024", "prompt"};
  backend.refusal->counts = {{"n_prompt_tokens", 1024}, {"n_ctx", 1024}};
  for (const bool stream : {false, true}) {
    Json body = ask("x");
    body["stream"] = stream;
    EXPECT_EQ(refused(body, "prompt"), "prompt is too long: 1024 tokens > 1023 maximum");
  }
}

TEST_F(MessagesTest, ErrorsHaveAnthropicsShapeWhereverTheyCome) {
  backend.now = {EngineHealth::State::failed, "a device is gone"};
  Answer answer = post(kMessages, ask("x"));
  EXPECT_EQ(answer.status, 503);
  EXPECT_EQ(answer.error().at("type"), "overloaded_error");
  backend.now = {};
  EXPECT_EQ(get(kMessages).error().at("type"), "invalid_request_error");
  answer = post_text(kMessages, "{");
  EXPECT_EQ(answer.status, 400);
  EXPECT_EQ(answer.json().at("type"), "error");
  ASSERT_TRUE(api->keys().load({.keys = {"a-secret-key"}, .admin_keys = {}, .file = ""}).ok());
  answer = post(kMessages, ask("x"));
  EXPECT_EQ(answer.status, 401);
  EXPECT_EQ(answer.error().at("type"), "authentication_error");
  const Reply late =
      api->shaped(head_of("POST", kMessages), error_reply(413, "invalid_request_error", "request_too_large", "big"));
  EXPECT_EQ(parse_json(late.body).value().at("error").at("type"), "request_too_large");
}

// 529 is the box, 429 this client.
TEST_F(MessagesTest, AFullBoxIsNoFaultOfTheClient) {
  std::vector<QueueTicket> others;
  for (int i = 0; i < 8; ++i) others.push_back(backend.ticket({1, 1, 1}).value());
  const Answer full = post(kMessages, ask("x"));
  EXPECT_EQ(full.status, 529);
  EXPECT_EQ(full.error().at("type"), "overloaded_error");
  EXPECT_EQ(full.headers.count("Retry-After"), 1u);
  EXPECT_EQ(log_lines().back().at("status"), 529);
  EXPECT_EQ(post(kChat, {{"messages", kHello}}).status, 429);
  others.clear();
  ASSERT_TRUE(api->keys()
                  .load({.keys = {"a-secret-key", "another-key"}, .admin_keys = {}, .file = "", .max_requests = 1})
                  .ok());
  backend.script = nullptr;  // the first goes on
  HttpHead head = head_of("POST", kMessages, dump_json(ask("x")));
  head.api_key = "a-secret-key";
  const auto running = std::get<std::shared_ptr<Exchange>>(api->handle({head, dump_json(ask("x"))}));
  const Answer busy = ask_with(head, dump_json(ask("x")));
  EXPECT_EQ(busy.status, 429);
  EXPECT_EQ(busy.error().at("type"), "rate_limit_error");
  backend.await(0)->cancel();
  running->cancel();
  running->closed(false, 200);
}

TEST_F(MessagesTest, ASilentStreamIsPingedAndAnErrorInItIsAnEvent) {
  backend.script = [](const Request&, RequestHandle& handle) { put_token(handle, 0, 1, "one"); };
  Json body = ask("x");
  body["stream"] = true;
  const auto client = begin(body, kMessages);
  EXPECT_EQ(client->exchange().keep_alive(), "event: ping\ndata: {\"type\":\"ping\"}\n\n");
  client->follow([](const Answer& a) { return a.stream.find("text_delta") != std::string::npos; });
  const Exchange::Output end = client->exchange().abort({ErrorCode::unavailable, "the server is shutting down"});
  const auto events = named_events(end.bytes);
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].second.at("error").at("type"), "overloaded_error");
  EXPECT_EQ(events[0].second.at("error").at("message"), "the server is shutting down");
}

TEST_F(MessagesTest, TokensAreCountedWithoutAnAnswer) {
  Json body = ask("How many tokens have I?");
  body.erase("max_tokens");
  const Answer counted = post("/v1/messages/count_tokens?beta=true", body);
  EXPECT_EQ(counted.status, 200) << counted.body;
  EXPECT_EQ(backend.requests.size(), 0u);
  post(kMessages, body);
  EXPECT_EQ(counted.json(), (Json{{"input_tokens", last().prompt.size()}}));
  EXPECT_EQ(post("/v1/messages/count_tokens", {{"messages", 3}}).status, 400);
}

}  // namespace
}  // namespace thermocline::server
