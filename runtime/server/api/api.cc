#include "runtime/server/api/api.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <numeric>
#include <span>
#include <vector>

#include "runtime/io/json_document.h"
#include "runtime/server/api/chat_completions.h"
#include "runtime/server/api/completions.h"

namespace thermocline::server {
namespace {

constexpr std::array kGets = {"/health", "/version", "/v1/models"};
constexpr std::array kPosts = {"/v1/chat/completions", "/v1/completions"};

// Without query, empty segments and a slash at the end; /v1 in front where it is missing, once where it is twice.
std::string path_of(const std::string& target) {
  std::string path;
  for (const char c : target.substr(0, target.find_first_of("?#")))
    if (c != '/' || path.empty() || path.back() != '/') path += c;
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  if (path.starts_with("/v1/v1/")) path.erase(0, 3);
  if (path == "/v1/health" || path == "/v1/version") path.erase(0, 3);
  if (path == "/models" || path.starts_with("/models/") || path == "/completions" || path == "/chat/completions")
    path.insert(0, "/v1");
  return path;
}

// Letters to change, add or leave out to get from one path to the other; a letter's case costs nothing.
size_t edits(std::string_view a, std::string_view b) {
  const auto lower = [](char c) { return std::tolower(static_cast<unsigned char>(c)); };
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i + 1);
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t changed = diagonal + (lower(a[i]) != lower(b[j]));
      diagonal = row[j + 1];
      row[j + 1] = std::min({changed, diagonal + 1, row[j] + 1});
    }
  }
  return row.back();
}

bool is_get(const std::string& path) {
  return std::find(kGets.begin(), kGets.end(), path) != kGets.end() || path.starts_with("/v1/models/");
}
bool is_post(const std::string& path) { return std::find(kPosts.begin(), kPosts.end(), path) != kPosts.end(); }

// "; did you mean PATH?" for a known path in other letters or a few of them away, else all of them.
std::string near(std::string_view path) {
  std::string all;
  for (const auto& list : {std::span<const char* const>(kPosts), std::span<const char* const>(kGets)})
    for (const char* const known : list) {
      if (path.size() < 64 && edits(path, known) <= 3) return std::string("; did you mean ") + known + "?";
      all += std::string(all.empty() ? "; there are " : ", ") + known;
    }
  return all;
}

// JSON in any case and with any parameters; none at all is taken for JSON.
bool is_json(std::string type) {
  std::transform(type.begin(), type.end(), type.begin(), [](unsigned char c) { return std::tolower(c); });
  type = type.substr(0, type.find(';'));
  while (!type.empty() && type.back() == ' ') type.pop_back();
  return type.empty() || type == "application/json" || (type.starts_with("application/") && type.ends_with("+json"));
}

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

}  // namespace

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

// Its line in the access log; that of an exchange is written when it is closed. Probes of /health have none: they would
// be most of the log.
Reply Api::logged(const HttpHead& head, Reply reply) {
  if (path_of(head.target) == "/health") return reply;
  AccessEntry entry(head);
  entry.answered(reply);
  log_.write(entry);
  return reply;
}

std::optional<Reply> Api::check(const HttpHead& head) {
  std::optional<Reply> reply = refusal(head);
  if (reply) reply = logged(head, std::move(*reply));
  return reply;
}

std::optional<Reply> Api::refusal(const HttpHead& head) const {
  const std::string path = path_of(head.target);
  const bool get = is_get(path);
  if (!get && !is_post(path))
    return error_reply(404, "not_found_error", "not_found", "there is no " + head.target.substr(0, 200) + near(path));
  if (head.method != (get ? "GET" : "POST")) {
    Reply reply = error_reply(405, "invalid_request_error", "method_not_allowed",
                              path + " takes " + (get ? "GET" : "POST") + ", not " + head.method);
    reply.headers.emplace_back("Allow", get ? "GET, HEAD" : "POST");
    return reply;
  }
  if (get) return std::nullopt;
  if (!is_json(head.content_type))
    return error_reply(
        415, "invalid_request_error", "unsupported_media_type",
        "the body should be JSON (curl: -H 'content-type: application/json'), not " + head.content_type.substr(0, 200));
  if (Status status = ready(); !status.ok()) return error_reply(status.error());
  // Full already: nothing of the body is read. Its own place is taken when it is there.
  if (head.content_length.value_or(0) > body_limit(head)) return std::nullopt;  // 413, says the transport
  const ServedModel& served = *model();
  if (Result<QueueTicket> ticket = served.backend->ticket(served.estimate(head.content_length.value_or(0))); !ticket)
    return error_reply(ticket.error());
  return std::nullopt;
}

uint64_t Api::body_limit(const HttpHead& head) const {
  if (!is_post(path_of(head.target))) return 64 << 10;  // read and ignored
  const ServedModel* const served = model();
  return served ? std::min(options_.max_body_bytes, served->most_body_bytes()) : options_.max_body_bytes;
}

std::variant<Reply, std::shared_ptr<Exchange>> Api::handle(HttpRequest request) {
  const HttpHead head = request.head;
  auto outcome = route(std::move(request));
  if (Reply* const reply = std::get_if<Reply>(&outcome)) return logged(head, std::move(*reply));
  return outcome;
}

std::variant<Reply, std::shared_ptr<Exchange>> Api::route(HttpRequest request) {
  const std::string path = path_of(request.head.target);
  if (path == "/health") return health();
  if (path == "/version") return Reply{200, dump_json(Json{{"version", TC_VERSION}})};
  if (is_get(path)) return models(path);
  if (Status status = ready(); !status.ok()) return error_reply(status.error());
  std::shared_ptr<Generation> generation;
  if (path == "/v1/chat/completions")
    generation = std::make_shared<ChatGeneration>(*model(), std::move(request), log_);
  else
    generation = std::make_shared<CompletionGeneration>(*model(), std::move(request), log_);
  if (Status status = Generation::admit(generation); !status.ok()) return error_reply(status.error());
  prep_.run([generation] { generation->prepare(); });
  return generation;
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

Reply Api::models(const std::string& path) const {
  const ServedModel* const served = model();
  if (!served) return error_reply(ready().error());
  const Json model = {{"id", served->name},
                      {"object", "model"},
                      {"created", served->created},
                      {"owned_by", "thermocline"},
                      {"max_model_len", served->max_context}};
  if (path == "/v1/models") return {200, dump_json(Json{{"object", "list"}, {"data", Json::array({model})}})};
  if (url_decoded(std::string_view(path).substr(11)) == served->name) return {200, dump_json(model)};
  return error_reply(404, "not_found_error", "model_not_found", "the only model here is '" + served->name + "'",
                     "model");
}

}  // namespace thermocline::server
