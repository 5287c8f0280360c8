// The Responses API: items to prompts, answers to items and events in their order, the store.
#include <set>

#include "runtime/server/api/response_store.h"
#include "tests/server/api_fixture.h"

namespace thermocline::server {
namespace {

constexpr const char* kResponses = "/v1/responses";

std::string dsml_call(const std::string& name, const std::string& parameter, const std::string& value) {
  const std::string d = test::demo_prose().dsml_token;
  return "\n\n<" + d + "tool_calls>\n<" + d + "invoke name=\"" + name + "\">\n<" + d + "parameter name=\"" + parameter +
         "\" string=\"true\">" + value + "</" + d + "parameter>\n</" + d + "invoke>\n</" + d + "tool_calls>";
}

class ResponsesTest : public ApiTest {
 protected:
  std::vector<Json> events_of(const std::string& stream) {
    std::vector<Json> events;
    for (size_t at = 0; at < stream.size();) {
      const size_t end = stream.find("\n\n", at), line = stream.find('\n', at);
      EXPECT_EQ(stream.compare(at, 7, "event: "), 0) << stream.substr(at);
      events.push_back(parse_json(stream.substr(line + 7, end - line - 7)).value());
      EXPECT_EQ(stream.substr(at + 7, line - at - 7), events.back().at("type"));
      EXPECT_EQ(events.back().at("sequence_number"), events.size() - 1);
      at = end + 2;
    }
    return events;
  }
  std::string order_of(const std::vector<Json>& events) {
    std::string order, last;
    for (const Json& e : events) {
      const std::string type = e.at("type").get<std::string>().substr(9);
      if (type != last) order += type + " ";
      last = type;
    }
    return order;
  }
  Json reply(const Json& body) {
    const Answer answer = post(kResponses, body);
    EXPECT_EQ(answer.status, 200) << answer.body;
    return answer.json();
  }
  void refused(const Json& body, const std::string& words) {
    const Answer answer = post(kResponses, body);
    EXPECT_EQ(answer.status, 400) << dump_json(body);
    EXPECT_NE(answer.error().at("message").get<std::string>().find(words), std::string::npos) << answer.body;
  }
  Answer erase(const std::string& target) { return ask_with(head_of("DELETE", target), ""); }
};

TEST_F(ResponsesTest, AnAnswerIsAListOfItems) {
  const Json body = reply({{"input", "Hello"}, {"metadata", {{"a", "b"}}}});
  EXPECT_EQ(body.at("object"), "response");
  EXPECT_EQ(body.at("status"), "completed");
  EXPECT_TRUE(body.at("id").get<std::string>().starts_with("resp_"));
  ASSERT_EQ(body.at("output").size(), 1u);
  const Json& item = body.at("output")[0];
  EXPECT_EQ(item.at("type"), "message");
  EXPECT_EQ(item.at("status"), "completed");
  EXPECT_EQ(item.at("content")[0].at("text"), "Hello there");
  EXPECT_EQ(body.at("usage").at("output_tokens"), 2);
  EXPECT_EQ(body.at("usage").at("total_tokens"), static_cast<int64_t>(last().prompt.size()) + 2);
  EXPECT_EQ(body.at("metadata").at("a"), "b");
}

TEST_F(ResponsesTest, CachedTokensCountOnce) {
  backend.script = saying_behind_cached(3);
  const Json body = reply({{"input", "Hello"}});
  EXPECT_EQ(body.at("usage").at("input_tokens_details").at("cached_tokens"), 3);
}

TEST_F(ResponsesTest, AStreamHasTheOrderThatClientsCountOn) {
  backend.script = saying(characters_of("why</think>I do." + dsml_call("find", "q", "x")));
  Json body = {{"input", "Do it"}, {"stream", true}, {"store", false}, {"reasoning", {{"effort", "high"}}}};
  body["tools"] = Json::parse(
      R"([{"type":"function","name":"find","parameters":{"type":"object","properties":{"q":{"type":"string"}}}},
                                  {"type":"web_search"},{"type":"namespace","name":"n","tools":[]},{"type":"image_generation"}])");
  const std::vector<Json> events = events_of(post(kResponses, body).stream);
  EXPECT_EQ(
      order_of(events),
      "created in_progress "
      "output_item.added content_part.added reasoning_text.delta reasoning_text.done content_part.done "
      "output_item.done "
      "output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done "
      "output_item.added function_call_arguments.delta function_call_arguments.done output_item.done completed ");
  std::set<int64_t> added;
  for (const Json& e : events) {
    if (e.at("type") == "response.output_item.added") added.insert(e.at("output_index").get<int64_t>());
    if (e.contains("output_index")) {
      EXPECT_TRUE(added.contains(e.at("output_index").get<int64_t>()));
    }
  }
  const Json& done = events.back().at("response");
  EXPECT_EQ(done.at("output")[0].at("content")[0].at("text"), "why");
  EXPECT_EQ(done.at("output")[1].at("content")[0].at("text"), "I do.");
  EXPECT_EQ(done.at("output")[2].at("name"), "find");
  EXPECT_EQ(Json::parse(done.at("output")[2].at("arguments").get<std::string>()), Json::parse(R"({"q":"x"})"));
  EXPECT_GT(done.at("usage").at("output_tokens_details").at("reasoning_tokens"), 0);
  EXPECT_EQ(events[events.size() - 2].at("item"), done.at("output")[2]) << "clients build their history of it";
}

TEST_F(ResponsesTest, ACustomToolTakesText) {
  backend.script = saying(characters_of(dsml_call("apply_patch", "input", "*** Begin\n+x")));
  const Json body = {
      {"input", "Patch"},
      {"tools", Json::array({Json{{"type", "custom"}, {"name", "apply_patch"}, {"format", {{"type", "grammar"}}}}})}};
  const Json item = reply(body).at("output")[0];
  EXPECT_EQ(item.at("type"), "custom_tool_call");
  EXPECT_EQ(item.at("name"), "apply_patch");
  EXPECT_EQ(item.at("input"), "*** Begin\n+x");
  Json streamed = body;
  streamed["stream"] = true;
  EXPECT_NE(order_of(events_of(post(kResponses, streamed).stream))
                .find("custom_tool_call_input.delta custom_tool_call_input.done"),
            std::string::npos);
}

TEST_F(ResponsesTest, AllOfAHistoryIsInThePrompt) {
  reply(
      Json::parse(R"({"instructions": "Be brief.", "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k",
    "input": [
      {"type":"message","role":"developer","content":[{"type":"input_text","text":"You patch files."}]},
      {"role":"user","content":"What is the weather?"},
      {"type":"reasoning","id":"rs_1","summary":[],"content":[{"type":"reasoning_text","text":"I ask."}]},
      {"type":"message","role":"assistant","content":[{"type":"output_text","text":"One moment."}]},
      {"type":"function_call","call_id":"call_1","name":"weather","arguments":"{\"city\":\"Oslo\"}"},
      {"type":"function_call_output","call_id":"call_1","output":"sunny"},
      {"type":"custom_tool_call","call_id":"call_2","name":"patch","input":"+line"},
      {"type":"custom_tool_call_output","call_id":"call_2","output":[{"type":"input_text","text":"done"}]},
      {"type":"web_search_call","id":"ws_1","status":"completed"}],
    "tools": [{"type":"function","name":"weather","parameters":{"type":"object"}}],
    "reasoning": {"effort":"medium","summary":"auto"}})"));
  const std::string prompt = text_of(last());
  size_t at = 0;
  for (const char* part : {"Be brief.", "You patch files.", "What is the weather?", "I ask.", "One moment.", "weather",
                           "Oslo", "sunny", "patch", "+line", "done"}) {
    const size_t found = prompt.find(part, at);
    EXPECT_NE(found, std::string::npos) << part << " in " << prompt;
    at = std::min(found, prompt.size());
  }
}

TEST_F(ResponsesTest, AnEmptyProbePasses) {
  for (const Json& input : {Json(""), Json::array(), Json()})
    EXPECT_EQ(reply({{"input", input}, {"max_output_tokens", 1}}).at("object"), "response");
  EXPECT_EQ(last().max_tokens, 1);
}

TEST_F(ResponsesTest, AResponseIsFollowedByAnother) {
  const Json first = reply({{"input", "My name is Ann."}, {"instructions", "Sing."}});
  const std::string id = first.at("id");
  const Json second = reply({{"input", "Who am I?"}, {"previous_response_id", id}});
  const std::string prompt = text_of(last());
  for (const char* part : {"My name is Ann.", "Hello there", "Who am I?"})
    EXPECT_NE(prompt.find(part), std::string::npos) << part;
  EXPECT_EQ(prompt.find("Sing."), std::string::npos) << "instructions are not carried on";
  EXPECT_EQ(get("/v1/responses/" + id).json(), first);
  EXPECT_EQ(erase("/v1/responses/" + id).json().at("deleted"), true);
  EXPECT_EQ(erase("/v1/responses/" + id).status, 404);
  EXPECT_EQ(get("/v1/responses/" + id).status, 404);
  refused({{"input", "x"}, {"previous_response_id", id}}, "is not there");
  const Json third = reply({{"input", "And?"}, {"previous_response_id", second.at("id")}});
  EXPECT_NE(text_of(last()).find("My name is Ann."), std::string::npos) << "the whole conversation is with its last";
  const Json unstored = reply({{"input", "x"}, {"store", false}});
  EXPECT_EQ(get("/v1/responses/" + unstored.at("id").get<std::string>()).status, 404);
}

TEST_F(ResponsesTest, AResponseIsItsOwnKeysAlone) {
  ASSERT_TRUE(api->keys().load({.keys = {"secret-key-1", "secret-key-2"}, .admin_keys = {}, .file = ""}).ok());
  const auto with = [](HttpHead head, const char* key) {
    head.api_key = key;
    return head;
  };
  const std::string body = R"({"input":"x"})";
  const Json first = ask_with(with(head_of("POST", kResponses, body), "secret-key-1"), body).json();
  const std::string target = "/v1/responses/" + first.at("id").get<std::string>();
  EXPECT_EQ(ask_with(with(head_of("GET", target), "secret-key-2"), "").status, 404);
  EXPECT_EQ(ask_with(with(head_of("DELETE", target), "secret-key-2"), "").status, 404);
  EXPECT_EQ(ask_with(with(head_of("GET", target), "secret-key-1"), "").status, 200);
}

TEST_F(ResponsesTest, OneThatRunsIsCancelledOnceAndStaysSo) {
  backend.script = [](const Request&, RequestHandle& handle) { put_token(handle, 0, 1, "one"); };
  const auto client = begin({{"input", "x"}, {"stream", true}}, kResponses);
  client->follow([](const Answer& a) { return a.stream.find("output_text.delta") != std::string::npos; });
  const std::string id = events_of(client->answer.stream)[0].at("response").at("id");
  EXPECT_EQ(get("/v1/responses/" + id).json().at("status"), "in_progress");
  for (int times = 0; times < 2; ++times)
    EXPECT_EQ(post("/v1/responses/" + id + "/cancel", Json::object()).json().at("status"), "cancelled");
  EXPECT_TRUE(backend.await(0)->cancelled());
  put_end(*backend.await(0), 0, FinishReason::cancelled);
  client->follow();
  const Json last_event = events_of(client->answer.stream).back();
  EXPECT_EQ(last_event.at("type"), "response.failed");
  EXPECT_EQ(last_event.at("response").at("status"), "cancelled");
  EXPECT_EQ(get("/v1/responses/" + id).json().at("status"), "cancelled");
  EXPECT_EQ(post("/v1/responses/resp_nothing/cancel", Json::object()).status, 404);
}

TEST_F(ResponsesTest, OneThatIsDeletedStaysSo) {
  backend.script = [](const Request&, RequestHandle& handle) { put_token(handle, 0, 1, "one"); };
  const auto client = begin({{"input", "x"}, {"stream", true}}, kResponses);
  client->follow([](const Answer& a) { return a.stream.find("output_text.delta") != std::string::npos; });
  const std::string id = events_of(client->answer.stream)[0].at("response").at("id");
  EXPECT_EQ(erase("/v1/responses/" + id).status, 200);
  put_end(*backend.await(0), 0, FinishReason::stop);
  client->follow();
  client->close();
  EXPECT_EQ(get("/v1/responses/" + id).status, 404);
}

TEST_F(ResponsesTest, OneWhoseClientLeftWasCancelled) {
  backend.script = [](const Request&, RequestHandle& handle) { put_token(handle, 0, 1, "one"); };
  const auto client = begin({{"input", "x"}, {"stream", true}}, kResponses);
  client->follow([](const Answer& a) { return a.stream.find("output_text.delta") != std::string::npos; });
  const std::string id = events_of(client->answer.stream)[0].at("response").at("id");
  client->close(false);
  EXPECT_EQ(get("/v1/responses/" + id).json().at("status"), "cancelled");
  EXPECT_EQ(post("/v1/responses/" + id + "/cancel", Json::object()).json().at("status"), "cancelled");
}

TEST_F(ResponsesTest, CutAnswersAreIncomplete) {
  backend.script = saying({"one"}, FinishReason::length);
  const Json body = reply({{"input", "x"}, {"max_output_tokens", 1}});
  EXPECT_EQ(body.at("status"), "incomplete");
  EXPECT_EQ(body.at("incomplete_details").at("reason"), "max_output_tokens");
  const auto events = events_of(post(kResponses, {{"input", "x"}, {"stream", true}}).stream);
  EXPECT_EQ(events.back().at("type"), "response.incomplete");
}

TEST_F(ResponsesTest, ASilentStreamRepeatsAnEventAndAnErrorIsOne) {
  backend.script = [](const Request&, RequestHandle&) {};
  const auto client = begin({{"input", "x"}, {"stream", true}}, kResponses);
  backend.await(0);
  std::string stream;
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (stream.empty() && std::chrono::steady_clock::now() < end) {
    EXPECT_TRUE(client->exchange().take().bytes.empty());
    const std::string sign = client->exchange().keep_alive();
    if (!sign.starts_with(":")) stream = sign;
  }
  stream += client->exchange().keep_alive();
  stream += client->exchange().abort({ErrorCode::overloaded, "too much"}).bytes;
  const auto events = events_of(stream);
  EXPECT_EQ(order_of(events), "created in_progress failed ");
  EXPECT_EQ(events.size(), 4u) << "in_progress twice";
  EXPECT_EQ(events.back().at("response").at("error").at("code"), "rate_limit_exceeded");
  EXPECT_NE(events.back().at("response").at("error").at("message").get<std::string>().find("try again in 5s"),
            std::string::npos);
}

// By this code Codex stops, where others have it come again.
TEST_F(ResponsesTest, APromptThatIsTooLongSaysSoInItsStream) {
  Gate gate;
  backend.on_submit = [&] { gate.pass(); };
  backend.refusal = Error{ErrorCode::context_length, "the prompt has 9 tokens; the context holds 8", "prompt"};
  const auto client = begin({{"input", "x"}, {"stream", true}}, kResponses);
  gate.await_arrival();
  EXPECT_TRUE(client->exchange().keep_alive().starts_with(":"));  // the 200 is out
  gate.open();
  client->follow();
  const auto events = events_of(client->answer.stream);
  EXPECT_EQ(events.back().at("type"), "response.failed");
  EXPECT_EQ(events.back().at("response").at("error").at("code"), "context_length_exceeded");
}

TEST_F(ResponsesTest, ErrorsNameTheFieldAsItWasSent) {
  refused({{"input", 3}}, "input should be a string or a list");
  refused({{"input", Json::array({3})}}, "input[0] should be an object");
  refused({{"input", Json::array({Json{{"role", "robot"}, {"content", "x"}}})}}, "input[0].role should be");
  refused({{"input", Json::array({Json{{"role", "user"}}})}}, "input[0].content is missing");
  refused({{"input", Json::parse(R"([{"role":"user","content":[{"type":"input_image"}]}])")}},
          "input[0].content[0] is of type");
  refused({{"input", Json::parse(R"([{"type":"function_call","name":"f"}])")}}, "input[0].call_id is missing");
  refused({{"input", Json::parse(R"([{"type":"item_reference","id":"x"}])")}}, "input[0] refers to an item");
  refused({{"input", Json::parse(R"([{"type":"reasoning","content":[],"summary":{}}])")}},
          "input[0].summary should be a string or a list");
  for (const auto& [field, value, words] : std::vector<std::tuple<const char*, Json, const char*>>{
           {"max_output_tokens", 0, "max_output_tokens should be at least 1"},
           {"max_output_tokens", "x", "max_output_tokens should be"},
           {"previous_response_id", "resp_x", "previous_response_id 'resp_x' is not there"},
           {"background", true, "background is not offered"},
           {"text", {{"format", {{"type", "json_schema"}}}}, "text.format of type json_schema is not offered"},
           {"tool_choice", "required", "tool_choice that forces a call"},
           {"reasoning", {{"effort", "huge"}}, "reasoning.effort should be none, minimal"},
           {"tools", 3, "tools should be a list"},
           {"tools", Json::parse(R"([{"type":"function","name":"f","description":{}}])"), "tools[0].description"},
           {"conversation", "c", "conversation is not offered"}}) {
    Json body = {{"input", "x"}};
    body[field] = value;
    refused(body, words);
  }
}

TEST_F(ResponsesTest, AnInputThatCannotFitIsNamed) {
  const std::string text(model.most_text_bytes() + 1, 'x');
  for (const Json& input : {Json(text), Json::array({Json{{"role", "user"}, {"content", text}}})}) {
    const Answer answer = post(kResponses, {{"input", input}});
    EXPECT_EQ(answer.status, 400);
    EXPECT_EQ(answer.param(), "input");
    EXPECT_TRUE(answer.error().at("message").get<std::string>().starts_with("input has ")) << answer.body;
  }
  const Json items(std::vector<Json>(8193, Json{{"role", "user"}, {"content", "x"}}));
  EXPECT_EQ(post(kResponses, {{"input", items}}).param(), "input");
  EXPECT_EQ(chat({{"messages", {{{"role", "user"}, {"content", text}}}}}).param(), "messages");
}

TEST(ResponseStore, ForgetsTheLongestUnusedAndKeepsItsBounds) {
  ResponseStore store({.bytes = 30, .responses = 3});
  const std::string ten(10, 'x');
  for (const char* id : {"a", "b", "c"}) store.put("me", id, {ten});
  EXPECT_TRUE(store.find("me", "a"));
  store.put("me", "d", {ten});
  EXPECT_FALSE(store.find("me", "b")) << "a was used since";
  EXPECT_TRUE(store.find("me", "a"));
  EXPECT_FALSE(store.find("you", "a"));
  EXPECT_FALSE(store.erase("you", "a"));
  store.put("you", "a", {ten});
  EXPECT_EQ(store.find("me", "a")->response, ten) << "nobody takes another's id";
  store.put("me", "huge", {std::string(31, 'x')});
  EXPECT_FALSE(store.find("me", "huge"));
  EXPECT_TRUE(store.find("me", "d")) << "what cannot fit drives nothing out";
  store.put("me", "d", {std::string(25, 'y')});
  EXPECT_FALSE(store.find("me", "a"));
  EXPECT_EQ(store.find("me", "d")->response.size(), 25u);
}

}  // namespace
}  // namespace thermocline::server
