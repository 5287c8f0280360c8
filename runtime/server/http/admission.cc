#include "runtime/server/http/admission.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/status.hpp>
#include <ctime>
#include <iterator>

namespace thermocline::server {
namespace {

namespace http = boost::beast::http;
using boost::beast::iequals;
using Fields = http::request_header<http::fields>;

std::string text(const Fields& fields, http::field name) { return std::string(fields[name]); }
std::string text(const Fields& fields, const char* name) { return std::string(fields[name]); }

Reply refuse(int status, const char* code, const std::string& message) {
  return error_reply(status, "invalid_request_error", code, message);
}

// Quoted in a message: what a client sent, cut to a line.
std::string quoted(std::string_view value) { return "'" + std::string(value.substr(0, 200)) + "'"; }

std::optional<Reply> check_size(const HttpOptions& o, const Fields& fields) {
  if (fields.target().size() > o.max_target_bytes)
    return refuse(414, "uri_too_long", fmt::format("the target is longer than {} bytes", o.max_target_bytes));
  const auto count = std::distance(fields.begin(), fields.end());
  if (count > static_cast<ptrdiff_t>(o.max_headers))
    return refuse(431, "headers_too_large", fmt::format("{} header lines: at most {}", count, o.max_headers));
  return std::nullopt;
}

// `http://name/path` names the host in its target, which then counts, not the Host line.
std::string_view absolute_authority(std::string_view target) {
  const size_t scheme = target.starts_with('/') ? std::string_view::npos : target.find("://");
  if (scheme == std::string_view::npos) return {};
  const std::string_view rest = target.substr(scheme + 3);
  return rest.substr(0, rest.find_first_of("/?#"));
}

std::string origin_form(std::string_view target) {
  const std::string_view authority = absolute_authority(target);
  if (authority.empty()) return std::string(target);
  const std::string_view path(authority.data() + authority.size(),
                              target.data() + target.size() - authority.data() - authority.size());
  return path.starts_with('/') ? std::string(path) : "/" + std::string(path);
}

std::optional<Reply> check_host(const HostGuard& guard, const Fields& fields, const std::string& local_address,
                                std::optional<Authority>& host) {
  const auto count = fields.count(http::field::host);
  if (count > 1) return refuse(400, "bad_request", "more than one Host line");
  if (count == 0 && fields.version() >= 11) return refuse(400, "bad_request", "HTTP/1.1 requests have a Host line");
  const std::string_view absolute = absolute_authority({fields.target().data(), fields.target().size()});
  const std::string name = absolute.empty() ? text(fields, http::field::host) : std::string(absolute);
  if (count == 0 && absolute.empty()) return std::nullopt;
  host = parse_authority(name);
  if (!host) return refuse(400, "bad_request", "the Host line is malformed: " + quoted(name));
  if (guard.allows_host(*host, local_address)) return std::nullopt;
  return error_reply(403, "permission_error", "host_not_allowed",
                     "this server is not known as " + quoted(host->host) + ": start it with --allowed-host " +
                         host->host + " if that is its name");
}

bool is_preflight(const Fields& fields) {
  return fields.method() == http::verb::options && fields.count(http::field::origin) > 0 &&
         fields.count(http::field::access_control_request_method) > 0;
}

// The headers that a page asks leave for are echoed: a grant of "*" does not cover Authorization.
Reply preflight_reply(const Fields& fields) {
  Reply reply{204};
  reply.headers = {{"Access-Control-Allow-Methods", "GET, HEAD, POST, DELETE, OPTIONS"},
                   {"Access-Control-Max-Age", "600"}};
  const std::string asked = text(fields, http::field::access_control_request_headers);
  if (!asked.empty()) reply.headers.emplace_back("Access-Control-Allow-Headers", asked);
  return reply;
}

// What would let a page in. "null" is a file's origin and that of a sandboxed frame of any site.
std::string way_in(const std::string& origin) {
  if (is_origin(origin)) return "start it with --cors-origin " + origin.substr(0, 200) + " to let them";
  return "they have no origin that --cors-origin could name; open the page from a web server";
}

std::optional<Reply> check_origin(const HostGuard& guard, const Fields& fields, const std::optional<Authority>& host,
                                  Facts& facts) {
  if (fields.count(http::field::origin) == 0) return std::nullopt;
  const std::string origin = text(fields, http::field::origin);
  if (fields.count(http::field::origin) > 1 || !guard.allows_origin(origin, host))
    return error_reply(403, "permission_error", "origin_not_allowed",
                       "pages of " + quoted(origin) + " may not use this server: " + way_in(origin));
  facts.allowed_origin = origin;
  if (is_preflight(fields)) return preflight_reply(fields);
  return std::nullopt;
}

std::optional<Reply> check_codings(const Fields& fields) {
  const auto [first, last] = fields.equal_range(http::field::transfer_encoding);
  for (auto line = first; line != last; ++line) {
    if (fields.version() < 11) return refuse(400, "bad_request", "HTTP/1.0 has no Transfer-Encoding");
    if (!iequals(line->value(), "chunked"))
      return error_reply(501, "not_supported", "transfer_coding",
                         "transfer coding " + quoted({line->value().data(), line->value().size()}) +
                             " is not supported: send the body chunked or with a Content-Length");
  }
  const auto [coding, end] = fields.equal_range(http::field::content_encoding);
  for (auto line = coding; line != end; ++line)
    if (!iequals(line->value(), "identity"))
      return refuse(415, "unsupported_content_encoding",
                    "content coding " + quoted({line->value().data(), line->value().size()}) +
                        " is not supported: send the body as it is");
  return std::nullopt;
}

std::optional<Reply> check_expectation(const Fields& fields, Facts& facts) {
  if (fields.count(http::field::expect) == 0 || fields.version() < 11) return std::nullopt;
  const std::string expected = text(fields, http::field::expect);
  if (!iequals(expected, "100-continue"))
    return refuse(417, "expectation_failed", "expectation " + quoted(expected) + " cannot be met: only 100-continue");
  facts.expects_continue = true;
  return std::nullopt;
}

Facts facts_of(const RequestParser& parser) {
  const Fields& fields = parser.get();
  Facts facts;
  facts.id = usable_request_id(text(fields, "x-request-id")).value_or("");
  if (facts.id.empty()) facts.id = mint_request_id();
  facts.http11 = fields.version() >= 11;
  facts.keep_alive = parser.keep_alive();
  facts.head_only = fields.method() == http::verb::head;
  return facts;
}

HttpHead head_of(const RequestParser& parser, const Facts& facts, const std::string& peer) {
  const Fields& fields = parser.get();
  HttpHead head;
  head.method = facts.head_only ? "GET" : std::string(fields.method_string());
  head.target = origin_form({fields.target().data(), fields.target().size()});
  head.content_type = text(fields, http::field::content_type);
  head.authorization = text(fields, http::field::authorization);
  head.api_key = text(fields, "x-api-key");
  head.request_id = facts.id;
  head.origin = text(fields, http::field::origin);
  head.user_agent = text(fields, http::field::user_agent);
  head.accept_encoding = text(fields, http::field::accept_encoding);
  head.if_none_match = text(fields, http::field::if_none_match);
  if (const auto length = parser.content_length()) head.content_length = *length;
  head.peer = peer;
  return head;
}

std::string http_date() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char date[40];
  std::strftime(date, sizeof(date), "%a, %d %b %Y %H:%M:%S GMT", &utc);
  return date;
}

std::string status_line(int status) {
  const auto phrase = http::obsolete_reason(http::int_to_status(static_cast<unsigned>(status)));
  return fmt::format("{}{} {}\r\nDate: {}\r\n", kStatusPrefix, status, std::string_view(phrase.data(), phrase.size()),
                     http_date());
}

std::string common_lines(const Facts& facts, bool close) {
  std::string lines = fmt::format("Connection: {}\r\nx-request-id: {}\r\nrequest-id: {}\r\n",
                                  close ? "close" : "keep-alive", facts.id, facts.id);
  if (!facts.allowed_origin.empty())
    lines += fmt::format(
        "Access-Control-Allow-Origin: {}\r\nVary: Origin\r\n"
        "Access-Control-Expose-Headers: x-request-id, retry-after, x-thermocline-warning\r\n",
        facts.allowed_origin);
  return lines + "\r\n";
}

}  // namespace

