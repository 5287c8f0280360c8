// The APIs: what a request becomes for the engine, and what a client gets of its answer.
#include "runtime/server/api/logprobs.h"
#include "tests/server/api_fixture.h"

namespace thermocline::server {
namespace {

// --- what a request becomes ---

TEST_F(ApiTest, FieldsReachTheEngine) {
  HttpHead head = head_of("POST", kText);
  head.authorization = "Bearer secret";
  const auto before = Request::Clock::now();
  ask_with(head, R"({"prompt":[3,4],"temperature":0.5,"top_p":0.9,"top_k":7,"min_p":0.1,"repetition_penalty":1.1,
    "presence_penalty":0.2,"frequency_penalty":0.3,"seed":-1,"logit_bias":{"5":-100,"6":2.5},"max_tokens":9,"min_tokens":2,
    "stop":["x","yy"],"include_stop_str_in_output":true,"stop_token_ids":[8],"ignore_eos":true,"skip_special_tokens":false,
    "n":2,"logprobs":3,"priority":4,"cache_salt":"s","timeout":1000})");
  const Request& r = last();
  EXPECT_EQ(r.prompt, (std::vector<int32_t>{3, 4}));
  EXPECT_FLOAT_EQ(r.sampling.temperature, 0.5f);
  EXPECT_FLOAT_EQ(r.sampling.top_p, 0.9f);
  EXPECT_EQ(r.sampling.top_k, 7);
  EXPECT_FLOAT_EQ(r.sampling.min_p, 0.1f);
  EXPECT_FLOAT_EQ(r.sampling.repetition_penalty, 1.1f);
  EXPECT_FLOAT_EQ(r.sampling.presence_penalty, 0.2f);
  EXPECT_FLOAT_EQ(r.sampling.frequency_penalty, 0.3f);
  EXPECT_TRUE(r.sampling.has_seed);
  EXPECT_EQ(r.sampling.seed, UINT64_MAX);
  EXPECT_EQ(r.sampling.logit_bias, (std::vector<std::pair<int32_t, float>>{{5, -100.f}, {6, 2.5f}}));
  EXPECT_EQ(r.max_tokens, 9);
  EXPECT_EQ(r.min_tokens, 2);
  EXPECT_EQ(r.stop, (std::vector<std::string>{"x", "yy"}));
  EXPECT_TRUE(r.include_stop);
  EXPECT_EQ(r.stop_token_ids, std::vector<int32_t>{8});
  EXPECT_TRUE(r.ignore_eos);
  EXPECT_FALSE(r.skip_special_tokens);
  EXPECT_EQ(r.choices, 2);
  EXPECT_EQ(r.top_logprobs, 3);
  EXPECT_EQ(r.prompt_top_logprobs, -1);
  EXPECT_EQ(r.priority, 4);
  EXPECT_EQ(r.cache_salt, "s");
  EXPECT_GE(r.deadline, before + std::chrono::seconds(999));
  EXPECT_LE(r.deadline, Request::Clock::now() + std::chrono::seconds(1000));
  EXPECT_EQ(r.id, "req-1");
  EXPECT_EQ(r.key, key_name(head));
}

TEST_F(ApiTest, DefaultsAreThoseOfTheEndpoints) {
  post(kText, {{"prompt", "In the beginning"}});
  EXPECT_EQ(last().max_tokens, 16);
  EXPECT_EQ(last().prompt[0], bos());
  EXPECT_EQ(last().top_logprobs, -1);
  EXPECT_EQ(last().deadline, Request::Clock::time_point::max());
  post(kText, {{"prompt", "<｜begin▁of▁sentence｜>In"}});
  EXPECT_EQ(std::count(last().prompt.begin(), last().prompt.end(), bos()), 1);
  post(kText, {{"prompt", "In the beginning"}, {"add_special_tokens", false}});
  EXPECT_EQ(last().prompt, test::demo_tokenizer().encode("In the beginning").value());
  EXPECT_EQ(post(kText, {{"prompt", ""}, {"add_special_tokens", false}}).status, 400);
  model.defaults.temperature = 0.25;  // of its generation_config.json
  chat({});
  EXPECT_EQ(last().sampling.temperature, 0.25);
  chat({{"temperature", 0.5}});
  EXPECT_EQ(last().sampling.temperature, 0.5);
  chat({});
  EXPECT_EQ(last().max_tokens, -1) << "left to LoopOptions::default_max_tokens";
  chat({{"max_tokens", 5}, {"max_completion_tokens", 7}});
  EXPECT_EQ(last().max_tokens, 7);
}

TEST_F(ApiTest, PromptsOfAllShapes) {
  backend.script = [](const Request& request, RequestHandle& handle) {
    put_token(handle, 0, 1, std::to_string(request.prompt.back()));
    put_end(handle, 0, FinishReason::stop);
  };
  const Answer answer = post(kText, {{"prompt", {Json::array({5, 9}), Json::array({6}), "x"}}});
  const Json choices = answer.json().at("choices");
  ASSERT_EQ(choices.size(), 3u);
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(choices[i].at("index"), i);
  EXPECT_EQ(choices[0].at("text"), "9");
  EXPECT_EQ(choices[1].at("text"), "6");
  EXPECT_EQ(answer.json().at("usage").at("prompt_tokens"), 2 + 1 + 2);
  EXPECT_EQ(answer.json().at("usage").at("completion_tokens"), 3);
}

TEST_F(ApiTest, ThinkingAndContinuation) {
  chat({});
  EXPECT_TRUE(text_of(last()).ends_with("<｜Assistant｜></think>")) << text_of(last());
  for (const Json& fields : {Json{{"thinking", {{"type", "enabled"}}}}, Json{{"reasoning_effort", "high"}},
                             Json{{"chat_template_kwargs", {{"enable_thinking", true}}}}}) {
    chat(fields);
    EXPECT_TRUE(text_of(last()).ends_with("<｜Assistant｜><think>")) << fields << text_of(last());
  }
  for (const char* effort : {"none", "minimal"}) {
    chat({{"reasoning_effort", effort}});
    EXPECT_TRUE(text_of(last()).ends_with("</think>")) << effort;
  }
  Json messages = kHello;
  messages.push_back({{"role", "assistant"}, {"content", "1, 2,"}});
  chat({{"messages", messages}, {"continue_final_message", true}, {"add_generation_prompt", false}});
  EXPECT_TRUE(text_of(last()).ends_with("1, 2,")) << text_of(last());
  const Answer open = chat({{"messages", messages}});
  EXPECT_EQ(open.status, 400) << "an answer that is not to be continued";
  messages[1]["prefix"] = true;
  EXPECT_EQ(chat({{"messages", messages}}).status, 200);
}

// --- what a client gets ---

// The message of a streamed choice put together, with what must hold of chunks.
Json assembled(const std::vector<Json>& events, int index) {
  Json message;
  int roles = 0;
  std::string finish;
  std::set<std::string> ids;
  for (const Json& event : events) {
    ids.insert(event.at("id").get<std::string>());
    if (event.at("choices").empty() || event.at("choices")[0].at("index") != index) continue;
    const Json& choice = event.at("choices")[0];
    EXPECT_TRUE(finish.empty()) << "a chunk behind the last";
    if (!choice.at("finish_reason").is_null()) finish = choice.at("finish_reason").get<std::string>();
    for (const auto& [key, value] : choice.at("delta").items()) {
      if (key == "role") {
        EXPECT_TRUE(message.is_null()) << "the role comes first";
        message["role"] = value;
        ++roles;
      } else if (key == "tool_calls") {
        for (const Json& part : value) {
          const size_t at = part.at("index").get<size_t>();
          if (at == message["tool_calls"].size()) {
            EXPECT_EQ(part.at("type"), "function");
            message["tool_calls"].push_back({{"type", "function"}, {"function", part.at("function")}});
            EXPECT_TRUE(part.at("id").is_string());
          } else {
            EXPECT_FALSE(part.contains("id") || part.contains("type") || part.at("function").contains("name")) << part;
            Json& arguments = message["tool_calls"][at]["function"]["arguments"];
            arguments = arguments.get<std::string>() + part.at("function").at("arguments").get<std::string>();
          }
        }
      } else {
        message[key] = (message.contains(key) ? message[key].get<std::string>() : "") + value.get<std::string>();
      }
    }
  }
  EXPECT_EQ(roles, 1);
  EXPECT_EQ(ids.size(), 1u);
  message["finish_reason"] = finish;
  return message;
}

// The same of a plain choice.
Json plain_message(const Json& choice) {
  Json message = choice.at("message");
  if (message.contains("tool_calls"))
    for (Json& call : message["tool_calls"]) call.erase("id");
  if (message.at("content").is_null()) message.erase("content");
  message["finish_reason"] = choice.at("finish_reason");
  return message;
}

void expect_same_message(const Json& a, const Json& b) {
  EXPECT_EQ(parse_sorted_json(dump_json(a)).value(), parse_sorted_json(dump_json(b)).value());
}

const std::string kCall =
    "<｜DSML｜invoke name=\"get_weather\">\n<｜DSML｜parameter name=\"city\" string=\"true\">Oslo "
    "ø</｜DSML｜parameter>\n</｜DSML｜invoke>\n";
const std::string kCalls = "\n\n<｜DSML｜tool_calls>\n" + kCall + kCall + "</｜DSML｜tool_calls>";
const Json kTools =
    Json::array({Json{{"type", "function"},
                      {"function",
                       {{"name", "get_weather"},
                        {"parameters", {{"type", "object"}, {"properties", {{"city", {{"type", "string"}}}}}}}}}}});

TEST_F(ApiTest, StreamsSayWhatRepliesSay) {
  const Json thinks = {{"thinking", {{"type", "enabled"}}}};
  for (const std::string& text :
       std::vector<std::string>{"A plain answer.", "I think.</think>The answer", "only thoughts",
                                "I think.</think>Calling." + kCalls, "</think>" + kCalls, "", "</think>"})
    for (const FinishReason reason : {FinishReason::stop, FinishReason::length}) {
      backend.script = saying(characters_of(text), reason);
      Json fields = thinks;
      fields["tools"] = kTools;
      fields["n"] = 3;
      const Json plain = chat(fields).json();
      fields["stream_options"] = {{"include_usage", true}};
      const std::vector<Json> events = streamed(kChat, fields).events();
      ASSERT_EQ(plain.at("choices").size(), 3u);
      for (int i = 0; i < 3; ++i) {
        const Json& choice = plain.at("choices")[static_cast<size_t>(i)];
        EXPECT_EQ(choice.at("index"), i);
        Json stream = assembled(events, i), whole = plain_message(choice);
        for (Json* const message : {&stream, &whole})
          if (message->value("content", "") == "") message->erase("content");
        expect_same_message(stream, whole);
      }
      EXPECT_EQ(events.back().at("usage"), plain.at("usage")) << text;
      EXPECT_TRUE(events.back().at("choices").empty());
      EXPECT_EQ(plain.at("object"), "chat.completion");
      EXPECT_EQ(events[0].at("object"), "chat.completion.chunk");
      EXPECT_EQ(plain.at("model"), "org/demo");
    }
}

TEST_F(ApiTest, StrictIsNoPartOfATool) {
  backend.script = saying({"x"});
  EXPECT_EQ(chat({{"tools", kTools}}).status, 200);
  const std::string prompt = text_of(last());
  Json strict = kTools;
  strict[0]["function"]["strict"] = true;
  EXPECT_EQ(chat({{"tools", strict}}).status, 200);
  EXPECT_EQ(text_of(last()), prompt);
}

TEST_F(ApiTest, CallsAndReasoning) {
  backend.script = saying(characters_of("Why.</think>Look:" + kCalls));
  const Json choice =
      chat({{"thinking", {{"type", "enabled"}}}, {"tools", kTools}, {"model", "some name"}}).json().at("choices")[0];
  EXPECT_EQ(choice.at("finish_reason"), "tool_calls");
  EXPECT_EQ(choice.at("message").at("reasoning_content"), "Why.");
  EXPECT_EQ(choice.at("message").at("content"), "Look:");
  const Json& calls = choice.at("message").at("tool_calls");
  ASSERT_EQ(calls.size(), 2u);
  EXPECT_NE(calls[0].at("id"), calls[1].at("id"));
  EXPECT_EQ(calls[1].at("function").at("name"), "get_weather");
  EXPECT_EQ(parse_json(calls[1].at("function").at("arguments").get<std::string>()).value(), Json({{"city", "Oslo ø"}}));
  // What the parser reads as markup is let through, other special tokens are not.
  const std::set<int32_t> shown(last().shown_special.begin(), last().shown_special.end());
  EXPECT_EQ(shown,
            (std::set<int32_t>{*test::demo_tokenizer().id_of("</think>"), *test::demo_tokenizer().id_of("｜DSML｜")}));
}

// Cut anywhere, an answer never ends in half a call, nor in markup, nor in another reason than its length.
TEST_F(ApiTest, CutAnswersHaveNoHalfCalls) {
  const std::vector<std::string> pieces = characters_of("Look:" + kCalls);
  for (size_t n = 1; n < pieces.size(); ++n) {
    backend.script = saying({pieces.begin(), pieces.begin() + static_cast<std::ptrdiff_t>(n)}, FinishReason::length);
    const Json fields = {{"tools", kTools}};
    const Json choice = chat(fields).json().at("choices")[0];
    EXPECT_EQ(choice.at("finish_reason"), "length") << n;
    const Json message = plain_message(choice);
    const std::string content = message.value("content", "");
    EXPECT_EQ(content.find("DSML"), std::string::npos) << content;
    EXPECT_EQ(content.find("<"), std::string::npos) << content;
    EXPECT_TRUE(std::string("Look:\n\n").starts_with(content)) << content;
    for (const Json& call : message.value("tool_calls", Json::array()))
      EXPECT_EQ(parse_json(call.at("function").at("arguments").get<std::string>()).value(), Json({{"city", "Oslo ø"}}));
    Json stream = assembled(streamed(kChat, fields).events(), 0);
    expect_same_message(stream, message);
  }
}

TEST_F(ApiTest, UsageCountsAsItGoes) {
  const std::vector<std::string> pieces = {"why", " so", "</think>", "because", "."};
  backend.script = [&](const Request& request, RequestHandle& handle) {
    for (size_t i = 0; i < pieces.size(); ++i)
      for (int choice = 0; choice < request.choices; ++choice) put_token(handle, choice, 100, pieces[i]);
    for (int choice = 0; choice < request.choices; ++choice)
      put_end(handle, choice, FinishReason::stop, {}, {.prompt_tokens = 5, .completion_tokens = 5, .cached_tokens = 4});
  };
  const Json fields = {{"thinking", {{"type", "enabled"}}},
                       {"n", 2},
                       {"stream_options", {{"include_usage", true}, {"continuous_usage_stats", true}}}};
  const std::vector<Json> events = streamed(kChat, fields).events();
  const int64_t prompt = static_cast<int64_t>(last().prompt.size());
  int64_t completion = 0;
  for (const Json& event : events) {
    EXPECT_EQ(event.at("usage").at("prompt_tokens"), prompt) << "a prompt counts once, whatever n is";
    EXPECT_GE(event.at("usage").at("completion_tokens").get<int64_t>(), std::max<int64_t>(completion, 1));
    completion = event.at("usage").at("completion_tokens").get<int64_t>();
  }
  const Json usage = events.back().at("usage");
  EXPECT_EQ(usage.at("completion_tokens"), 10);
  EXPECT_EQ(usage.at("total_tokens"), prompt + 10);
  EXPECT_EQ(usage.at("completion_tokens_details").at("reasoning_tokens"), 4) << "two of each choice";
  EXPECT_EQ(usage.at("prompt_tokens_details").at("cached_tokens"), 4);
  for (const Json& event : streamed(kChat, Json::object()).events()) EXPECT_FALSE(event.contains("usage"));
}

SampledToken sampled(int32_t id, float logprob, std::vector<TokenLogprob> top = {}) {
  return {id, logprob, std::move(top)};
}

TEST_F(ApiTest, ChatLogprobs) {
  const int32_t half = [] {  // a token that is part of a character
    for (int32_t id = 0; id < test::demo_tokenizer().size(); ++id)
      if (test::demo_tokenizer().token_bytes(id).size() == 1 &&
          static_cast<unsigned char>(test::demo_tokenizer().token_bytes(id)[0]) >= 0x80)
        return id;
    return -1;
  }();
  ASSERT_GE(half, 0);
  const int32_t a = test::demo_tokenizer().encode("a").value()[0], b = test::demo_tokenizer().encode("b").value()[0];
  backend.script = [&](const Request& request, RequestHandle& handle) {
    EXPECT_EQ(request.top_logprobs, 2);
    put_token(handle, 0, a, "", sampled(a, -0.5f, {{a, -0.5f}, {b, -1.25f}}));  // its text is held back
    put_token(handle, 0, b, "ab", sampled(b, -INFINITY, {{a, -0.1f}, {half, -3}}));
    put_token(handle, 0, half, "", sampled(half, -2, {{half, -2}}));
    put_end(handle, 0, FinishReason::stop);
  };
  const Json fields = {{"logprobs", true}, {"top_logprobs", 2}};
  const Json content = chat(fields).json().at("choices")[0].at("logprobs").at("content");
  ASSERT_EQ(content.size(), 3u);
  EXPECT_EQ(content[0].at("token"), "a");
  EXPECT_EQ(content[0].at("logprob"), -0.5);
  EXPECT_EQ(content[0].at("bytes"), Json::array({97}));
  EXPECT_EQ(content[0].at("top_logprobs").size(), 2u);
  EXPECT_EQ(content[0].at("top_logprobs")[0].at("logprob"), content[0].at("logprob"));
  EXPECT_EQ(content[0].at("top_logprobs")[1].at("token"), "b");
  EXPECT_TRUE(content[1].at("logprob").is_null()) << "JSON has no infinity";
  EXPECT_EQ(content[2].at("bytes"),
            Json::array({static_cast<unsigned char>(test::demo_tokenizer().token_bytes(half)[0])}));
  EXPECT_EQ(content[2].at("token"), "\xef\xbf\xbd");
  Json told = Json::array();
  for (const Json& event : streamed(kChat, fields).events())
    for (const Json& entry : event.at("choices")[0].at("logprobs").at("content")) told.push_back(entry);
  EXPECT_EQ(told, content);

  backend.script = saying({"a"});
  EXPECT_TRUE(chat({}).json().at("choices")[0].at("logprobs").is_null());
  EXPECT_EQ(last().top_logprobs, -1);
}

// An answer with a log-probability of -(position + 1) for every token of prompt and answer.
void scored(const Request& request, RequestHandle& handle) {
  const auto token = [&](int32_t id, size_t t) {
    const float logprob = -static_cast<float>(t + 1);
    return sampled(id, logprob, {{7, -0.5f}, {id, logprob}});
  };
  const size_t length = request.prompt.size();
  const auto prompt = [&] {
    TokenEvent event;
    event.kind = TokenEvent::Kind::prompt;
    event.prompt_logprobs.push_back({request.prompt[0], 0, {}});
    for (size_t t = 1; t < length; ++t) event.prompt_logprobs.push_back(token(request.prompt[t], t));
    handle.stream().push(std::move(event));
  };
  const std::vector<int32_t> answer = test::demo_tokenizer().encode(" Oslo.").value();
  // The choice that scores the prompt is the last, as it needs more of the step.
  for (int choice = request.choices - 1; choice >= 0; --choice) {
    if (choice == 0 && request.prompt_top_logprobs >= 0) prompt();
    for (size_t t = 0; t < std::min<size_t>(answer.size(), static_cast<size_t>(request.max_tokens)); ++t)
      put_token(handle, choice, answer[t], std::string(test::demo_tokenizer().token_bytes(answer[t])),
                request.top_logprobs < 0 ? std::optional<SampledToken>() : token(answer[t], length + t));
    put_end(handle, choice, FinishReason::length);
  }
}

// lm-eval's local-completions: token ids, echo, logprobs, one token; it reads [ctxlen:-1] and compares a token's number
// with the largest of its table.
TEST_F(ApiTest, EchoScoresThePrompt) {
  backend.script = scored;
  const std::vector<int32_t> ids = test::demo_tokenizer().encode("The capital of Norway is").value();
  for (const int64_t max_tokens : {0, 1, 2}) {
    const Answer answer =
        post(kText, {{"prompt", ids}, {"echo", true}, {"logprobs", 1}, {"max_tokens", max_tokens}, {"temperature", 0}});
    ASSERT_EQ(answer.status, 200) << answer.body;
    EXPECT_EQ(last().max_tokens, max_tokens);
    EXPECT_EQ(last().prompt_top_logprobs, 1);
    const Json choice = answer.json().at("choices")[0], logprobs = choice.at("logprobs");
    const size_t count = ids.size() + static_cast<size_t>(max_tokens);
    for (const char* list : {"tokens", "token_logprobs", "top_logprobs", "text_offset"})
      EXPECT_EQ(logprobs.at(list).size(), count) << list;
    EXPECT_TRUE(choice.at("text").get<std::string>().starts_with("The capital of Norway is"));
    EXPECT_TRUE(logprobs.at("token_logprobs")[0].is_null());
    EXPECT_TRUE(logprobs.at("top_logprobs")[0].is_null());
    for (size_t t = 1; t < count; ++t) {
      EXPECT_EQ(logprobs.at("token_logprobs")[t], -static_cast<double>(t + 1));
      const Json& top = logprobs.at("top_logprobs")[t];
      EXPECT_EQ(top.at(logprobs.at("tokens")[t].get<std::string>()), logprobs.at("token_logprobs")[t]);
      EXPECT_EQ(top.begin().value(), -0.5) << "the likeliest is listed";
    }
    EXPECT_EQ(answer.json().at("usage").at("completion_tokens"), max_tokens);
  }
}

TEST_F(ApiTest, PromptLogprobsAreToldAsVllmDoes) {
  backend.script = scored;
  const Json asks = {{"prompt_logprobs", 1}, {"max_tokens", 1}, {"temperature", 0}};
  const auto check = [&](const Json& told) {
    const std::vector<int32_t> prompt = last().prompt;
    EXPECT_EQ(last().prompt_top_logprobs, 1);
    ASSERT_EQ(told.size(), prompt.size());
    EXPECT_TRUE(told[0].is_null());
    for (size_t t = 1; t < told.size(); ++t) {
      const Json& own = told[t].at(std::to_string(prompt[t]));
      EXPECT_EQ(own.at("logprob"), -static_cast<double>(t + 1));
      EXPECT_EQ(own.at("rank"), prompt[t] == 7 ? 1 : 2);
      EXPECT_EQ(own.at("decoded_token"), token_text(test::demo_tokenizer(), prompt[t]));
      EXPECT_EQ(told[t].at("7").at("rank"), prompt[t] == 7 ? 2 : 1) << "the likeliest is there too";
    }
  };
  check(chat(asks).json().at("prompt_logprobs"));
  Json text = asks;
  text["prompt"] = "The capital of Norway is";
  check(post(kText, text).json().at("choices")[0].at("prompt_logprobs"));
  text["echo"] = true;
  text["logprobs"] = 1;
  const Json echoed = post(kText, text).json().at("choices")[0];
  check(echoed.at("prompt_logprobs"));
  EXPECT_EQ(echoed.at("logprobs").at("tokens").size(), last().prompt.size() + 1);
  const Json plain = chat({}).json();
  EXPECT_FALSE(plain.contains("prompt_logprobs"));
  EXPECT_EQ(last().prompt_top_logprobs, -1);
}

TEST_F(ApiTest, ChatsTellTheirTokenIds) {
  backend.script = [](const Request&, RequestHandle& handle) {
    for (const auto& [id, text] : {std::pair(11, ""), std::pair(12, "ab"), std::pair(13, "")})
      put_token(handle, 0, id, text);
    put_end(handle, 0, FinishReason::stop);
  };
  const Json ids = Json::array({11, 12, 13});
  const Json body = chat({{"return_token_ids", true}}).json();
  EXPECT_EQ(body.at("choices")[0].at("token_ids"), ids);
  EXPECT_EQ(body.at("prompt_token_ids"), Json(last().prompt));
  Json told = Json::array();
  int prompts = 0;
  for (const Json& event : streamed(kChat, {{"return_token_ids", true}}).events()) {
    prompts += event.contains("prompt_token_ids") && event.at("prompt_token_ids") == Json(last().prompt);
    for (const Json& id : event.at("choices")[0].at("token_ids")) told.push_back(id);
  }
  EXPECT_EQ(told, ids) << "each once, those without text too";
  EXPECT_EQ(prompts, 1);
  EXPECT_FALSE(chat({}).json().at("choices")[0].contains("token_ids"));
}

TEST_F(ApiTest, TimingsAreToldWhereTheyAreAskedFor) {
  backend.script = [](const Request&, RequestHandle& handle) {
    put_token(handle, 0, 11, "a");
    AnswerStats stats;
    stats.prompt_tokens = 30;
    stats.cached_tokens = 20;
    stats.completion_tokens = 4;
    stats.prefill_seconds = 0.5;
    stats.decode_seconds = 0;
    put_end(handle, 0, FinishReason::length, {}, stats);
  };
  const Json want = {{"cache_n", 20},
                     {"prompt_n", 10},
                     {"prompt_ms", 500.0},
                     {"prompt_per_token_ms", 50.0},
                     {"prompt_per_second", 20.0},
                     {"predicted_n", 4},
                     {"predicted_ms", 0.0},
                     {"predicted_per_token_ms", 0.0},
                     {"predicted_per_second", 0}};
  for (const char* path : {kChat, kText}) {
    Json asks = {{"timings_per_token", true}};
    if (path == kText) asks["prompt"] = "a";
    const auto reply = [&](const Json& fields) { return path == kText ? post(kText, fields) : chat(fields); };
    EXPECT_EQ(reply(asks).json().at("timings"), want);
    const std::vector<Json> events = streamed(path, asks).events();
    EXPECT_EQ(events.back().at("timings"), want);
    for (size_t i = 0; i + 1 < events.size(); ++i) EXPECT_FALSE(events[i].contains("timings"));
    asks.erase("timings_per_token");
    EXPECT_FALSE(reply(asks).json().contains("timings"));
  }
}

TEST_F(ApiTest, OffsetsPointIntoTheText) {
  backend.script = scored;
  const Json choice = post(kText, {{"prompt", "Größe and"}, {"echo", true}, {"logprobs", 0}, {"max_tokens", 2}})
                          .json()
                          .at("choices")[0];
  const Json& logprobs = choice.at("logprobs");
  EXPECT_EQ(last().prompt[0], bos());
  const std::vector<std::string> text = characters_of(choice.at("text").get<std::string>());
  EXPECT_TRUE(choice.at("text").get<std::string>().starts_with("Größe and"));
  size_t halves = 0;
  for (size_t t = 1; t < logprobs.at("tokens").size(); ++t) {
    if (logprobs.at("tokens")[t].get<std::string>().find("\xef\xbf\xbd") != std::string::npos) {
      ++halves;
      continue;
    }
    std::string at;
    for (size_t i = logprobs.at("text_offset")[t].get<size_t>(); i < text.size(); ++i) at += text[i];
    EXPECT_TRUE(at.starts_with(logprobs.at("tokens")[t].get<std::string>())) << t << at;
  }
  EXPECT_GT(halves, 0u) << "the text should have a character of two tokens";
}

// Other choices may be through with the prompt before the one that scores it.
TEST_F(ApiTest, EveryChoiceEchoesTheScores) {
  backend.script = scored;
  const Json fields = {{"prompt", "The capital"}, {"echo", true}, {"logprobs", 1}, {"max_tokens", 2}, {"n", 3}};
  const Json choices = post(kText, fields).json().at("choices");
  ASSERT_EQ(choices.size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(choices[i].at("index"), i);
    EXPECT_EQ(choices[i].at("text"), choices[0].at("text"));
    EXPECT_EQ(choices[i].at("logprobs"), choices[0].at("logprobs"));
  }
  std::map<size_t, std::string> texts;
  std::map<size_t, Json> tokens;
  for (const Json& event : streamed(kText, fields).events()) {
    const Json& choice = event.at("choices")[0];
    const size_t index = choice.at("index").get<size_t>();
    texts[index] += choice.at("text").get<std::string>();
    if (!choice.at("logprobs").is_null())
      for (const Json& logprob : choice.at("logprobs").at("token_logprobs")) tokens[index].push_back(logprob);
  }
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(texts[i], choices[i].at("text"));
    EXPECT_EQ(tokens[i], choices[i].at("logprobs").at("token_logprobs"));
  }
}

