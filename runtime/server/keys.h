// Who may ask, and what each may cost.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "runtime/server/http/handler.h"

namespace thermocline::server {

/// A short name for the API key of a request (Authorization: Bearer or x-api-key), the same for the same key while the
/// program runs; "" where there is none. Where no keys are asked for, the fair queue and the access log know clients by
/// it.
std::string key_name(const HttpHead& head);

/// A place among the requests of a key that are answered at a time; given back when it goes.
class KeyPlace {
 public:
  KeyPlace() = default;
  explicit KeyPlace(std::shared_ptr<std::atomic<int>> count) : count_(std::move(count)) {}
  KeyPlace(KeyPlace&& other) noexcept = default;
  KeyPlace& operator=(KeyPlace&& other) noexcept {
    release();
    count_ = std::move(other.count_);
    return *this;
  }
  ~KeyPlace() { release(); }

 private:
  void release() {
    if (count_) --*count_;
    count_.reset();
  }
  std::shared_ptr<std::atomic<int>> count_;
};

/// Whoever sent a request.
struct ApiClient {
  std::string name;        // of its key; without keys key_name()
  std::string cache_salt;  // of its key: clients share prefixes with those of the same salt
  bool admin = false;
  int max_requests = 0;  // answered at a time; 0: no limit of its own
  std::shared_ptr<std::atomic<int>> requests = {};

  /// Errors: overloaded, where the key has as many as it may have.
  Result<KeyPlace> take_place() const;
};

/// The keys of the server: digests under a secret of the process, compared in constant time.
class ApiKeys {
 public:
  struct Options {
    std::vector<std::string> keys;        // secrets given one by one: key-1, key-2, ...
    std::vector<std::string> admin_keys;  // the same, and they may do what an admin may: admin-1, ...
    std::string file;                     // see load(); "": none
    int max_requests = 64;                // of each key, where there are several and it says nothing else
  };

  /// Without keys: everybody may ask, and nobody is an admin.
  ApiKeys() = default;
  /// Of the options and the lines of the file, `name:secret` and behind it, after white space, `admin`,
  /// `max-requests=N` and `salt=TEXT` (names of the same salt share cached prefixes). Empty lines and lines that begin
  /// with # are skipped.
  /// Errors: io, invalid_argument, naming file and line; also for a file that others may read or the group may write.
  Status load(const Options& options);
  /// The file once more: on an error the keys stay as they are. Any thread.
  Status reload();

  /// Whether a request needs one.
  bool required() const;
  /// None: the key is missing or wrong. Any thread.
  std::optional<ApiClient> identify(const HttpHead& head) const;

 private:
  struct Key {
    std::string digest;
    ApiClient client;
  };
  using Keys = std::vector<Key>;
  Result<Keys> read() const;
  std::shared_ptr<const Keys> keys() const;

  Options options_;
  mutable std::mutex mutex_;
  std::shared_ptr<const Keys> keys_ = std::make_shared<const Keys>();
};

}  // namespace thermocline::server
