// The APIs without network and without model: requests go in through Api, scripted tokens come from a fake Backend.
#include "runtime/server/api/api.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <deque>
#include <map>
#include <set>
#include <thread>

#include "runtime/server/keys.h"
#include "runtime/server/wire/ids.h"
#include "tests/support/demo_text.h"

namespace thermocline::server {
namespace {

constexpr std::chrono::seconds kPatience{30};  // a test that waits this long has failed

/// Holds threads up until it is opened.
class Gate {
 public:
  void open() {
    {
      const std::lock_guard lock(mutex_);
      open_ = true;
    }
    changed_.notify_all();
  }
  void pass() {
    std::unique_lock lock(mutex_);
    ++arrived_;
    changed_.notify_all();
    changed_.wait_for(lock, kPatience, [&] { return open_; });
  }
  void await_arrival() {
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, kPatience, [&] { return arrived_ > 0; }));
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
  int arrived_ = 0;
};

/// Answers as its script says, at once.
class FakeBackend : public Backend {
 public:
  Result<QueueTicket> ticket(const QueueCounters::Amount& amount) override {
    if (!now.ok()) return Error{ErrorCode::unavailable, now.reason};
    return QueueTicket::take(counters, amount);
  }
  Result<std::shared_ptr<RequestHandle>> submit(Request request) override {
    if (on_submit) on_submit();
    if (refusal) return *refusal;
    request.ticket.release();  // admitted
    auto handle = std::make_shared<RequestHandle>(request.choices, 4096);
    if (script) script(request, *handle);
    const std::lock_guard lock(mutex);
    requests.push_back(std::move(request));
    handles.push_back(handle);
    changed.notify_all();
    return handle;
  }
  /// The handle of the i-th request, when it is there.
  std::shared_ptr<RequestHandle> await(size_t i) {
    std::unique_lock lock(mutex);
    const bool there = changed.wait_for(lock, kPatience, [&] { return handles.size() > i; });
    TC_CHECK(there, "no request was submitted");
    return handles[i];
  }
  EngineHealth health() const override { return now; }
  EngineStats stats() const override { return {.running = 3, .waiting = 2}; }

  std::shared_ptr<QueueCounters> counters = std::make_shared<QueueCounters>(QueueCaps{.requests = 8});
  EngineHealth now;
  std::function<void()> on_submit;
  std::optional<Error> refusal;
  std::function<void(const Request&, RequestHandle&)> script;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Request> requests;
  std::vector<std::shared_ptr<RequestHandle>> handles;
};

void put_token(RequestHandle& handle, int choice, int32_t id, const std::string& text,
               std::optional<SampledToken> logprobs = {}) {
  TokenEvent event;
  event.choice = choice;
  event.id = id;
  event.text = text;
  event.logprobs = std::move(logprobs);
  handle.stream().push(std::move(event));
}

void put_end(RequestHandle& handle, int choice, FinishReason reason, Error error = {}, AnswerStats stats = {}) {
  TokenEvent event;
  event.kind = TokenEvent::Kind::finish;
  event.choice = choice;
  event.reason = reason;
  event.error = std::move(error);
  event.stats = stats;
  handle.stream().finish(std::move(event));
}

/// Every choice says the same pieces, one token each, the choices in turn.
auto saying(std::vector<std::string> pieces, FinishReason reason = FinishReason::stop) {
  return [=](const Request& request, RequestHandle& handle) {
    for (size_t i = 0; i < pieces.size(); ++i)
      for (int choice = 0; choice < request.choices; ++choice)
        put_token(handle, choice, static_cast<int32_t>(100 + i), pieces[i]);
    for (int choice = 0; choice < request.choices; ++choice) put_end(handle, choice, reason);
  };
}

std::vector<std::string> characters_of(const std::string& text) {
  std::vector<std::string> pieces;
  for (const char c : text) {
    if ((static_cast<unsigned char>(c) & 0xc0) != 0x80) pieces.emplace_back();
    pieces.back() += c;
  }
  return pieces;
}

/// What a client gets.
struct Answer {
  int status = 0;
  std::string body, stream;
  std::map<std::string, std::string> headers;

