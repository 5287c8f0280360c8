// Endpoint: a path of the API, who may ask it, and what answers. Each file of this folder gives its own; api.cc has the
// list.
#pragma once

#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "runtime/io/json_document.h"
#include "runtime/metrics/metrics.h"
#include "runtime/server/api/served_model.h"
#include "runtime/server/api/ticker.h"
#include "runtime/server/http/handler.h"
#include "runtime/server/keys.h"
#include "runtime/server/prep_pool.h"
#include "runtime/server/request_book.h"

namespace thermocline::server {

using Outcome = std::variant<Reply, std::shared_ptr<Exchange>>;

enum class Dialect { openai, anthropic };  // the shape of errors

/// A request that has found its endpoint.
struct Call {
  HttpRequest http = {};
  std::string path = {};                          // canonical, without the query
  std::string rest = {};                          // what stands for the * of Endpoint::path, URL-decoded
  std::map<std::string, std::string> query = {};  // URL-decoded; the last of a name counts
  ApiClient client = {};                          // whose key it came with
  Dialect dialect = Dialect::openai;
  const ServedModel* model = nullptr;  // never null where the endpoint needs one
};

struct Endpoint {
  const char* method;  // GET, POST or DELETE
  const char* path;    // "/v1/models/*": the * stands for an id, which may hold slashes where it is last
  enum class Access {
    open,  // anybody: probes
    key,   // whoever has one of the keys, where there are any
    admin
  } access = Access::key;
  Dialect dialect = Dialect::openai;
  bool model = true;    // refused with 503 until a model is served, and when it is drained
  bool queued = false;  // a body waits in the queue: refused with 429 before it is read
  bool json = true;     // a body is JSON: refused with 415 where it says it is not
  std::function<Outcome(Call)> answer = {};
};

/// Where the server stands.
struct ServerState {
  const ServedModel* model = nullptr;  // null while it loads
  double loaded = 0;                   // share of its weights
  bool draining = false;
  double uptime_seconds = 0;
};

/// What endpoints share.
struct Services {
  PrepPool& prep;
  RequestBook& book;
  ApiKeys& keys;
  metrics::Metrics& metrics;
  Ticker& ticker;
  std::function<ServerState()> state;   // any thread
  std::vector<std::string> names = {};  // of the model, known before it is loaded
  std::atomic<uint64_t> late_bytes{0};  // of bodies behind LateReplies

  /// Whether that client may see what a request of that key does.
  bool shows(const ApiClient& client, const std::string& key) const {
    return !keys.required() || client.admin || key == client.name;
  }
};

/// Without query, empty segments and a slash at the end; the /v1 of those that have one where it is missing, once where
/// it is twice, none for those without.
std::string canonical_path(const std::string& target, const std::vector<Endpoint>& endpoints);
/// Whether `path` is one of the endpoint's; what stands for its * then.
bool matches(const Endpoint& endpoint, std::string_view path, std::string* rest = nullptr);
std::map<std::string, std::string> query_of(std::string_view target);
std::string url_decoded(std::string_view text);
/// "; did you mean PATH?" for a known path in other letters or a few of them away, else all of them.
std::string near_paths(std::string_view path, const std::vector<Endpoint>& endpoints);

/// The same error as the dialect says it; other replies as they are.
Reply in_dialect(Reply reply, Dialect dialect, const std::string& request_id);

/// Of a body that parse_bounded_json refused.
Reply unreadable_body(const Error& error);

/// An answer that is one reply, made elsewhere.
class LateReply : public Exchange {
 public:
  LateReply(Services& services, Call call, KeyPlace place = {});
  const Call& call() const { return call_; }
  /// Any thread, once.
  void finish(Reply reply);

  Output take() override;
  bool streams() const override { return false; }
  void cancel() override {}
  Output abort(const Error& error) override;
  void closed(bool complete, int status) override;

 private:
  Output told(Reply reply);

  Services& services_;
  Call call_;
  KeyPlace place_;
  const uint64_t bytes_;  // of its body, until it is read
  AccessEntry entry_;
  std::mutex mutex_;
  std::optional<Reply> reply_;
};

/// A reply that is made in the prep pool, of a body that is a JSON object. Its `model` has to be one that is served,
/// where that is strict.
Outcome prepared(Services& services, Call call, std::function<Result<Json>(const Call&, const Json& body)> make);

}  // namespace thermocline::server
