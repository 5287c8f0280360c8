// ResponseStore: responses by their id, for previous_response_id and GET /v1/responses/{id}: bounded, in memory, each
// seen by its own key alone. The longest unused go first.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "runtime/server/http/handler.h"

namespace thermocline::server {

class ResponseStore {
 public:
  struct Caps {
    size_t bytes = 64 << 20;  // of JSON text
    size_t responses = 4096;
  };
  explicit ResponseStore(const Caps& caps) : caps_(caps) {}

  /// What is kept of a response.
  struct Kept {
    std::string response;       // the object, as JSON
    std::string messages = {};  // the conversation up to its end: a JSON list, as /v1/chat/completions reads it
    std::weak_ptr<Exchange> running = {};  // while it is answered
  };

  // Any thread.
  void put(const std::string& owner, const std::string& id, Kept kept);
  /// The same of one that is there: who deleted it does not see it again.
  void update(const std::string& owner, const std::string& id, Kept kept);
  /// None: there is no such response of this owner (any more).
  std::optional<Kept> find(const std::string& owner, const std::string& id);
  /// Whether there was one.
  bool erase(const std::string& owner, const std::string& id);

 private:
  struct Entry {
    std::string owner, id;
    Kept kept;
    size_t bytes = 0;
  };
  using Entries = std::list<Entry>;
  void put_locked(const std::string& owner, const std::string& id, Kept kept);
  Entries::iterator find_locked(const std::string& owner, const std::string& id);
  void erase_locked(Entries::iterator entry);

  const Caps caps_;
  std::mutex mutex_;
  Entries entries_;  // used last is first
  std::unordered_map<std::string, Entries::iterator> by_id_;
  size_t bytes_ = 0;
};

}  // namespace thermocline::server