  Json json() const { return parse_json(body).value(); }
  Json error() const { return json().at("error"); }
  std::string param() const {
    const Json error = this->error();
    return error.at("param").is_null() ? "" : error.at("param").get<std::string>();
  }
  /// The data of the stream's events without the last, which is [DONE].
  std::vector<Json> events() const {
    std::vector<Json> events;
    EXPECT_TRUE(stream.ends_with("data: [DONE]\n\n")) << stream;
    for (size_t at = 0; at < stream.size();) {
      const size_t end = stream.find("\n\n", at);
      const std::string_view line = std::string_view(stream).substr(at, end - at);
      EXPECT_TRUE(line.starts_with("data: ")) << line;
      if (line != "data: [DONE]") events.push_back(parse_json(line.substr(6)).value());
      at = end + 2;
    }
    return events;
  }
};

/// An exchange that is followed as a connection does.
class Client {
 public:
  explicit Client(std::shared_ptr<Exchange> exchange) : exchange_(std::move(exchange)) {
    exchange_->on_ready([news = news_] {
      const std::lock_guard lock(news->mutex);
      news->is = true;
      news->changed.notify_all();
    });
  }
  ~Client() { exchange_->on_ready(nullptr); }

  Exchange& exchange() { return *exchange_; }
  /// Takes what comes until `enough`, or the end.
  void follow(const std::function<bool(const Answer&)>& enough = [](const Answer&) { return false; }) {
    while (!finished_ && !enough(answer)) {
      const Exchange::Output out = exchange_->take();
      answer.stream += out.bytes;
      if (out.reply) {
        EXPECT_TRUE(answer.stream.empty()) << "a reply after bytes";
        answer.status = out.reply->status;
        answer.body = out.reply->body;
        for (const auto& [name, value] : out.reply->headers) answer.headers[name] = value;
      } else if (!answer.stream.empty()) {
        answer.status = 200;
      }
      finished_ = out.finished;
      if (out.finished || !out.bytes.empty()) continue;
      std::unique_lock lock(news_->mutex);
      ASSERT_TRUE(news_->changed.wait_for(lock, kPatience, [&] { return news_->is; })) << "nothing comes";
      news_->is = false;
    }
  }
  void close(bool complete = true) { exchange_->closed(complete, answer.status); }

  Answer answer;

 private:
  struct News {
    std::mutex mutex;
    std::condition_variable changed;
    bool is = false;
  };
  const std::shared_ptr<Exchange> exchange_;
  const std::shared_ptr<News> news_ = std::make_shared<News>();
  bool finished_ = false;
};

int32_t bos() { return *test::demo_tokenizer().id_of("<｜begin▁of▁sentence｜>"); }

HttpHead head_of(const std::string& method, const std::string& target, const std::string& body = "") {
  HttpHead head;
  head.method = method;
  head.target = target;
  head.request_id = "req-1";
  head.peer = "127.0.0.1";
  if (method == "POST") head.content_type = "application/json";
  if (!body.empty()) head.content_length = body.size();
  return head;
}

const Json kHello = Json::array({Json{{"role", "user"}, {"content", "Hello"}}});
constexpr const char* kChat = "/v1/chat/completions";
constexpr const char* kText = "/v1/completions";

class ApiTest : public testing::Test {
 protected:
  ApiTest() {
    backend.script = saying({"Hello", " there"});
    api->serve(model);
  }

