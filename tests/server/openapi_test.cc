// GET /openapi.json against the table of endpoints and against the parsers.
#include <set>

#include "runtime/server/api/openapi.h"
#include "runtime/server/wire/request_fields.h"
#include "tests/server/api_fixture.h"

namespace thermocline::server {
namespace {

using Routes = std::set<std::pair<std::string, std::string>>;

std::string lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

Routes routes_of(const Json& paths) {
  Routes routes;
  for (const auto& [path, item] : paths.items())
    for (const auto& [method, operation] : item.items())
      if (method != "parameters") routes.insert({method, endpoint_path(path)});
  return routes;
}

class Openapi : public ApiTest {
 protected:
  Json document() { return get("/openapi.json").json(); }
  const Json& properties(const Json& document, const std::string& schema) {
    return document.at("components").at("schemas").at(schema).at("properties");
  }
};

TEST_F(Openapi, EveryEndpointIsThereAndNoOther) {
  Routes table;
  for (const Endpoint& endpoint : api->endpoints()) table.insert({lower(endpoint.method), endpoint.path});
  EXPECT_EQ(routes_of(document().at("paths")), table);
  // Nor is anything written of an endpoint that has gone.
  EXPECT_EQ(routes_of(parse_json(kOpenapiSource.paths).value()), table);
  EXPECT_EQ(endpoint_path("/v1/a/{id}/cancel"), "/v1/a/*/cancel");
  EXPECT_EQ(document().at("info").at("version"), TC_VERSION);
}

TEST_F(Openapi, SecurityIsTheTables) {
  ASSERT_TRUE(api->keys().load({.keys = {"a-secret-key"}, .admin_keys = {}, .file = ""}).ok());
  HttpHead head = head_of("GET", "/openapi.json");
  EXPECT_EQ(ask_with(head, "").status, 401);
  head.api_key = "a-secret-key";
  const Json document = ask_with(head, "").json();
  const Json schemes = document.at("components").at("securitySchemes");
  for (const auto& [path, item] : document.at("paths").items())
    for (const Endpoint& endpoint : api->endpoints()) {
      const std::string method = lower(endpoint.method);
      if (endpoint.path != endpoint_path(path) || !item.contains(method)) continue;
      const Json& operation = item.at(method);
      const Json& security = operation.at("security");
      const bool open = endpoint.access == Endpoint::Access::open;
      const bool admin = endpoint.access == Endpoint::Access::admin;
      EXPECT_EQ(security.size(), open ? 0u : 2u) << path;
      for (const Json& way : security) {
        const std::string name = way.items().begin().key();
        EXPECT_TRUE(schemes.contains(name)) << name;
        EXPECT_EQ(name.starts_with("admin"), admin) << path;
      }
      EXPECT_EQ(operation.at("responses").contains("401"), !open) << path;
      EXPECT_EQ(operation.at("responses").contains("429"), endpoint.model && endpoint.json && method == "post") << path;
    }
}

TEST_F(Openapi, WithoutKeysNothingNeedsOne) {
  const Json all = document();
  for (const auto& [path, item] : all.at("paths").items())
    for (const auto& [method, operation] : item.items())
      if (method != "parameters" && !operation.at("security").empty()) {
        EXPECT_EQ(operation.at("security").back(), Json::object()) << path;
      }
}

TEST_F(Openapi, ErrorsAreThoseOfTheDialect) {
  const Json document = this->document();
  const Json& paths = document.at("paths");
  const auto schema = [&](const char* path, const char* status) {
    const Json& response = paths.at(path).at("post").at("responses").at(status);
    const std::string at = response.at("$ref");
    return document.at(Json::json_pointer(at.substr(1)))
        .at("content")
        .at("application/json")
        .at("schema")
        .at("$ref")
        .get<std::string>();
  };
  EXPECT_EQ(schema("/v1/messages", "429"), "#/components/schemas/AnthropicError");
  EXPECT_EQ(schema("/v1/messages/count_tokens", "415"), "#/components/schemas/AnthropicError");
  EXPECT_EQ(schema(kChat, "429"), "#/components/schemas/Error");
  EXPECT_EQ(schema("/v1/messages", "529"), "#/components/schemas/AnthropicError");
  EXPECT_FALSE(paths.at(kChat).at("post").at("responses").contains("529"));
}

void check_references(const Json& json, const Json& document) {
  if (json.is_object() && json.contains("$ref")) {
    const std::string at = json["$ref"];
    EXPECT_TRUE(document.contains(Json::json_pointer(at.substr(1)))) << at;
  }
  if (json.is_structured())
    for (const Json& item : json) check_references(item, document);
}

TEST_F(Openapi, ReferencesLeadSomewhere) {
  const Json document = this->document();
  check_references(document, document);
}

TEST_F(Openapi, TheVocabularyIsTheModels) {
  const auto most = [](const Json& document) {
    return document.at("components").at("schemas").at("TokenId").at("maximum").get<int64_t>();
  };
  EXPECT_EQ(most(document()), model.vocab_size - 1);
  EXPECT_GT(most(openapi_document(api->endpoints(), nullptr, false)), model.vocab_size);
  EXPECT_EQ(post("/detokenize", {{"tokens", {most(document())}}}).status, 200);
  EXPECT_EQ(post("/detokenize", {{"tokens", {most(document()) + 1}}}).status, 400);
}

// With strict fields a described field that is not read is refused as unknown, and one that is read and not described
// is missing in the list of those that are known.
TEST_F(Openapi, FieldsAreThoseThatAreRead) {
  const Json document = this->document();
  model.strict_fields = true;
  std::set<std::string> described;
  for (const char* schema : {"GenerationFields", "ChatPrompt"})
    for (const auto& [name, property] : properties(document, schema).items()) {
      described.insert(name);
      if (name == "messages") continue;
      const Answer answer = chat({{name, nullptr}});
      EXPECT_EQ(answer.status, 200) << name << answer.body;
    }
  for (const auto& [name, property] :
       document.at(Json::json_pointer("/components/schemas/CompletionRequest/allOf/1/properties")).items()) {
    if (name != "prompt") {
      EXPECT_EQ(post(kText, {{"prompt", "a"}, {name, nullptr}}).status, 200) << name;
    }
  }
  described.insert("max_tokens");
  for (const char* name : generation_fields()) EXPECT_TRUE(described.contains(name)) << name;
}

}  // namespace
}  // namespace thermocline::server
