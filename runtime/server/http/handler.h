// Between HTTP and the APIs: what a connection hands over, and how it gets the answer. Everything here runs on the
// network thread unless it says otherwise; nothing may block it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "runtime/base/result.h"

namespace thermocline::server {

struct HttpHead {
  std::string method;  // HEAD comes as GET: the connection leaves the body out
  std::string target;  // as it was sent, query included
  std::string content_type, authorization, api_key, request_id, origin, user_agent;
  std::string accept_encoding, if_none_match;
  std::optional<uint64_t> content_length;  // none: chunked, or no body
  std::string peer;                        // address of the client
};

struct HttpRequest {
  HttpHead head;
  std::string body;
};

struct Reply {
  int status = 200;
  std::string body = {};  // JSON unless a content-type header says otherwise
  std::vector<std::pair<std::string, std::string>> headers = {};
};

/// An answer that takes time. The connection pulls from it; it calls ready() when there is more.
class Exchange {
 public:
  virtual ~Exchange() = default;

  struct Output {
    std::string bytes = {};           // of an event stream, framed
    std::optional<Reply> reply = {};  // the whole answer instead; never after bytes
    bool finished = false;            // nothing follows
  };
  /// Everything since the last call. The status line is sent with the first bytes, or after 10 s of silence.
  virtual Output take() = 0;
  /// Whether the answer, if it is no refusal, will be an event stream. Known from the start of handle() on, or false
  /// until the request was read.
  virtual bool streams() const = 0;
  /// Further headers of a stream; a reply has its own. Asked for when the first bytes are sent.
  virtual std::vector<std::pair<std::string, std::string>> headers() const { return {}; }
  /// A sign of life for a silent stream (10 s), in the currency of the protocol.
  virtual std::string keep_alive() { return ": still working\n\n"; }
  /// The client has gone: whatever is done for it ends within a step. Idempotent.
  virtual void cancel() = 0;
  /// The server ends before the answer does: cancels, and gives what tells the client so - the rest of the stream (an
  /// error event, then its end) or a reply. Nothing is taken afterwards.
  virtual Output abort(const Error& error) = 0;
  /// Whether all of the answer is made: what there is waits to be taken.
  virtual bool ended() const { return false; }
  /// For the access log, once, when the last byte is out or the client has gone.
  virtual void closed(bool complete, int status) { (void)complete, (void)status; }

  /// Connection: what to call, from any thread, when there is something to take. Called at once if there is already.
  void on_ready(std::function<void()> ready) {
    bool now;
    {
      const std::lock_guard lock(mutex_);
      ready_ = std::move(ready);
      now = ready_ && std::exchange(pending_, false);
      if (!now) return;
    }
    this->ready();
  }

 protected:
  /// Any thread: there is something to take.
  void ready() {
    std::function<void()> call;
    {
      const std::lock_guard lock(mutex_);
      if (!ready_) pending_ = true;
      call = ready_;
    }
    if (call) call();
  }

 private:
  std::mutex mutex_;
  std::function<void()> ready_;
  bool pending_ = false;
};

/// The APIs behind a listener.
class Handler {
 public:
  virtual ~Handler() = default;
  /// Before the body is read: an answer that refuses it (404, 405, 413, 415, 429, 503), or none.
  virtual std::optional<Reply> check(const HttpHead& head) = 0;
  /// The largest body this target may have, at most the listener's own limit.
  virtual uint64_t body_limit(const HttpHead& head) const = 0;
  /// The whole request is there.
  virtual std::variant<Reply, std::shared_ptr<Exchange>> handle(HttpRequest request) = 0;
  /// A refusal of the transport (408, 413) as this target's API words it.
  virtual Reply shaped(const HttpHead& head, const Reply& reply) const { return (void)head, reply; }
};

/// {"error": {message, type, param, code, ...counts}} and the status of the error's code: the one table from our codes
/// to HTTP.
Reply error_reply(const Error& error);
Reply error_reply(int status, const std::string& type, const std::string& code, const std::string& message,
                  const std::string& param = "");

}  // namespace thermocline::server