Admission admit(const Gate& gate, const RequestParser& parser, const std::string& local_address,
                const std::string& peer) {
  const Fields& fields = parser.get();
  Admission a;
  a.facts = facts_of(parser);
  std::optional<Authority> host;
  a.refusal = check_size(gate.options, fields);
  if (!a.refusal) a.refusal = check_host(gate.guard, fields, local_address, host);
  if (!a.refusal) a.refusal = check_origin(gate.guard, fields, host, a.facts);
  if (!a.refusal) {
    a.refusal = check_codings(fields);
    if (a.refusal) a.facts.keep_alive = false;  // where its body ends is not known
  }
  if (!a.refusal) a.refusal = check_expectation(fields, a.facts);
  a.head = head_of(parser, a.facts, peer);
  if (a.refusal) {
    a.refusal = gate.handler.shaped(a.head, *a.refusal);
    return a;
  }
  a.refusal = gate.handler.check(a.head);
  if (a.refusal) return a;
  a.body_limit = std::min(gate.handler.body_limit(a.head), gate.options.max_body_bytes);
  if (a.head.content_length.value_or(0) > a.body_limit)
    a.refusal = gate.handler.shaped(a.head, refuse(413, "request_too_large",
                                                   fmt::format("the body has {} bytes: at most {} are read here",
                                                               *a.head.content_length, a.body_limit)));
  return a;
}

Reply malformed_reply(boost::system::error_code error, const HttpOptions& options, bool in_request_line) {
  if (error == http::error::header_limit && in_request_line)
    return refuse(414, "uri_too_long", fmt::format("the target is longer than {} bytes", options.max_target_bytes));
  if (error == http::error::header_limit)
    return refuse(431, "headers_too_large",
                  fmt::format("the header is larger than {} bytes", options.max_header_bytes));
  if (error == http::error::bad_version)
    return refuse(505, "http_version", "only HTTP/1.0 and HTTP/1.1 are spoken here");
  return refuse(400, "bad_request", "not an HTTP request: " + error.message());
}

std::string reply_head(const Reply& reply, const Facts& facts, bool close) {
  std::string head = status_line(reply.status);
  bool typed = false;
  for (const auto& [name, value] : reply.headers) {
    typed |= iequals(name, "content-type");
    head += fmt::format("{}: {}\r\n", name, value);
  }
  const bool bodiless = reply.status == 204 || reply.status == 304;
  if (!typed && !bodiless) head += "Content-Type: application/json\r\n";
  if (!bodiless) head += fmt::format("Content-Length: {}\r\n", reply.body.size());
  return head + common_lines(facts, close);
}

std::string stream_head(const Facts& facts, bool close,
                        const std::vector<std::pair<std::string, std::string>>& headers) {
  std::string more;
  for (const auto& [name, value] : headers) more += fmt::format("{}: {}\r\n", name, value);
  return status_line(200) + more + "Content-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n" +
         "X-Accel-Buffering: no\r\n" + (facts.http11 ? "Transfer-Encoding: chunked\r\n" : "") +
         common_lines(facts, close);
}

}  // namespace thermocline::server
