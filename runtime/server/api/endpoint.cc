#include "runtime/server/api/endpoint.h"

#include <algorithm>
#include <cctype>
#include <mutex>
#include <optional>

#include "runtime/base/edit_distance.h"
#include "runtime/base/log.h"
#include "runtime/server/wire/request_fields.h"

namespace thermocline::server {
namespace {

// Anthropic's names of kinds of errors, by status.
const char* anthropic_type(int status) {
  switch (status) {
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 413:
      return "request_too_large";
    case 429:
      return "rate_limit_error";
    case 503:
    case 529:
      return "overloaded_error";
    case 408:
    case 504:
      return "timeout_error";
    default:
      return status < 500 ? "invalid_request_error" : "api_error";
  }
}

Reply reply_of(const Call& call, const std::function<Result<Json>(const Call&, const Json& body)>& make) {
  try {
    const JsonLimits limits{.values = 65536 + 16 * static_cast<size_t>(call.model ? call.model->max_context : 0)};
    const Result<Json> body = parse_bounded_json(call.http.body, limits);
    if (!body) return unreadable_body(body.error());
    if (!body->is_object()) return error_reply(field_error("body", "should be a JSON object"));
    Result<std::string> name = Fields(*body).text("model", "");
    if (!name) return error_reply(name.error());
    if (name->empty() && call.model) *name = call.model->name;
    if (call.model)
      if (Status known = call.model->check_name(*name); !known.ok()) return error_reply(known.error());
    const Result<Json> made = make(call, *body);
    if (!made) return error_reply(made.error());
    Reply reply{200, dump_json(*made)};
    if (call.model) reply.headers = call.model->name_headers(*name);
    return reply;
  } catch (const std::exception& exception) {
    log_error("request {}: {}", call.http.head.request_id, exception.what());
    return error_reply(Error{ErrorCode::internal, "the request could not be read"});
  }
}

}  // namespace

std::string url_decoded(std::string_view text) {
  std::string out;
  const auto digit = [](char c) { return std::isdigit(static_cast<unsigned char>(c)) ? c - '0' : (c | 32) - 'a' + 10; };
  for (size_t i = 0; i < text.size(); ++i) {
    const bool escape = text[i] == '%' && i + 2 < text.size() &&
                        std::isxdigit(static_cast<unsigned char>(text[i + 1])) &&
                        std::isxdigit(static_cast<unsigned char>(text[i + 2]));
    out += escape ? static_cast<char>(digit(text[i + 1]) * 16 + digit(text[i + 2])) : text[i];
    if (escape) i += 2;
  }
  return out;
}

std::map<std::string, std::string> query_of(std::string_view target) {
  std::map<std::string, std::string> query;
  const size_t mark = target.find('?');
  if (mark == std::string_view::npos) return query;
  std::string_view rest = target.substr(mark + 1);
  rest = rest.substr(0, rest.find('#'));
  while (!rest.empty() && query.size() < 64) {
    const std::string_view one = rest.substr(0, rest.find('&'));
    rest.remove_prefix(std::min(rest.size(), one.size() + 1));
    const size_t equals = std::min(one.find('='), one.size());
    if (equals > 0)
      query[url_decoded(one.substr(0, equals))] = url_decoded(one.substr(std::min(equals + 1, one.size())));
  }
  return query;
}

bool matches(const Endpoint& endpoint, std::string_view path, std::string* rest) {
  const std::string_view pattern = endpoint.path;
  const size_t star = pattern.find('*');
  if (star == std::string_view::npos) return path == pattern;
  const std::string_view before = pattern.substr(0, star), behind = pattern.substr(star + 1);
  if (path.size() <= before.size() + behind.size() || !path.starts_with(before) || !path.ends_with(behind))
    return false;
  const std::string_view id = path.substr(before.size(), path.size() - before.size() - behind.size());
  if (!behind.empty() && id.find('/') != std::string_view::npos) return false;
  if (rest) *rest = url_decoded(id);
  return true;
}

std::string canonical_path(const std::string& target, const std::vector<Endpoint>& endpoints) {
  std::string path;
  for (const char c : target.substr(0, target.find_first_of("?#")))
    if (c != '/' || path.empty() || path.back() != '/') path += c;
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  const auto known = [&](const std::string& some) {
    return std::any_of(endpoints.begin(), endpoints.end(), [&](const Endpoint& e) { return matches(e, some); });
  };
  if (path.starts_with("/v1/v1/")) path.erase(0, 3);
  if (known(path)) return path;
  if (known("/v1" + path)) return "/v1" + path;
  if (path.starts_with("/v1/") && known(path.substr(3))) return path.substr(3);
  return path;
}

std::string near_paths(std::string_view path, const std::vector<Endpoint>& endpoints) {
  std::string all;
  for (const Endpoint& e : endpoints) {
    const std::string_view known = e.path;
    // Less than all of its letters: else "/" would be near to every short path.
    if (path.size() < 64 && edits(path, known) <= std::min<size_t>(3, known.size() - 1))
      return "; did you mean " + std::string(known) + "?";
    if (all.find(" " + std::string(known)) == std::string::npos)
      all += (all.empty() ? "; there are " : ", ") + std::string(known);
  }
  return all;
}

Reply in_dialect(Reply reply, Dialect dialect, const std::string& request_id) {
  if (dialect == Dialect::openai || reply.status < 400) return reply;
  const Result<Json> body = parse_json(reply.body);
  const std::string message = body ? body->value(Json::json_pointer("/error/message"), "") : "";
  const bool full = body && body->value(Json::json_pointer("/error/code"), "") == "queue_full";
  if (full) reply.status = 529;  // the box, not this client
  reply.body = dump_json(Json{{"type", "error"},
                              {"error", {{"type", anthropic_type(reply.status)}, {"message", message}}},
                              {"request_id", request_id}});
  return reply;
}

Reply unreadable_body(const Error& error) {
  const char* const code = error.code == ErrorCode::invalid_argument ? "invalid_value" : "invalid_json";
  return error_reply(400, "invalid_request_error", code, (error.field.empty() ? "the body: " : "") + error.message,
                     error.field);
}

constexpr uint64_t kMostLateBytes = 256 << 20;

LateReply::LateReply(Services& services, Call call, KeyPlace place)
    : services_(services),
      call_(std::move(call)),
      place_(std::move(place)),
      bytes_(call_.http.body.size()),
      entry_(call_.http.head) {
  entry_.key = call_.client.name;
  services_.late_bytes += bytes_;
}

void LateReply::finish(Reply reply) {
  std::string().swap(call_.http.body);
  services_.late_bytes -= bytes_;
  {
    const std::lock_guard lock(mutex_);
    reply_ = std::move(reply);
  }
  ready();
}

Exchange::Output LateReply::take() {
  std::unique_lock lock(mutex_);
  if (!reply_) return {};
  Reply reply = *std::exchange(reply_, std::nullopt);
  lock.unlock();
  return told(std::move(reply));
}

Exchange::Output LateReply::abort(const Error& error) { return told(error_reply(error)); }

Exchange::Output LateReply::told(Reply reply) {
  entry_.answered(reply);
  Output out;
  out.finished = true;
  out.reply = in_dialect(std::move(reply), call_.dialect, call_.http.head.request_id);
  return out;
}

void LateReply::closed(bool complete, int status) {
  entry_.status = status;
  entry_.complete = complete;
  place_ = KeyPlace();
  services_.book.ended(entry_);
}

Outcome prepared(Services& services, Call call, std::function<Result<Json>(const Call&, const Json& body)> make) {
  Result<KeyPlace> place = call.client.take_place();
  if (!place) return error_reply(place.error());
  if (services.late_bytes + call.http.body.size() > kMostLateBytes)
    return error_reply(
        Error{ErrorCode::overloaded, "bodies of requests like this one fill the memory they may: try again"});
  const auto late = std::make_shared<LateReply>(services, std::move(call), std::move(*place));
  services.prep.run([late, make = std::move(make)] { late->finish(reply_of(late->call(), make)); });
  return std::static_pointer_cast<Exchange>(late);
}

}  // namespace thermocline::server
