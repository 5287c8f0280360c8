// What passes between a connection and the step thread: a reply, or a stream of server-sent events, and a cancel.
#pragma once

#include <atomic>
#include <deque>
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

struct HttpRequest {
  std::string method, target, content_type, body;
};

struct Reply {
  int status = 200;
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers = {};
};

/// The reply for an Error: {"error": {message, type, param, code}} and the HTTP status of its code.
Reply error_reply(const Error& error);
Reply error_reply(int status, const std::string& type, const std::string& code, const std::string& message,
                  const std::string& param = "");

/// One generation. The step thread runs `work`, which emits events (streams) or finishes with a reply; the connection
/// takes them. Any thread may set `cancel`.
class Exchange {
 public:
  bool stream = false;
  std::function<void(Exchange&)> work;
  std::atomic<bool> cancel{false};

  /// Step thread: the next piece of the body, already framed.
  void emit(std::string piece) {
    put([&] { pieces_.push_back(std::move(piece)); });
  }
  /// Step thread: the end; `reply` is the whole answer where nothing was emitted.
  void finish(Reply reply = {}) {
    put([&] {
      reply_ = std::move(reply);
      finished_ = true;
    });
  }

  /// Connection: everything emitted since the last call, and whether that is the end.
  std::pair<std::string, bool> take() {
    const std::lock_guard lock(mutex_);
    std::string all;
    for (const std::string& piece : pieces_) all += piece;
    pieces_.clear();
    return {std::move(all), finished_};
  }
  Reply take_reply() {
    const std::lock_guard lock(mutex_);
    return std::move(reply_);
  }
  /// Connection: what to call, from the step thread, when there is something to take.
  void on_ready(std::function<void()> ready) {
    const std::lock_guard lock(mutex_);
    ready_ = std::move(ready);
  }

 private:
  template <class Fn>
  void put(const Fn& fn) {
    std::function<void()> ready;
    {
      const std::lock_guard lock(mutex_);
      fn();
      ready = ready_;
    }
    if (ready) ready();
  }

  std::mutex mutex_;
  std::deque<std::string> pieces_;
  Reply reply_;
  bool finished_ = false;
  std::function<void()> ready_;
};

/// An answer that is there at once, or a generation to wait for.
using Outcome = std::variant<Reply, std::shared_ptr<Exchange>>;
using Handler = std::function<Outcome(const HttpRequest&)>;

}  // namespace thermocline::server
