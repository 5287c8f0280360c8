#include "runtime/server/api/openapi.h"

#include <algorithm>
#include <cctype>

namespace thermocline::server {
namespace {

using Access = Endpoint::Access;

/// An error that endpoints have by what the table says of them. The transport's come from anywhere.
struct DocumentedError {
  const char* status;
  const char* text;
  bool (*occurs)(const Endpoint&) = [](const Endpoint&) { return true; };
};

// Its body names a model, and takes a place of its key's and of the memory for such bodies.
bool reads_request(const Endpoint& e) { return e.model && e.json && e.method == std::string_view("POST"); }

constexpr DocumentedError kErrors[] = {
    {"400", "A field, or bytes that are no JSON or no HTTP"},
    {"401", "No API key of this server's", [](const Endpoint& e) { return e.access != Access::open; }},
    {"403", "A key that is no admin's, a Host or an Origin that is not allowed"},
    {"404", "The model is not served here (--strict-model-name)", reads_request},
    {"408", "The request came too slowly"},
    {"413", "The body is too large"},
    {"414", "The target is too long"},
    {"415", "The body is no JSON, or encoded"},
    {"417", "An expectation that is not 100-continue"},
    {"429", "The queue is full, or the key has its share of it; come again after Retry-After seconds", reads_request},
    {"431", "The header is too large"},
    {"500", "A fault of the server's"},
    {"501", "Not offered: by the model, or the transfer coding"},
    {"503", "Loading, draining, failed, or no connection is free"},
    {"504", "The request's timeout is over", [](const Endpoint& e) { return e.queued; }},
    {"529", "The queue is full; come again after Retry-After seconds",
     [](const Endpoint& e) { return reads_request(e) && e.dialect == Dialect::anthropic; }},
};

Json reference(const std::string& section, const std::string& name) {
  return {{"$ref", "#/components/" + section + "/" + name}};
}

const char* error_schema(Dialect dialect) { return dialect == Dialect::anthropic ? "AnthropicError" : "Error"; }

Json error_content(Dialect dialect) {
  return {{"application/json", {{"schema", reference("schemas", error_schema(dialect))}}}};
}

// Every reply has its request's id.
Json reply_headers() {
  return {{"x-request-id", {{"required", true}, {"schema", {{"type", "string"}}}}},
          {"request-id", {{"required", true}, {"schema", {{"type", "string"}}}}}};
}

Json error_responses() {
  Json responses = Json::object();
  for (const Dialect dialect : {Dialect::openai, Dialect::anthropic})
    for (const DocumentedError& error : kErrors) {
      Json& response = responses[error_schema(dialect) + std::string(error.status)];
      response = {{"description", error.text}, {"headers", reply_headers()}, {"content", error_content(dialect)}};
      const std::string_view status = error.status;
      if (status == "401") response["headers"]["WWW-Authenticate"] = {{"schema", {{"type", "string"}}}};
      if (status == "429" || status == "503" || status == "529")
        response["headers"]["Retry-After"] = {{"schema", {{"type", "integer"}}}};
    }
  return responses;
}

Json security_schemes() {
  const auto bearer = [](const char* text) {
    return Json{{"type", "http"}, {"scheme", "bearer"}, {"description", text}};
  };
  const auto header = [](const char* text) {
    return Json{{"type", "apiKey"}, {"in", "header"}, {"name", "x-api-key"}, {"description", text}};
  };
  constexpr const char* any = "One of the server's keys, where it has any";
  constexpr const char* admins = "An admin's key, where the server has keys";
  return {{"key", bearer(any)},
          {"keyHeader", header(any)},
          {"adminKey", bearer(admins)},
          {"adminKeyHeader", header(admins)}};
}

// One of these is enough; {} is nothing at all.
Json security_of(Access access, bool keys) {
  Json security = Json::array();
  if (access == Access::open) return security;
  const std::string name = access == Access::admin ? "adminKey" : "key";
  security.push_back({{name, Json::array()}});
  security.push_back({{name + "Header", Json::array()}});
  if (!keys) security.push_back(Json::object());
  return security;
}

void complete(Json& operation, const Endpoint& endpoint, bool keys) {
  operation["security"] = security_of(endpoint.access, keys);
  for (auto& [status, response] : operation["responses"].items()) {
    if (status >= "400" && !response.contains("content")) response["content"] = error_content(endpoint.dialect);
    Json headers = reply_headers();
    if (response.contains("headers")) headers.update(response["headers"]);
    response["headers"] = std::move(headers);
  }
  for (const DocumentedError& error : kErrors)
    if (error.occurs(endpoint) && !operation["responses"].contains(error.status))
      operation["responses"][error.status] =
          reference("responses", error_schema(endpoint.dialect) + std::string(error.status));
}

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

const Json& parsed(const char* text) {
  static const Json paths = parse_json(kOpenapiSource.paths).value();
  static const Json requests = parse_json(kOpenapiSource.requests).value();
  static const Json replies = parse_json(kOpenapiSource.replies).value();
  return text == kOpenapiSource.paths ? paths : text == kOpenapiSource.requests ? requests : replies;
}

Json paths_of(const std::vector<Endpoint>& endpoints, bool keys) {
  Json paths = Json::object();
  for (const auto& [path, item] : parsed(kOpenapiSource.paths).items())
    for (const Endpoint& endpoint : endpoints) {
      const std::string method = lower(endpoint.method);
      if (endpoint.path != endpoint_path(path) || !item.contains(method)) continue;
      if (item.contains("parameters")) paths[path]["parameters"] = item["parameters"];
      paths[path][method] = item[method];
      complete(paths[path][method], endpoint, keys);
    }
  return paths;
}

}  // namespace

std::string endpoint_path(const std::string& documented) {
  std::string path;
  bool inside = false;
  for (const char c : documented) {
    if (c == '{') path += '*';
    inside = inside ? c != '}' : c == '{';
    if (!inside && c != '}') path += c;
  }
  return path;
}

Json openapi_document(const std::vector<Endpoint>& endpoints, const ServedModel* model, bool keys) {
  Json schemas = parsed(kOpenapiSource.requests);
  schemas.update(parsed(kOpenapiSource.replies));
  if (model) schemas["TokenId"]["maximum"] = model->vocab_size - 1;
  return {
      {"openapi", "3.1.0"},
      {"info",
       {{"title", "Thermocline"},
        {"version", TC_VERSION},
        {"description",
         "Every path is there with and without /v1. A field that is null counts as absent, one that is not known "
         "is ignored. docs/serving.md says more."}}},
      {"servers", Json::array({Json{{"url", "/"}}})},
      {"paths", paths_of(endpoints, keys)},
      {"components",
       {{"schemas", std::move(schemas)}, {"responses", error_responses()}, {"securitySchemes", security_schemes()}}}};
}

}  // namespace thermocline::server
