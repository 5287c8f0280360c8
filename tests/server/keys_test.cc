// API keys: who is let in, what each may cost, and what a file of keys may look like.
#include <sys/stat.h>

#include <fstream>

#include "tests/server/api_fixture.h"

namespace thermocline::server {
namespace {

HttpHead with_key(HttpHead head, const std::string& key) {
  head.authorization = "Bearer " + key;
  return head;
}

class KeysTest : public ApiTest {
 protected:
  std::string write_file(const std::string& text, mode_t mode = 0600) {
    const std::string path = (folder.path() / "keys").string();
    std::ofstream(path) << text;
    chmod(path.c_str(), mode);
    return path;
  }
  Status load(const std::string& text, mode_t mode = 0600) {
    return api->keys().load({.keys = {}, .admin_keys = {}, .file = write_file(text, mode)});
  }
  Answer ask(const std::string& target, const std::string& key) {
    HttpHead head = head_of("GET", target);
    if (!key.empty()) head = with_key(head, key);
    return ask_with(head, "");
  }
  Answer say(const std::string& key) {
    const std::string body = R"({"prompt":"hello","max_tokens":1})";
    return ask_with(with_key(head_of("POST", kText, body), key), body);
  }
};

TEST_F(KeysTest, EveryPathButProbesWantsOne) {
  ASSERT_TRUE(load("alice:secret-of-alice\n\n# a comment\nbob:secret-of-bob\n").ok());
  for (const char* open : {"/health", "/v1/health", "/livez", "/readyz", "/ping"})
    EXPECT_EQ(ask(open, "").status, 200) << open;
  for (const char* closed : {"/v1/models", "/version", "/v1/models/org/demo"}) {
    const Answer missing = ask(closed, "");
    EXPECT_EQ(missing.status, 401) << closed;
    EXPECT_EQ(missing.error().at("code"), "invalid_api_key");
    EXPECT_EQ(missing.headers.at("WWW-Authenticate"), "Bearer");
    EXPECT_EQ(ask(closed, "secret-of-mallory").status, 401) << closed;
    EXPECT_EQ(ask(closed, "secret-of-alice").status, 200) << closed;
  }
  EXPECT_EQ(chat({}).status, 401);
  EXPECT_EQ(say("secret-of-bob").status, 200);
  EXPECT_EQ(last().key, "bob");
  HttpHead other = head_of("GET", "/v1/models");
  other.api_key = "secret-of-alice";
  EXPECT_EQ(ask_with(other, "").status, 200) << "x-api-key";
  for (const char* near : {"secret-of-alic", "secret-of-alicee", "", " ", "alice:secret-of-alice"})
    EXPECT_EQ(ask("/v1/models", near).status, 401) << near;
  const std::string text = read_text_file(folder.path() / "access.jsonl", 1 << 20).value();
  EXPECT_EQ(text.find("secret"), std::string::npos);
  EXPECT_NE(text.find("\"key\":\"bob\""), std::string::npos);
}

TEST_F(KeysTest, WithoutKeysEverybodyMayAskAndNobodyIsAnAdmin) {
  EXPECT_FALSE(api->keys().required());
  EXPECT_EQ(ask("/v1/models", "").status, 200);
  EXPECT_EQ(ask("/v1/models", "whatever").status, 200);
  EXPECT_FALSE(api->keys().identify(head_of("GET", "/"))->admin);
}

TEST_F(KeysTest, SeveralKeysShareNoPrefixesUnlessTheySaySo) {
  ASSERT_TRUE(load("a:secret-a-1234\nb:secret-b-1234\nc:secret-c-1234 salt=team\nd:secret-d-1234 salt=team\n").ok());
  std::map<std::string, std::string> scope;
  for (const char* key : {"a", "b", "c", "d"}) {
    EXPECT_EQ(say(std::string("secret-") + key + "-1234").status, 200);
    scope[key] = last().cache_scope;
  }
  EXPECT_EQ(std::set<std::string>({scope["a"], scope["b"], scope["c"], ""}).size(), 4u);
  EXPECT_EQ(scope["c"], scope["d"]);
}

TEST_F(KeysTest, AKeyHasAsManyRequestsAsItMay) {
  ASSERT_TRUE(load("a:secret-a-1234 max-requests=2\nb:secret-b-1234\n").ok());
  backend.script = nullptr;  // answers go on
  const std::string body = R"({"prompt":"hello"})";
  const HttpHead head = with_key(head_of("POST", kText, body), "secret-a-1234");
  std::vector<std::shared_ptr<Exchange>> running;
  for (int i = 0; i < 2; ++i) running.push_back(std::get<std::shared_ptr<Exchange>>(api->handle({head, body})));
  const Answer refused = say("secret-a-1234");
  EXPECT_EQ(refused.status, 429);
  EXPECT_NE(refused.error().at("message").get<std::string>().find("'a' has 2 requests"), std::string::npos);
  EXPECT_EQ(refused.headers.count("Retry-After"), 1u);
  EXPECT_EQ(refused.error().at("code"), "rate_limit_exceeded") << "not the queue_full of the server";
  EXPECT_EQ(std::get<Reply>(api->handle({head, body})).status, 429);
  backend.script = saying({"x"});
  EXPECT_EQ(say("secret-b-1234").status, 200) << "another key's are its own";
  backend.await(1)->cancel();
  running[0]->cancel();
  running[0]->closed(false, 200);
  EXPECT_EQ(say("secret-a-1234").status, 200);
  EXPECT_EQ(say("secret-a-1234").status, 200) << "each gives its place back";
}

TEST_F(KeysTest, SlotsShowAKeyItsOwnRequests) {
  ASSERT_TRUE(load("a:secret-a-1234\nb:secret-b-1234\nroot:secret-r-1234 admin\n").ok());
  backend.script = nullptr;
  const std::string body = R"({"prompt":"hello"})";
  HttpRequest request{with_key(head_of("POST", kText, body), "secret-a-1234"), body};
  Client client(std::get<std::shared_ptr<Exchange>>(api->handle(std::move(request))));
  backend.await(0);
  const Json own = ask("/slots", "secret-a-1234").json()[0], others = ask("/slots", "secret-b-1234").json()[0];
  EXPECT_TRUE(own.contains("id_task") && own.contains("n_prompt_tokens"));
  EXPECT_EQ(others, (Json{{"id", 0}, {"is_processing", true}}));
  EXPECT_TRUE(ask("/slots", "secret-r-1234").json()[0].contains("id_task"));
  client.close(false);
}

TEST_F(KeysTest, AReloadTakesAndGivesKeys) {
  ASSERT_TRUE(load("a:secret-a-1234\n").ok());
  write_file("b:secret-b-1234 admin\n");
  ASSERT_TRUE(api->keys().reload().ok());
  EXPECT_EQ(ask("/v1/models", "secret-a-1234").status, 401);
  EXPECT_EQ(ask("/v1/models", "secret-b-1234").status, 200);
  write_file("b\n");
  EXPECT_FALSE(api->keys().reload().ok());
  EXPECT_EQ(ask("/v1/models", "secret-b-1234").status, 200) << "a broken file changes nothing";
}

TEST_F(KeysTest, ABrokenFileIsNamedWithItsLine) {
  const auto error = [&](const std::string& text, mode_t mode = 0600) {
    const Status status = load(text, mode);
    EXPECT_FALSE(status.ok()) << text;
    return status.ok() ? "" : status.error().message;
  };
  EXPECT_NE(error("a:secret-a-1234\nno colon\n").find("keys:2: a line is 'name:key'"), std::string::npos);
  EXPECT_NE(error("a:short\n").find("keys:1: a key has 8 to"), std::string::npos);
  EXPECT_NE(error(":secret-a-1234\n").find("keys:1"), std::string::npos);
  EXPECT_NE(error("a:secret-a-1234 root\n").find("unknown option behind the key"), std::string::npos);
  EXPECT_NE(error("a:secret-a-1234 max-requests=0\n").find("max-requests"), std::string::npos);
  EXPECT_NE(error("a:secret-a-1234 max-requests=9x\n").find("max-requests"), std::string::npos);
  EXPECT_NE(error("a:secret-a-1234\na:secret-b-1234\n").find("'a' is there twice"), std::string::npos);
  EXPECT_NE(error("# nothing\n").find("no key"), std::string::npos);
  EXPECT_NE(error("a:secret-a-1234\n", 0644).find("chmod 600"), std::string::npos);
  EXPECT_NE(error("a:secret-a-1234\n", 0660).find("chmod 600"), std::string::npos);
  EXPECT_TRUE(load("a:secret-a-1234\n", 0640).ok()) << "a group may read";
  const Status missing = api->keys().load({.keys = {}, .admin_keys = {}, .file = "/nowhere/keys"});
  ASSERT_FALSE(missing.ok());
  EXPECT_NE(missing.error().message.find("/nowhere/keys"), std::string::npos);
  EXPECT_EQ(error("a:se\x01 cret-a-1234\n").find("cret"), std::string::npos) << "an error tells no key";
}

TEST_F(KeysTest, KeysOfTheEnvironmentHaveNumbers) {
  ASSERT_TRUE(api->keys().load({.keys = {"first-secret"}, .admin_keys = {"admin-secret"}, .file = ""}).ok());
  EXPECT_EQ(api->keys().identify(with_key(head_of("GET", "/"), "first-secret"))->name, "key-1");
  EXPECT_FALSE(api->keys().identify(with_key(head_of("GET", "/"), "first-secret"))->admin);
  EXPECT_TRUE(api->keys().identify(with_key(head_of("GET", "/"), "admin-secret"))->admin);
}

}  // namespace
}  // namespace thermocline::server
