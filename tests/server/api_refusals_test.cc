// The APIs: what is refused, and when: by the head alone, by the body, by the engine.
#include "tests/server/api_fixture.h"

namespace thermocline::server {
namespace {

// --- what is refused ---

TEST_F(ApiTest, MalformedChatsNameTheField) {
  const Json format = {{"type", "json_schema"}, {"json_schema", {{"name", "x"}}}};
  const auto message = [](Json content) {
    return Json{{"messages", Json::array({Json{{"role", "user"}, {"content", std::move(content)}}})}};
  };
  const std::vector<std::pair<Json, std::string>> cases = {
      {{{"messages", Json::array()}}, "messages"},
      {{{"messages", "hi"}}, "messages"},
      {{{"messages", Json(std::vector<Json>(8193, kHello[0]))}}, "messages"},
      {{{"messages", {5}}}, "messages[0]"},
      {message(5), "messages[0].content"},
      {{{"messages", {{{"role", "robot"}, {"content", ""}}}}}, "messages[0].role"},
      {message({{{"type", "text"}, {"text", "a"}}, {{"type", "image_url"}, {"image_url", {{"url", "x"}}}}}),
       "messages[0].content[1]"},
      {{{"temperature", "hot"}}, "temperature"},
      {{{"temperature", -1}}, "temperature"},
      {{{"top_p", 2}}, "top_p"},
      {{{"top_k", 0.5}}, "top_k"},
      {{{"min_p", 3}}, "min_p"},
      {{{"max_tokens", 0}}, "max_tokens"},
      {{{"max_tokens", -5}}, "max_tokens"},
      {{{"max_completion_tokens", 1e30}}, "max_completion_tokens"},
      {{{"max_completion_tokens", UINT64_MAX}}, "max_completion_tokens"},
      {{{"min_tokens", -1}}, "min_tokens"},
      {{{"seed", "x"}}, "seed"},
      {{{"seed", 1.5}}, "seed"},
      {{{"seed", UINT64_MAX}}, "seed"},
      {{{"stop", 5}}, "stop"},
      {{{"stop", {""}}}, "stop[0]"},
      {{{"stop", {"a", 1}}}, "stop[1]"},
      {{{"stop", std::vector<std::string>(17, "a")}}, "stop"},
      {{{"stop_token_ids", {0, 999999}}}, "stop_token_ids[1]"},
      {{{"stop_token_ids", 3}}, "stop_token_ids"},
      {{{"include_stop_str_in_output", 1}}, "include_stop_str_in_output"},
      {{{"skip_special_tokens", "no"}}, "skip_special_tokens"},
      {{{"ignore_eos", 0}}, "ignore_eos"},
      {{{"stream", "yes"}}, "stream"},
      {{{"stream_options", 5}}, "stream_options"},
      {{{"stream_options", {{"include_usage", 1}}}}, "stream_options.include_usage"},
      {{{"stream_options", {{"continuous_usage_stats", 1}}}}, "stream_options.continuous_usage_stats"},
      {{{"n", 0}}, "n"},
      {{{"n", 17}}, "n"},
      {{{"logprobs", 3}}, "logprobs"},
      {{{"logprobs", true}, {"top_logprobs", 21}}, "top_logprobs"},
      {{{"top_logprobs", 2}}, "top_logprobs"},
      {{{"logit_bias", 5}}, "logit_bias"},
      {{{"logit_bias", {{"x", 1}}}}, "logit_bias[x]"},
      {{{"logit_bias", {{"-1", 1}}}}, "logit_bias[-1]"},
      {{{"logit_bias", {{"4294967296", 1}}}}, "logit_bias[4294967296]"},
      {{{"logit_bias", {{"999999", 1}}}}, "logit_bias[999999]"},
      {{{"logit_bias", {{"5", 101}}}}, "logit_bias[5]"},
      {{{"logit_bias", {{"5", "a"}}}}, "logit_bias[5]"},
      {{{"repetition_penalty", 0}}, "repetition_penalty"},
      {{{"presence_penalty", 9}}, "presence_penalty"},
      {{{"frequency_penalty", -9}}, "frequency_penalty"},
      {{{"priority", 1000}}, "priority"},
      {{{"cache_salt", 7}}, "cache_salt"},
      {{{"cache_salt", std::string(300, 'x')}}, "cache_salt"},
      {{{"timeout", 0}}, "timeout"},
      {{{"timeout", "soon"}}, "timeout"},
      {{{"tools", 5}}, "tools"},
      {{{"tools", {Json::object()}}}, "tools[0].function"},
      {{{"tools", {5}}, {"tool_choice", "none"}}, "tools[0]"},
      {{{"tools", {{{"type", "custom"}, {"function", {{"name", "f"}}}}}}}, "tools[0]"},
      {{{"tools", {{{"function", Json::object()}}}}}, "tools[0].function.name"},
      {{{"tools", {{{"function", {{"name", 5}}}}}}}, "tools[0].function.name"},
      {{{"tools", {{{"function", {{"name", "f"}, {"description", 5}}}}}}}, "tools[0].function.description"},
      {{{"tools", {{{"function", {{"name", "f"}, {"parameters", true}}}}}}}, "tools[0].function.parameters"},
      {{{"messages", {{{"role", "user"}, {"content", "x"}, {"prefix", 1}}}}}, "messages[0].prefix"},
      {{{"messages", {{{"role", "tool"}, {"content", "x"}, {"tool_call_id", 1}}}}}, "messages[0].tool_call_id"},
      {{{"messages",
         {{{"role", "assistant"}, {"tool_calls", {{{"id", 1}, {"function", {{"name", "f"}}}}}}},
          {{"role", "tool"}, {"content", "x"}}}}},
       "messages[0].tool_calls[0].id"},
      {{{"tools", Json(std::vector<Json>(513, Json::object()))}}, "tools"},
      {{{"tool_choice", "required"}}, "tool_choice"},
      {{{"tool_choice", {{"type", "function"}, {"function", {{"name", "f"}}}}}}, "tool_choice"},
      {{{"tool_choice", "perhaps"}}, "tool_choice"},
      {{{"functions", {{{"name", "f"}}}}}, "functions"},
      {{{"response_format", "json"}}, "response_format"},
      {{{"response_format", Json::object()}}, "response_format.type"},
      {{{"response_format", {{"type", 7}}}}, "response_format.type"},
      {{{"response_format", {{"type", "xml"}}}}, "response_format.type"},
      {{{"response_format", {{"type", "json_object"}}}}, "response_format"},
      {{{"response_format", format}}, "response_format"},
      {{{"structured_outputs", {{"json", Json::object()}}}}, "structured_outputs"},
      {{{"guided_regex", "a+"}}, "guided_regex"},
      {{{"guided_json", Json::object()}}, "guided_json"},
      {{{"json_schema", Json::object()}}, "json_schema"},
      {{{"grammar", "root ::= x"}}, "grammar"},
      {{{"prompt_logprobs", 21}}, "prompt_logprobs"},
      {{{"prompt_logprobs", -1}}, "prompt_logprobs"},
      {{{"prompt_logprobs", 0}, {"stream", true}}, "prompt_logprobs"},
      {{{"timings_per_token", 1}}, "timings_per_token"},
      {{{"bad_words", {"x"}}}, "bad_words"},
      {{{"reasoning_effort", "heroic"}}, "reasoning_effort"},
      {{{"reasoning_effort", 5}}, "reasoning_effort"},
      {{{"thinking", "on"}}, "thinking"},
      {{{"thinking", {{"type", "perhaps"}}}}, "thinking.type"},
      {{{"chat_template_kwargs", 5}}, "chat_template_kwargs"},
      {{{"chat_template_kwargs", {{"thinking", 5}}}}, "chat_template_kwargs.thinking"},
      {{{"continue_final_message", 5}}, "continue_final_message"},
      {{{"add_generation_prompt", false}}, "add_generation_prompt"},
      {{{"model", 5}}, "model"},
      {{{"model", std::string(300, 'm')}}, "model"},
  };
  for (const auto& [body, param] : cases) {
    const Answer answer = chat(body);
    ASSERT_EQ(answer.status, 400) << body << answer.body << answer.stream;
    EXPECT_EQ(answer.param(), param) << answer.body;
    EXPECT_EQ(answer.error().at("type"), "invalid_request_error");
    EXPECT_NE(answer.error().at("message"), "");
    // Refused as a status, streamed or not.
    EXPECT_TRUE(body.contains("stream") || streamed(kChat, body).status == 400) << body;
  }
  EXPECT_EQ(post(kChat, Json::object()).param(), "messages");
  EXPECT_EQ(chat({{"reasoning_effort", "silly"}}).error().at("message"),
            "reasoning_effort should be none, minimal, low, medium, high, xhigh or max, not 'silly'");
  EXPECT_TRUE(backend.requests.empty());
  EXPECT_EQ(backend.counters->waiting().requests, 0);
  EXPECT_EQ(backend.counters->waiting().bytes, 0);
}

TEST_F(ApiTest, MalformedCompletionsNameTheField) {
  const std::vector<std::pair<Json, std::string>> cases = {
      {Json::object(), "prompt"},
      {{{"prompt", nullptr}}, "prompt"},
      {{{"prompt", 5}}, "prompt"},
      {{{"prompt", Json::array()}}, "prompt"},
      {{{"prompt", Json(std::vector<Json>(65, "a"))}}, "prompt"},
      {{{"prompt", {{1, 999999}}}}, "prompt[0][1]"},
      {{{"prompt", {Json::array({1}), Json::array()}}}, "prompt[1]"},
      {{{"prompt", {"a", 5}}}, "prompt[1]"},
      {{{"prompt", {-1}}}, "prompt[0]"},
      {{{"prompt", {1, 2.5}}}, "prompt[1]"},
      {{{"prompt", {UINT64_MAX}}}, "prompt[0]"},
      {{{"prompt", "a"}, {"echo", 1}}, "echo"},
      {{{"prompt", "a"}, {"suffix", "b"}}, "suffix"},
      {{{"prompt", "a"}, {"logprobs", 21}}, "logprobs"},
      {{{"prompt", "a"}, {"logprobs", true}}, "logprobs"},
      {{{"prompt", "a"}, {"best_of", 1}, {"n", 2}}, "best_of"},
      {{{"prompt", "a"}, {"best_of", 2}, {"stream", true}}, "best_of"},
      {{{"prompt", Json(std::vector<Json>(64, "a"))}, {"n", 3}}, "prompt"},
      {{{"prompt", "a"}, {"max_tokens", 0}}, "max_tokens"},
      {{{"prompt", "a"}, {"return_token_ids", 1}}, "return_token_ids"},
      {{{"prompt", "a"}, {"echo", true}, {"logprobs", 1}, {"prompt_logprobs", 2}}, "prompt_logprobs"},
  };
  for (const auto& [body, param] : cases) {
    const Answer answer = post(kText, body);
    ASSERT_EQ(answer.status, 400) << body << answer.body;
    EXPECT_EQ(answer.param(), param) << answer.body;
  }
  EXPECT_TRUE(backend.requests.empty());
}

// As clients write messages whose fields all have a value.
TEST_F(ApiTest, FieldsOfMessagesThatAreNullAreAbsent) {
  const Json messages = Json::parse(R"([{"role":"user","content":"a","prefix":null,"tool_calls":null},
    {"role":"assistant","content":null,"tool_calls":[{"id":null,"function":{"name":"f","arguments":null}}]},
    {"role":"tool","content":"b","tool_call_id":null}])");
  EXPECT_EQ(chat({{"messages", messages}}).status, 200);
}

// As JSON has one kind of number.
TEST_F(ApiTest, IntegersMayBeWrittenWithAPoint) {
  ASSERT_EQ(
      post_text(kText, R"({"prompt":[5.0,6e0],"max_tokens":7.0,"n":2.0,"seed":-1e3,"stop_token_ids":[8.0]})").status,
      200);
  EXPECT_EQ(last().prompt, (std::vector<int32_t>{5, 6}));
  EXPECT_EQ(last().max_tokens, 7);
  EXPECT_EQ(last().choices, 2);
  EXPECT_EQ(static_cast<int64_t>(last().sampling.seed), -1000);
  EXPECT_EQ(last().stop_token_ids, std::vector<int32_t>{8});
  for (const char* number :
       {"5.5", "1e19", "-1e19", "9223372036854775808", "9.223372036854775808e18", "1e300", "\"5\""}) {
    EXPECT_EQ(post_text(kText, std::string(R"({"prompt":"a","seed":)") + number + "}").param(), "seed") << number;
    EXPECT_EQ(post_text(kText, std::string(R"({"prompt":[5,)") + number + "]}").status, 400) << number;
  }
}

TEST_F(ApiTest, WhatIsSwitchedOffIsNoFeature) {
  const Json fields = {{"suffix", nullptr},
                       {"guided_json", nullptr},
                       {"functions", Json::array()},
                       {"use_beam_search", false},
                       {"tools", Json::array()},
                       {"tool_choice", "none"},
                       {"logprobs", false},
                       {"top_logprobs", 0},
                       {"response_format", {{"type", "text"}}},
                       {"logit_bias", Json::object()},
                       {"user", "u"},
                       {"nobody_knows_this", {1, 2}}};
  EXPECT_EQ(chat(fields).status, 200);
}

TEST_F(ApiTest, BodiesThatAreNoJsonNameTheByte) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "byte 0"},
      {"{", "byte 1"},
      {"[1,2", "byte 4"},
      {"\xff\xfe", "byte 0"},
      {R"({"a":1}{"b":2})", "byte 7"},
      {R"({"prompt":"\ud83d"})", "byte"},
      {R"({"prompt":"x \ude00 y"})", "byte"},
      {R"({"prompt":"\ude00\ud83d"})", "byte"},
      {std::string(100'000, '['), "64 deep"},
      {R"({"x":)" + std::string(70, '[') + std::string(70, ']') + "}", "64 deep"},
      {R"({"prompt":"a","prompt":"b"})", "'prompt' appears twice"},
  };
  for (const auto& [body, says] : cases)
    for (const char* path : {kChat, kText}) {
      const Answer answer = post_text(path, body);
      ASSERT_EQ(answer.status, 400) << body.substr(0, 40) << answer.body;
      EXPECT_EQ(answer.error().at("code"), "invalid_json");
      EXPECT_NE(answer.error().at("message").get<std::string>().find(says), std::string::npos) << answer.body;
    }
  for (const char* body : {"null", "5", "\"text\"", "[1]"}) EXPECT_EQ(post_text(kChat, body).param(), "body");
  EXPECT_EQ(post_text(kText, R"({"prompt":"ok \ud83d\ude00"})").status, 200);
}

// As a status, whoever asks and whether it would stream.
TEST_F(ApiTest, HalfASurrogatePairAndANumberOutOfRangeNameTheField) {
  const std::string half = R"("\ud83d")", chat = R"({"messages":[{"role":"user","content":)";
  const std::vector<std::tuple<const char*, std::string, const char*>> cases = {
      {kChat, chat + half + "}]}", "messages[0].content"},
      {kChat, chat + half + R"(}],"stream":true})", "messages[0].content"},
      {kChat, chat + R"("a"}],"logit_bias":{"1":1e400},"stream":true})", "logit_bias[1]"},
      {kText, R"({"prompt":["a",)" + half + "]}", "prompt[1]"},
      {kText, R"({"prompt":"a","temperature":1e400})", "temperature"},
      {"/v1/messages", chat + "[{\"type\":\"text\",\"text\":" + half + R"(}]}],"stream":true})",
       "messages[0].content[0].text"},
      {"/v1/messages/count_tokens", chat + half + "}]}", "messages[0].content"},
      {"/v1/responses", R"({"input":)" + half + R"(,"stream":true})", "input"},
      {"/tokenize", R"({"content":)" + half + "}", "content"},
  };
  for (const auto& [path, body, field] : cases) {
    const Answer answer = post_text(path, body);
    ASSERT_EQ(answer.status, 400) << body << answer.body << answer.stream;
    const bool number = body.find("1e400") != std::string::npos;
    const std::string says = number ? " is out of range" : R"( holds half of a surrogate pair (\ud83d))";
    EXPECT_TRUE(answer.error().at("message").get<std::string>().starts_with(field + says)) << answer.body;
    if (std::string_view(path).starts_with("/v1/messages")) continue;  // its errors have no param
    EXPECT_EQ(answer.param(), field);
    EXPECT_EQ(answer.error().at("code"), number ? "invalid_value" : "invalid_json");
  }
  EXPECT_TRUE(backend.requests.empty());
}

TEST_F(ApiTest, NumbersInMessagesAreAsTheyWereSent) {
  for (const auto& [fields, message] : std::vector<std::pair<const char*, const char*>>{
           {R"({"logit_bias":{"1":1000}})", "logit_bias[1] is 1000, outside -100 to 100"},
           {R"({"logit_bias":{"1":100.1}})", "logit_bias[1] is 100.1, outside -100 to 100"},
           {R"({"logit_bias":{"1":1e39}})", "logit_bias[1] should be a number from -100 to 100"},
           {R"({"temperature":-0.5})", "temperature is -0.5, outside 0 to 100"},
           {R"({"temperature":1e300})", "temperature is 1e+300, outside 0 to 100"},
           {R"({"top_p":1.0000001})", "top_p is 1.0000001, outside 1e-09 to 1"},
           {R"({"presence_penalty":3})", "presence_penalty is 3, outside -2 to 2"},
           {R"({"repetition_penalty":0})", "repetition_penalty is 0, outside 0.001 to 100"}})
    EXPECT_EQ(chat(Json::parse(fields)).error().at("message"), message);
}

TEST_F(ApiTest, AnEmptyModelIsAMissingOne) {
  for (const bool strict : {false, true}) {
    model.strict_name = strict;
    for (const Json& fields : {Json{{"model", ""}}, Json{{"model", nullptr}}, Json::object()}) {
      const Answer answer = chat(fields);
      EXPECT_EQ(answer.status, 200) << answer.body;
      EXPECT_EQ(answer.json().at("model"), "org/demo");
      EXPECT_EQ(answer.headers.count("x-thermocline-warning"), 0u);
      EXPECT_EQ(streamed(kChat, fields).events()[0].at("model"), "org/demo");
    }
    const Answer counted = post("/tokenize", {{"model", ""}, {"content", "a"}});
    EXPECT_EQ(counted.status, 200) << counted.body;
    EXPECT_EQ(counted.headers.count("x-thermocline-warning"), 0u);
  }
}

std::string object_of(size_t keys, const std::string& more = "") {
  std::string body = "{\"prompt\":\"a\"";
  for (size_t i = 1; i < keys; ++i) body += ",\"key" + std::to_string(i) + "\":1";
  return body + more + "}";
}

// The 40,000 keys that cost 0.9 s: an object ends at its cap, however many more follow, and a repeated key is found
// among many as among few.
TEST_F(ApiTest, ObjectsHaveACapOfKeys) {
  EXPECT_EQ(post_text(kText, object_of(10'000)).status, 200);
  for (const size_t keys : {10'001, 40'000}) {
    const Answer answer = post_text(kText, object_of(keys));
    EXPECT_EQ(answer.status, 400);
    EXPECT_NE(answer.body.find("more than 10000 keys"), std::string::npos) << answer.body;
  }
  for (const size_t keys : {3, 16, 17, 18, 9'000}) {
    const Answer answer = post_text(kText, object_of(keys, ",\"key1\":2"));
    EXPECT_NE(answer.body.find("'key1' appears twice"), std::string::npos) << keys << answer.body;
  }
  std::string many = "{\"prompt\":\"a\",\"x\":[0";
  for (int i = 0; i < 100'000; ++i) many += ",0";
  EXPECT_NE(post_text(kText, many + "]}").body.find("values"), std::string::npos);
}

TEST_F(ApiTest, PromptsOfIdsUpToTheContextPass) {
  const Json ids(std::vector<int32_t>(1000, 7));
  EXPECT_EQ(post(kText, {{"prompt", Json(std::vector<Json>(64, ids))}}).status, 200);
  EXPECT_EQ(backend.requests.size(), 64u);
  EXPECT_EQ(last().prompt.size(), 1000u);
}

TEST_F(ApiTest, TextThatCannotFitIsRefusedBeforeItIsTokenised) {
  const std::string text(model.most_text_bytes() + 1, 'x');
  const Answer text_answer = post(kText, {{"prompt", {"a", text}}});
  EXPECT_EQ(text_answer.status, 400);
  EXPECT_EQ(text_answer.param(), "prompt[1]");
  EXPECT_EQ(text_answer.error().at("code"), "context_length_exceeded");
  EXPECT_EQ(text_answer.error().at("n_ctx"), 1024);
  EXPECT_FALSE(text_answer.error().contains("n_prompt_tokens")) << "nobody counted them";
  EXPECT_GE(text_answer.error().at("n_prompt_tokens_min"), 1024);
  const Answer chat_answer = chat({{"messages", {{{"role", "user"}, {"content", text}}}}, {"stream", true}});
  EXPECT_EQ(chat_answer.status, 400);
  EXPECT_EQ(chat_answer.param(), "messages");
  EXPECT_EQ(chat_answer.error().at("code"), "context_length_exceeded");
}

TEST_F(ApiTest, TheEnginesRefusalsNameTheEndpointsField) {
  Error error{ErrorCode::context_length, "the prompt has 9 tokens", "prompt"};
  error.counts = {{"n_prompt_tokens", 9}, {"n_ctx", 8}};
  backend.refusal = error;
  EXPECT_EQ(chat({}).param(), "messages");
  const Answer answer = post(kText, {{"prompt", "a"}});
  EXPECT_EQ(answer.param(), "prompt");
  EXPECT_EQ(answer.error().at("n_prompt_tokens"), 9);
  EXPECT_EQ(answer.error().at("n_ctx"), 8);
  EXPECT_EQ(backend.counters->waiting().requests, 0);
}

TEST_F(ApiTest, OfSeveralPromptsAllOrNoneRun) {
  int count = 0;
  backend.script = nullptr;
  backend.on_submit = [&] {
    if (++count == 3) backend.refusal = Error{ErrorCode::overloaded, "full"};
  };
  const Answer answer = post(kText, {{"prompt", {"a", "b", "c"}}});
  EXPECT_EQ(answer.status, 429);
  ASSERT_EQ(backend.handles.size(), 2u);
  for (const auto& handle : backend.handles) EXPECT_TRUE(handle->cancelled());
}

// --- before the body ---

TEST_F(ApiTest, PathsAndMethods) {
  for (const char* path :
       {"/health", "/v1/health", "/version", "/v1/models", "/v1/models/", "/v1/models?x=1", "/models", "/v1//models",
        "/v1/models/org/demo", "/v1/models/org%2Fdemo", "/models/org/demo"})
    EXPECT_EQ(get(path).status, 200) << path;
  for (const char* path :
       {"/v1/completions", "/v1/v1/completions", "/completions", "/v1/completions/", "/v1/completions?a"})
    EXPECT_EQ(post(path, {{"prompt", "a"}}).status, 200) << path;
  EXPECT_EQ(get("/v1/models").json().at("data")[0].at("id"), "org/demo");
  EXPECT_EQ(get("/v1/models").json().at("data")[0].at("max_model_len"), 1024);
  EXPECT_EQ(get("/v1/models/gpt").error().at("code"), "model_not_found");

  const Answer unknown = get("/v1/nothing/of/the/kind");
  EXPECT_EQ(unknown.status, 404);
  EXPECT_NE(unknown.body.find("/v1/chat/completions, "), std::string::npos) << unknown.body;
  for (const auto& [asked, meant] : {std::pair("/v1/chat/completion", kChat),
                                     {"/V1/Chat/Completions", kChat},
                                     {"/v1/complete", "/v1/completions"},
                                     {"/healthz", "/health"}}) {
    const Answer near = post(asked, Json::object());
    EXPECT_EQ(near.status, 404) << asked;
    if (std::string_view(asked) != "/v1/complete") {
      EXPECT_NE(near.body.find(std::string("did you mean ") + meant + "?"), std::string::npos) << near.body;
    }
  }
  const Answer wrong = get(kChat);
  EXPECT_EQ(wrong.status, 405);
  EXPECT_EQ(wrong.headers.at("Allow"), "POST");
  EXPECT_EQ(ask_with(head_of("DELETE", "/v1/models"), "").headers.at("Allow"), "GET, HEAD");
  const Answer cancel = get("/v1/responses/resp_1/cancel");
  EXPECT_EQ(cancel.status, 405) << "no response has the id resp_1/cancel";
  EXPECT_EQ(cancel.headers.at("Allow"), "POST");
}

TEST_F(ApiTest, BodiesShouldBeJson) {
  for (const char* type : {"", "application/json", "APPLICATION/JSON", "application/json; charset=utf-8",
                           "application/json ;charset=utf-8", "application/vnd.api+json"}) {
    HttpHead head = head_of("POST", kText);
    head.content_type = type;
    EXPECT_EQ(ask_with(head, R"({"prompt":"a"})").status, 200) << type;
  }
  for (const char* type : {"application/x-www-form-urlencoded", "text/plain", "application/jsonx", "json"}) {
    HttpHead head = head_of("POST", kText);
    head.content_type = type;
    const Answer answer = ask_with(head, R"({"prompt":"a"})");
    EXPECT_EQ(answer.status, 415) << type;
    EXPECT_NE(answer.body.find("content-type: application/json"), std::string::npos) << answer.body;
    EXPECT_NE(answer.body.find(type), std::string::npos) << answer.body;
  }
}

TEST_F(ApiTest, AFullQueueRefusesBeforeTheBody) {
  std::vector<QueueTicket> others;
  for (int i = 0; i < 8; ++i) others.push_back(backend.ticket({1, 1, 1}).value());
  const std::optional<Reply> refused = api->check(head_of("POST", kChat, "{}"));
  ASSERT_TRUE(refused);
  EXPECT_EQ(refused->status, 429);
  EXPECT_EQ(refused->headers[0].first, "Retry-After");
  others.pop_back();
  EXPECT_FALSE(api->check(head_of("POST", kChat, "{}")));
  EXPECT_EQ(backend.counters->waiting().requests, 7) << "what check() took to see is given back";
  // It fills up while the body is on its way.
  others.push_back(backend.ticket({1, 1, 1}).value());
  EXPECT_EQ(std::get<Reply>(api->handle({head_of("POST", kChat, "{}"), "{}"})).status, 429);
}

// A body counts for no more tokens than a context holds, so that a large one finds its place in an empty queue.
TEST_F(ApiTest, ALargeBodyFitsAnEmptyQueue) {
  backend.counters = std::make_shared<QueueCounters>(QueueCaps{.requests = 2, .tokens = 2048});
  EXPECT_EQ(post_text(kText, R"({"prompt":"a","x":")" + std::string(100'000, 'x') + "\"}").status, 200);
}

TEST_F(ApiTest, BodiesAreLimitedByTheContext) {
  EXPECT_EQ(api->body_limit(head_of("POST", kChat)), std::min<uint64_t>(32 << 20, model.most_body_bytes()));
  EXPECT_LT(model.most_body_bytes(), uint64_t{32} << 20);
  EXPECT_LE(api->body_limit(head_of("GET", "/health")), uint64_t{1} << 16);
}

TEST(Api, AnswersWhileItLoads) {
  const std::unique_ptr<AccessLog> log = AccessLog::open("").value();
  FakeBackend backend;
  const ServedModel model{
      .backend = &backend, .tokenizer = test::demo_tokenizer(), .constants = ProseConstants(), .name = "m"};
  Api api({}, *log);
  api.loading(0.42);
  const auto health = [&] { return std::get<Reply>(api.handle({head_of("GET", "/health"), ""})); };
  EXPECT_EQ(health().status, 503);
  EXPECT_EQ(parse_json(health().body).value().at("error").at("progress"), 0.42);
  EXPECT_EQ(parse_json(health().body).value().at("error").at("type"), "unavailable_error");
  EXPECT_EQ(std::get<Reply>(api.handle({head_of("GET", "/version"), ""})).status, 200);
  EXPECT_EQ(std::get<Reply>(api.handle({head_of("GET", "/v1/models"), ""})).status, 503);
  EXPECT_EQ(api.check(head_of("POST", kChat)).value().status, 503);

  api.serve(model);
  EXPECT_EQ(health().status, 200);
  EXPECT_EQ(parse_json(health().body).value().at("running"), 3);
  EXPECT_FALSE(api.check(head_of("POST", kChat)));

  backend.now = {EngineHealth::State::failed, "the device is gone"};
  EXPECT_EQ(health().status, 503);
  EXPECT_NE(health().body.find("the device is gone"), std::string::npos);
  EXPECT_EQ(api.check(head_of("POST", kChat)).value().status, 503);
  backend.now = {};
  api.drain();
  EXPECT_EQ(health().status, 503);
  EXPECT_NE(health().body.find("stopping"), std::string::npos);
  EXPECT_EQ(std::get<Reply>(api.handle({head_of("POST", kChat), "{}"})).status, 503);
}

}  // namespace
}  // namespace thermocline::server
