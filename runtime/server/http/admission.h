// What is decided about a request from its header alone, before a byte of its body is read or anything is paid for.
#pragma once

#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <optional>
#include <string>

#include "runtime/server/http/guard.h"
#include "runtime/server/http/handler.h"
#include "runtime/server/http/limits.h"

namespace thermocline::server {

using RequestParser = boost::beast::http::request_parser<boost::beast::http::string_body>;

/// How this request is answered, whatever the answer.
struct Facts {
  std::string id;              // echoed as x-request-id
  std::string allowed_origin;  // echoed as Access-Control-Allow-Origin; empty: no page, or none that may read
  bool http11 = true;          // chunks and interim answers are understood
  bool keep_alive = false;
  bool head_only = false;         // HEAD: everything but the body
  bool expects_continue = false;  // the client waits for 100 before it sends the body
};

struct Admission {
  Facts facts;
  HttpHead head;
  uint64_t body_limit = 0;
  std::optional<Reply> refusal;  // the answer is there: nothing else is read
};

struct Gate {
  const HttpOptions& options;
  const HostGuard& guard;
  Handler& handler;
};

/// The header is complete. In order: its size, Host and Origin (and a preflight's answer), codings, Expect, then
/// Handler::check, then the body's announced length.
Admission admit(const Gate& gate, const RequestParser& parser, const std::string& local_address,
                const std::string& peer);

/// The answer to bytes that are no request.
Reply malformed_reply(boost::system::error_code error, const HttpOptions& options, bool in_request_line);

/// Status line and header of a whole answer; `close` says that the connection ends with it.
std::string reply_head(const Reply& reply, const Facts& facts, bool close);
/// The same of an event stream: chunked where the client knows HTTP/1.1, ended by the connection's end elsewhere.
std::string stream_head(const Facts& facts, bool close,
                        const std::vector<std::pair<std::string, std::string>>& headers);

/// What every status line begins with, whatever the status.
constexpr std::string_view kStatusPrefix = "HTTP/1.1 ";

}  // namespace thermocline::server