  /// As a connection asks: check, then handle, then follow.
  Answer ask_with(const HttpHead& head, const std::string& body) {
    Answer answer;
    const auto take = [&](const Reply& reply) {
      answer.status = reply.status;
      answer.body = reply.body;
      for (const auto& [name, value] : reply.headers) answer.headers[name] = value;
      return answer;
    };
    if (const std::optional<Reply> refused = api->check(head)) return take(*refused);
    auto outcome = api->handle({head, body});
    if (const Reply* const reply = std::get_if<Reply>(&outcome)) return take(*reply);
    Client client(std::get<std::shared_ptr<Exchange>>(outcome));
    client.follow();
    client.close();
    return client.answer;
  }
  Answer post_text(const std::string& target, const std::string& body) {
    return ask_with(head_of("POST", target, body), body);
  }
  Answer post(const std::string& target, const Json& body) { return post_text(target, dump_json(body)); }
  Answer get(const std::string& target) { return ask_with(head_of("GET", target), ""); }
  Answer chat(Json fields) {
    if (!fields.contains("messages")) fields["messages"] = kHello;
    return post(kChat, fields);
  }
  Answer streamed(const std::string& target, Json fields) {
    fields["stream"] = true;
    return target == kChat ? chat(std::move(fields)) : post(target, fields);
  }
  std::unique_ptr<Client> begin(const Json& body, const std::string& target = kText) {
    const std::string text = dump_json(body);
    return std::make_unique<Client>(
        std::get<std::shared_ptr<Exchange>>(api->handle({head_of("POST", target, text), text})));
  }
  Request& last() { return backend.requests.back(); }

  std::vector<Json> log_lines() const { return test::read_jsonl(folder.path() / "access.jsonl"); }

  test::TempDir folder;
  FakeBackend backend;
  std::unique_ptr<AccessLog> log = AccessLog::open((folder.path() / "access.jsonl").string()).value();
  ServedModel model{.backend = &backend,
                    .vocab_size = test::demo_tokenizer().size(),
                    .max_context = 1024,
                    .bos_token_id = bos(),
                    .tokenizer = test::demo_tokenizer(),
                    .constants = test::demo_prose(),
                    .name = "org/demo"};
  std::unique_ptr<Api> api = std::make_unique<Api>(Api::Options{.max_body_bytes = 32 << 20, .prep_threads = 1}, *log);
};

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
      {{{"timeout", 0}}, "timeout"},
      {{{"timeout", "soon"}}, "timeout"},
      {{{"tools", 5}}, "tools"},
      {{{"tools", {Json::object()}}}, "tools[0].function"},
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
      {{{"grammar", "root ::= x"}}, "grammar"},
      {{{"prompt_logprobs", 0}}, "prompt_logprobs"},
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
  };
  for (const auto& [body, param] : cases) {
    const Answer answer = post(kText, body);
    ASSERT_EQ(answer.status, 400) << body << answer.body;
    EXPECT_EQ(answer.param(), param) << answer.body;
  }
  EXPECT_TRUE(backend.requests.empty());
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
  EXPECT_GE(text_answer.error().at("n_prompt_tokens"), 1024);
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

// --- what a request becomes ---

TEST_F(ApiTest, FieldsReachTheEngine) {
  HttpHead head = head_of("POST", kText);
  head.authorization = "Bearer secret";
  const auto before = Request::Clock::now();
  ask_with(head, R"({"prompt":[3,4],"temperature":0.5,"top_p":0.9,"top_k":7,"min_p":0.1,"repetition_penalty":1.1,
    "presence_penalty":0.2,"frequency_penalty":0.3,"seed":-1,"logit_bias":{"5":-100,"6":2.5},"max_tokens":9,"min_tokens":2,
    "stop":["x","yy"],"include_stop_str_in_output":true,"stop_token_ids":[8],"ignore_eos":true,"skip_special_tokens":false,
    "n":2,"logprobs":3,"priority":4,"timeout":1000})");
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

std::string text_of(const Request& request) {
  std::string text;
  for (const int32_t id : request.prompt) text += test::demo_tokenizer().token_bytes(id);
  return text;
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
  EXPECT_EQ(SortedJson::parse(a.dump()), SortedJson::parse(b.dump()));
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
