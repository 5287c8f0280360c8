// For the tests of the APIs: requests go in through Api without network and without model, scripted tokens come from a
// fake Backend.
#pragma once
#include <gtest/gtest.h>

#include <condition_variable>
#include <deque>
#include <map>
#include <set>
#include <thread>

#include "runtime/server/api/api.h"
#include "runtime/server/keys.h"
#include "tests/support/demo_text.h"

namespace thermocline::server {

inline constexpr std::chrono::seconds kPatience{30};  // a test that waits this long has failed

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
  void flush_prefix_cache(std::function<void(const PrefixCacheFlush&)> done) override { done({4, 400, 3, 3000}); }
  EngineHealth health() const override { return now; }
  EngineStats stats() const override { return counted; }
  ExpertMap experts() const override { return map; }
  std::vector<MemoryTier> memory_tiers(const EngineStats&) const override { return tiers; }
  std::optional<double> stream_bytes_per_second() const override { return stream; }

  std::shared_ptr<QueueCounters> counters = std::make_shared<QueueCounters>(QueueCaps{.requests = 8});
  EngineHealth now;
  EngineStats counted{.running = 3, .waiting = 2};
  ExpertMap map;
  std::vector<MemoryTier> tiers;
  std::optional<double> stream;
  std::function<void()> on_submit;
  std::optional<Error> refusal;
  std::function<void(const Request&, RequestHandle&)> script;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Request> requests;
  std::vector<std::shared_ptr<RequestHandle>> handles;
};

inline void put_token(RequestHandle& handle, int choice, int32_t id, const std::string& text,
                      std::optional<SampledToken> logprobs = {}) {
  TokenEvent event;
  event.choice = choice;
  event.id = id;
  event.text = text;
  event.logprobs = std::move(logprobs);
  handle.stream().push(std::move(event));
}

inline void put_end(RequestHandle& handle, int choice, FinishReason reason, Error error = {}, AnswerStats stats = {}) {
  TokenEvent event;
  event.kind = TokenEvent::Kind::finish;
  event.choice = choice;
  event.reason = reason;
  event.error = std::move(error);
  event.stats = stats;
  handle.stream().finish(std::move(event));
}

/// One answer of two tokens behind `cached` tokens that were there already, as the engine tells it.
inline auto saying_behind_cached(int64_t cached) {
  return [=](const Request&, RequestHandle& handle) {
    for (const char* text : {"so", " it is"}) {
      TokenEvent event;
      event.id = 100;
      event.text = text;
      event.stats.cached_tokens = cached;
      handle.stream().push(std::move(event));
    }
    put_end(handle, 0, FinishReason::stop, {}, {.cached_tokens = cached});
  };
}

/// Every choice says the same pieces, one token each, the choices in turn.
inline auto saying(std::vector<std::string> pieces, FinishReason reason = FinishReason::stop) {
  return [=](const Request& request, RequestHandle& handle) {
    for (size_t i = 0; i < pieces.size(); ++i)
      for (int choice = 0; choice < request.choices; ++choice)
        put_token(handle, choice, static_cast<int32_t>(100 + i), pieces[i]);
    for (int choice = 0; choice < request.choices; ++choice) put_end(handle, choice, reason);
  };
}

inline std::vector<std::string> characters_of(const std::string& text) {
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
        for (const auto& [name, value] : exchange_->headers()) answer.headers[name] = value;
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

inline int32_t bos() { return *test::demo_tokenizer().id_of("<｜begin▁of▁sentence｜>"); }

inline HttpHead head_of(const std::string& method, const std::string& target, const std::string& body = "") {
  HttpHead head;
  head.method = method;
  head.target = target;
  head.request_id = "req-1";
  head.peer = "127.0.0.1";
  if (method == "POST") head.content_type = "application/json";
  if (!body.empty()) head.content_length = body.size();
  return head;
}

inline const Json kHello = Json::array({Json{{"role", "user"}, {"content", "Hello"}}});
inline constexpr const char* kChat = "/v1/chat/completions";
inline constexpr const char* kText = "/v1/completions";

inline std::string text_of(const Request& request) {
  std::string text;
  for (const int32_t id : request.prompt) text += test::demo_tokenizer().token_bytes(id);
  return text;
}

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

}  // namespace thermocline::server