TEST_F(ApiTest, BestOfGivesTheLikeliest) {
  backend.script = [](const Request& request, RequestHandle& handle) {
    EXPECT_EQ(request.choices, 4);
    EXPECT_EQ(request.top_logprobs, 0);
    const float means[] = {-3, -1, -4, -2};
    for (int choice = 0; choice < 4; ++choice) {
      for (int t = 0; t <= choice; ++t)  // longer ones have smaller sums
        put_token(handle, choice, 100, t ? "" : std::to_string(choice), sampled(100, means[choice]));
      put_end(handle, choice, FinishReason::stop);
    }
  };
  const Json body = post(kText, {{"prompt", "a"}, {"n", 2}, {"best_of", 4}}).json();
  ASSERT_EQ(body.at("choices").size(), 2u);
  EXPECT_EQ(body.at("choices")[0].at("text"), "1");
  EXPECT_EQ(body.at("choices")[1].at("text"), "3");
  EXPECT_EQ(body.at("choices")[1].at("index"), 1);
  EXPECT_TRUE(body.at("choices")[0].at("logprobs").is_null()) << "nobody asked for them";
  EXPECT_EQ(body.at("usage").at("completion_tokens"), 1 + 2 + 3 + 4);
}

TEST_F(ApiTest, CompletionsStreamInterleaved) {
  const Json fields = {{"prompt", {"a", "b"}}, {"n", 2}, {"return_token_ids", true}};
  const Json plain = post(kText, fields).json();
  std::map<size_t, std::string> texts, reasons;
  std::map<size_t, Json> ids;
  for (const Json& event : streamed(kText, fields).events()) {
    EXPECT_EQ(event.at("object"), "text_completion");
    const Json& choice = event.at("choices")[0];
    const size_t index = choice.at("index").get<size_t>();
    texts[index] += choice.at("text").get<std::string>();
    for (const Json& id : choice.at("token_ids")) ids[index].push_back(id);
    if (!choice.at("finish_reason").is_null()) reasons[index] = choice.at("finish_reason").get<std::string>();
  }
  ASSERT_EQ(plain.at("choices").size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(texts[i], plain.at("choices")[i].at("text"));
    EXPECT_EQ(ids[i], plain.at("choices")[i].at("token_ids"));
    EXPECT_EQ(reasons[i], "stop");
  }
}

}  // namespace
}  // namespace thermocline::server
