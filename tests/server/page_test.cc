// The built-in page as HTTP: heads, encodings, what is not there.
#include "runtime/server/page/page.h"

#include "runtime/server/page/page_files.h"
#include "tests/server/api_fixture.h"

namespace thermocline::server {
namespace {

std::string header(const Reply& reply, const std::string& name) {
  for (const auto& [key, value] : reply.headers)
    if (key == name) return value;
  return "";
}

Reply page(const std::string& path, const std::string& accept_encoding = "", const std::string& if_none_match = "") {
  HttpHead head = head_of("GET", path);
  head.accept_encoding = accept_encoding;
  head.if_none_match = if_none_match;
  std::optional<Reply> reply = page_reply(path, head);
  EXPECT_TRUE(reply) << path;
  return reply.value_or(Reply{});
}

TEST(Page, EveryFileHasItsTypeAndThePolicy) {
  const std::map<std::string, std::string> types = {{"/", "text/html; charset=utf-8"},
                                                    {"/page/main.js", "text/javascript; charset=utf-8"},
                                                    {"/page/marked.js", "text/javascript; charset=utf-8"},
                                                    {"/page/style.css", "text/css; charset=utf-8"},
                                                    {"/page/icon.svg", "image/svg+xml"}};
  for (const auto& [path, type] : types) {
    const Reply reply = page(path);
    EXPECT_EQ(reply.status, 200) << path;
    EXPECT_EQ(header(reply, "Content-Type"), type) << path;
    EXPECT_FALSE(reply.body.empty()) << path;
    EXPECT_EQ(header(reply, "X-Content-Type-Options"), "nosniff");
    EXPECT_EQ(header(reply, "Referrer-Policy"), "no-referrer");
    EXPECT_EQ(header(reply, "Cache-Control"), "no-cache");
    EXPECT_EQ(header(reply, "Content-Encoding"), "");
    const std::string policy = header(reply, "Content-Security-Policy");
    for (const char* part : {"default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:",
                             "connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"})
      EXPECT_NE(policy.find(part), std::string::npos) << part;
    EXPECT_EQ(policy.find("unsafe"), std::string::npos);
  }
}

TEST(Page, HoldsTheFilesAsTheyAre) {
  for (const char* name : {"index.html", "chat.js", "style.css"}) {
    const std::string path = std::string(name) == "index.html" ? "/" : "/page/" + std::string(name);
    EXPECT_EQ(page(path).body, read_text_file(std::string(TC_SOURCE_DIR "/runtime/server/page/") + name).value())
        << name;
  }
}

TEST(Page, NeedsNothingFromElsewhere) {
  for (const PageFile& file : page_files()) {
    if (file.name == "marked.js") continue;  // names its author's site in a comment
    for (const char* address : {"https://", "src=\"//", "innerHTML", "outerHTML", "insertAdjacentHTML", "eval("})
      EXPECT_EQ(file.bytes.find(address), std::string_view::npos) << file.name << " has " << address;
  }
}

TEST(Page, IsPackedForThoseWhoTakeIt) {
  const size_t plain = page("/page/marked.js").body.size();
  for (const char* takes : {"gzip", "br, GZIP;q=0.5", "deflate,gzip", "gzip; q=1.0"}) {
    const Reply reply = page("/page/marked.js", takes);
    EXPECT_EQ(header(reply, "Content-Encoding"), "gzip") << takes;
    EXPECT_EQ(header(reply, "Vary"), "Accept-Encoding");
    EXPECT_TRUE(reply.body.starts_with("\x1f\x8b")) << takes;
    EXPECT_LT(reply.body.size(), plain / 2);
  }
  for (const char* refuses : {"", "br", "gzip;q=0", "gzip; q=0.000", "identity", "notgzip"})
    EXPECT_EQ(page("/page/marked.js", refuses).body.size(), plain) << refuses;
}

TEST(Page, IsNotSentTwice) {
  const std::string etag = header(page("/"), "ETag"), packed = header(page("/", "gzip"), "ETag");
  EXPECT_NE(etag, packed) << "other bytes, another tag";
  EXPECT_NE(etag, header(page("/page/chat.js"), "ETag"));
  for (const std::string& has : {etag, "W/" + etag, "\"other\", " + etag, std::string("*")}) {
    const Reply reply = page("/", "", has);
    EXPECT_EQ(reply.status, 304) << has;
    EXPECT_TRUE(reply.body.empty());
    EXPECT_EQ(header(reply, "ETag"), etag);
    EXPECT_NE(header(reply, "Content-Security-Policy"), "");
  }
  EXPECT_EQ(page("/", "gzip", packed).status, 304);
  EXPECT_EQ(page("/", "gzip", etag).status, 200) << "that is the other encoding";
  EXPECT_EQ(page("/", "", "\"other\"").status, 200);
}

TEST(Page, HasNoOtherPaths) {
  for (const char* path : {"", "/page", "/page/", "/page/../keys.h", "/page/page.cc", "/page/README.md", "/index.html",
                           "/page/marked.js.gz", "/v1/models", "/health"})
    EXPECT_FALSE(page_reply(path, head_of("GET", path))) << path;
}

TEST_F(ApiTest, ThePageNeedsNoModelAndNoKey) {
  Api empty(Api::Options{.prep_threads = 1}, *log);
  ASSERT_TRUE(empty.keys().load({.keys = {"secret-of-alice"}, .admin_keys = {}, .file = ""}).ok());
  EXPECT_EQ(empty.check(head_of("GET", "/v1/models"))->status, 401);
  for (const char* target : {"/", "/?chat", "/page/main.js"}) {
    const HttpHead head = head_of("GET", target);
    EXPECT_FALSE(empty.check(head)) << target;
    const auto outcome = empty.handle({head, ""});
    EXPECT_EQ(std::get<Reply>(outcome).status, 200) << target;
  }
  EXPECT_EQ(get("/page/nothing.js").status, 404);
  for (const char* elsewhere : {"/v2", "/a"})
    EXPECT_EQ(get(elsewhere).body.find("mean /?"), std::string::npos) << "the page is no guess at a short path";
  const Answer posted = post("/page/main.js", {{"a", 1}});
  EXPECT_EQ(posted.status, 405);
  EXPECT_EQ(posted.headers.at("Allow"), "GET, HEAD");
}

}  // namespace
}  // namespace thermocline::server
