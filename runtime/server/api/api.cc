#include "runtime/server/api/api.h"

#include <algorithm>
#include <cctype>

#include "runtime/server/api/cache.h"
#include "runtime/server/api/chat_completions.h"
#include "runtime/server/api/completions.h"
#include "runtime/server/api/experts.h"
#include "runtime/server/api/messages.h"
#include "runtime/server/api/metrics_endpoint.h"
#include "runtime/server/api/models.h"
#include "runtime/server/api/openapi.h"
#include "runtime/server/api/render.h"
#include "runtime/server/api/responses.h"
#include "runtime/server/api/server_info.h"
#include "runtime/server/api/stats.h"
#include "runtime/server/api/tokenize.h"
#include "runtime/server/api/unsupported.h"
#include "runtime/server/page/page.h"

namespace thermocline::server {
namespace {

// JSON in any case and with any parameters; none at all is taken for JSON.
bool is_json(std::string type) {
  std::transform(type.begin(), type.end(), type.begin(), [](unsigned char c) { return std::tolower(c); });
  type = type.substr(0, type.find(';'));
  while (!type.empty() && type.back() == ' ') type.pop_back();
  return type.empty() || type == "application/json" || (type.starts_with("application/") && type.ends_with("+json"));
}

Reply unauthorized(bool missing) {
  Reply reply =
      error_reply(401, "authentication_error", "invalid_api_key",
                  missing ? "this server wants an API key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
                          : "the API key is not one of this server's");
  reply.headers.emplace_back("WWW-Authenticate", "Bearer");
  return reply;
}

}  // namespace

Api::Api(const Options& options, AccessLog& log)
    : options_(options),
      metrics_(options.metrics),
      book_(log, [this](const AccessEntry& entry) { observe(entry); }),
      prep_(options.prep_threads) {
  endpoints_ = own_endpoints();
  for (auto more : {chat_completions_endpoints, completions_endpoints, messages_endpoints, models_endpoints,
                    responses_endpoints, tokenize_endpoints, render_endpoints, server_info_endpoints, stats_endpoints,
                    experts_endpoints, metrics_endpoints, cache_endpoints, unsupported_endpoints, page_endpoints})
    for (Endpoint& endpoint : more(services_)) endpoints_.push_back(std::move(endpoint));
}

std::vector<Endpoint> Api::own_endpoints() {
  const auto health = [this](const Call&) -> Outcome { return this->health(); };
  const auto alive = [](const Call&) -> Outcome { return Reply{200, dump_json(Json{{"status", "ok"}})}; };
  const auto describe = [this](Call call) { return described(std::move(call)); };
  using enum Endpoint::Access;
  return {{.method = "GET", .path = "/openapi.json", .model = false, .answer = describe},
          {.method = "GET", .path = "/health", .access = open, .model = false, .answer = health},
          {.method = "GET", .path = "/readyz", .access = open, .model = false, .answer = health},
          {.method = "GET", .path = "/ping", .access = open, .model = false, .answer = health},
          {.method = "GET", .path = "/livez", .access = open, .model = false, .answer = alive},
          {.method = "GET", .path = "/version", .model = false, .answer = [](const Call&) -> Outcome {
             return Reply{200, dump_json(Json{{"version", TC_VERSION}})};
           }}};
}

Outcome Api::described(Call call) {
  const auto late = std::make_shared<LateReply>(services_, std::move(call));
  prep_.run([this, late] {
    late->finish({200, dump_json(openapi_document(endpoints_, late->call().model, keys_.required()))});
  });
  return std::static_pointer_cast<Exchange>(late);
}

ServerState Api::state() const {
  return {model(), loaded_, draining_, std::chrono::duration<double>(RequestBook::Clock::now() - start_).count()};
}

// Counted under the endpoint's own path: a client's would make a series of every typing error.
void Api::observe(const AccessEntry& entry) {
  const std::string path = canonical_path(entry.path, endpoints_);
  const auto endpoint =
      std::find_if(endpoints_.begin(), endpoints_.end(), [&](const Endpoint& e) { return matches(e, path); });
  metrics_.http_answered(endpoint == endpoints_.end() ? "other" : endpoint->path, entry.status);
  if (endpoint != endpoints_.end() && endpoint->queued && entry.method == "POST")
    metrics_.request_ended(ended_request(entry, draining_));
}

Status Api::ready() const {
  if (draining_) return Error{ErrorCode::unavailable, "the server is stopping"};
  const ServedModel* const served = model();
  if (!served)
    return Error{ErrorCode::unavailable,
                 "the model is loading (" + std::to_string(static_cast<int>(100 * loaded_)) + " %); see /health"};
  const EngineHealth now = served->backend->health();
  if (!now.ok()) return Error{ErrorCode::unavailable, now.reason};
  return {};
}

std::variant<Api::Route, Reply> Api::route(const HttpHead& head) const {
  Route route{nullptr, canonical_path(head.target, endpoints_), ""};
  std::string methods, pattern;
  for (const Endpoint& endpoint : endpoints_) {
    if (!matches(endpoint, route.path, &route.rest)) continue;
    // The first pattern has the path: /v1/responses/ID/cancel is no response of the id ID/cancel.
    if (pattern.empty()) pattern = endpoint.path;
    if (endpoint.path != pattern) continue;
    if (head.method == endpoint.method) {
      route.endpoint = &endpoint;
      return route;
    }
    methods += (methods.empty() ? "" : ", ") + std::string(endpoint.method);
    if (methods == "GET") methods += ", HEAD";
  }
  if (methods.empty())
    return error_reply(404, "not_found_error", "not_found",
                       "there is no " + head.target.substr(0, 200) + near_paths(route.path, endpoints_));
  Reply reply = error_reply(405, "invalid_request_error", "method_not_allowed",
                            route.path + " takes " + methods + ", not " + head.method);
  reply.headers.emplace_back("Allow", methods);
  return reply;
}

std::variant<ApiClient, Reply> Api::client_of(const HttpHead& head, const Endpoint& endpoint) const {
  if (endpoint.access == Endpoint::Access::open) return ApiClient{};
  const std::optional<ApiClient> client = keys_.identify(head);
  if (!client) return unauthorized(head.authorization.empty() && head.api_key.empty());
  if (endpoint.access == Endpoint::Access::admin && !client->admin)
    return error_reply(403, "permission_error", "admin_only",
                       std::string(endpoint.path) +
                           " is for admin keys (THERMOCLINE_ADMIN_KEY, or 'admin' behind a "
                           "key in the key file)");
  return *client;
}

// Its line in the access log; that of an exchange is written when it is closed.
Reply Api::logged(const HttpHead& head, const Reply& reply) {
  AccessEntry entry(head);
  if (const std::optional<ApiClient> client = keys_.identify(head)) entry.key = client->name;
  entry.answered(reply);
  Reply told = shaped(head, reply);
  entry.status = told.status;
  book_.ended(entry);
  return told;
}

Reply Api::shaped(const HttpHead& head, const Reply& reply) const {
  const std::string path = canonical_path(head.target, endpoints_);
  for (const Endpoint& endpoint : endpoints_)
    if (matches(endpoint, path)) return in_dialect(reply, endpoint.dialect, head.request_id);
  return reply;
}

std::optional<Reply> Api::check(const HttpHead& head) {
  std::variant<Route, Reply> found = route(head);
  if (Reply* const reply = std::get_if<Reply>(&found)) return logged(head, *reply);
  std::optional<Reply> reply = refusal(head, *std::get<Route>(found).endpoint);
  if (reply) reply = logged(head, *reply);
  return reply;
}

std::optional<Reply> Api::refusal(const HttpHead& head, const Endpoint& endpoint) const {
  std::variant<ApiClient, Reply> client = client_of(head, endpoint);
  if (Reply* const reply = std::get_if<Reply>(&client)) return std::move(*reply);
  if (endpoint.json && head.method == std::string_view("POST") && !is_json(head.content_type))
    return error_reply(
        415, "invalid_request_error", "unsupported_media_type",
        "the body should be JSON (curl: -H 'content-type: application/json'), not " + head.content_type.substr(0, 200));
  if (!endpoint.model) return std::nullopt;
  if (Status status = ready(); !status.ok()) return error_reply(status.error());
  if (!endpoint.queued) return std::nullopt;
  if (Result<KeyPlace> place = std::get<ApiClient>(client).take_place(); !place) return error_reply(place.error());
  // Full already: nothing of the body is read. Its own place is taken when it is there.
  if (head.content_length.value_or(0) > body_limit(head)) return std::nullopt;  // 413, says the transport
  const ServedModel& served = *model();
  if (Result<QueueTicket> ticket = served.backend->ticket(served.estimate(head.content_length.value_or(0))); !ticket)
    return error_reply(ticket.error());
  return std::nullopt;
}

uint64_t Api::body_limit(const HttpHead& head) const {
  if (head.method != "POST") return 64 << 10;  // read and ignored
  const ServedModel* const served = model();
  return served ? std::min(options_.max_body_bytes, served->most_body_bytes()) : options_.max_body_bytes;
}

std::variant<Reply, std::shared_ptr<Exchange>> Api::handle(HttpRequest request) {
  const HttpHead head = request.head;
  std::variant<Route, Reply> found = route(head);
  if (Reply* const reply = std::get_if<Reply>(&found)) return logged(head, *reply);
  Route& route = std::get<Route>(found);
  std::variant<ApiClient, Reply> client = client_of(head, *route.endpoint);
  if (Reply* const reply = std::get_if<Reply>(&client)) return logged(head, *reply);
  if (route.endpoint->model)
    if (Status status = ready(); !status.ok()) return logged(head, error_reply(status.error()));
  Call call{std::move(request),
            std::move(route.path),
            std::move(route.rest),
            query_of(head.target),
            std::get<ApiClient>(std::move(client)),
            route.endpoint->dialect,
            model()};
  Outcome outcome = route.endpoint->answer(std::move(call));
  if (Reply* const reply = std::get_if<Reply>(&outcome)) return logged(head, *reply);
  return outcome;
}

// 200 only while steps succeed.
Reply Api::health() const {
  const ServedModel* const served = model();
  Status status = ready();
  if (!status.ok()) {
    Json body = parse_json(error_reply(status.error()).body).value();
    if (!served && !draining_) body["error"]["progress"] = loaded_.load();
    return {503, dump_json(body), {{"Retry-After", "5"}}};
  }
  const EngineStats s = served->backend->stats();
  return {200, dump_json(Json{{"status", "ok"},
                              {"running", s.running},
                              {"waiting", s.waiting},
                              {"kv_tokens_used", s.kv_tokens_used},
                              {"kv_tokens_total", s.kv_tokens_total},
                              {"preemptions", s.preemptions}})};
}

}  // namespace thermocline::server
