#include "runtime/server/keys.h"

#include <fmt/format.h>
#include <sodium.h>
#include <sys/stat.h>

#include <algorithm>
#include <charconv>
#include <functional>
#include <sstream>

#include "runtime/io/file.h"
#include "runtime/server/wire/ids.h"

namespace thermocline::server {
namespace {

constexpr size_t kDigestBytes = 32, kShortestKey = 8, kLongestKey = 512, kMostKeys = 10'000;

// What the client sent; a scheme in front of it does not matter.
std::string secret_of(const HttpHead& head) {
  if (!head.api_key.empty()) return head.api_key;
  const std::string& value = head.authorization;
  const size_t space = value.find(' ');
  if (space == std::string::npos) return value;
  const size_t begin = value.find_first_not_of(' ', space);
  return begin == std::string::npos ? "" : value.substr(begin);
}

// Under a secret of this process: what memory holds of a key says nothing about it.
std::string digest_of(const std::string& secret) {
  static const std::string process_key = random_id("");
  std::string digest(kDigestBytes, '\0');
  const auto bytes = [](const std::string& s) { return reinterpret_cast<const unsigned char*>(s.data()); };
  crypto_generichash(reinterpret_cast<unsigned char*>(digest.data()), digest.size(), bytes(secret), secret.size(),
                     bytes(process_key), std::min<size_t>(process_key.size(), crypto_generichash_KEYBYTES_MAX));
  return digest;
}

Error key_error(const std::string& where, const std::string& what) {
  Error error = invalid(where + ": " + what);
  error.field = "--api-key-file";
  return error;
}

Status check_secret(const std::string& secret, const std::string& where) {
  const auto printable = [](char c) { return c > ' ' && c <= '~'; };
  if (secret.size() < kShortestKey || secret.size() > kLongestKey ||
      !std::all_of(secret.begin(), secret.end(), printable))
    return key_error(where, fmt::format("a key has {} to {} printable characters (openssl rand -hex 24 makes one)",
                                        kShortestKey, kLongestKey));
  return {};
}

Status check_mode(const std::string& file) {
  struct stat info {};
  if (stat(file.c_str(), &info) != 0) return Error{ErrorCode::io, "the key file " + file + " cannot be read"};
  if ((info.st_mode & 027) != 0)
    return key_error(file, fmt::format("others can read it (mode {:o}): chmod 600 {}", info.st_mode & 07777, file));
  return {};
}

Status read_option(const std::string& option, const std::string& where, ApiClient& client) {
  if (option == "admin") {
    client.admin = true;
  } else if (option.starts_with("salt=")) {
    client.cache_salt = option.substr(5);
  } else if (option.starts_with("max-requests=")) {
    const char* const begin = option.data() + 13;
    const char* const end = option.data() + option.size();
    const auto [stop, error] = std::from_chars(begin, end, client.max_requests);
    if (error != std::errc() || stop != end || client.max_requests < 1)
      return key_error(where, "max-requests should be a number from 1 on");
  } else {
    return key_error(where, "unknown option behind the key: there are admin, max-requests=N and salt=TEXT");
  }
  return {};
}

}  // namespace

std::string key_name(const HttpHead& head) {
  static const std::string salt = random_id("");  // so that a name in a log tells nothing about its key
  const std::string secret = secret_of(head);
  if (secret.empty()) return "";
  return fmt::format("key-{:012x}", std::hash<std::string>()(salt + secret) & 0xffffffffffff);
}

Result<KeyPlace> ApiClient::take_place() const {
  if (!requests) return KeyPlace();
  if (++*requests > max_requests && max_requests > 0) {
    --*requests;
    return Error{ErrorCode::overloaded,
                 fmt::format("the key '{}' has {} requests in progress, as many as it may have", name, max_requests),
                 "api_key"};
  }
  return KeyPlace(requests);
}

Status ApiKeys::load(const Options& options) {
  options_ = options;
  return reload();
}

Status ApiKeys::reload() {
  TC_ASSIGN(Keys now, read());
  const std::lock_guard lock(mutex_);
  for (Key& key : now)  // requests in progress go on to count
    for (const Key& old : *keys_)
      if (old.client.name == key.client.name) key.client.requests = old.client.requests;
  keys_ = std::make_shared<const Keys>(std::move(now));
  return {};
}

Result<ApiKeys::Keys> ApiKeys::read() const {
  Keys keys;
  const auto add = [&](ApiClient client, const std::string& secret, const std::string& where) -> Status {
    TC_RETURN_IF_ERROR(check_secret(secret, where));
    for (const Key& other : keys)
      if (other.client.name == client.name) return key_error(where, "the name '" + client.name + "' is there twice");
    client.requests = std::make_shared<std::atomic<int>>(0);
    keys.push_back({digest_of(secret), std::move(client)});
    if (keys.size() > kMostKeys) return key_error(where, fmt::format("there are more than {} keys", kMostKeys));
    return {};
  };
  for (size_t i = 0; i < options_.keys.size(); ++i)
    TC_RETURN_IF_ERROR(add({.name = fmt::format("key-{}", i + 1), .cache_salt = ""}, options_.keys[i], "--api-key"));
  for (size_t i = 0; i < options_.admin_keys.size(); ++i)
    TC_RETURN_IF_ERROR(add({.name = fmt::format("admin-{}", i + 1), .cache_salt = "", .admin = true},
                           options_.admin_keys[i], "--admin-key"));
  if (!options_.file.empty()) {
    TC_RETURN_IF_ERROR(check_mode(options_.file));
    TC_ASSIGN(const std::string text, read_text_file(options_.file, 4 << 20));
    std::istringstream lines(text);
    std::string line;
    for (int number = 1; std::getline(lines, line); ++number) {
      const std::string where = fmt::format("{}:{}", options_.file, number);
      std::istringstream words(line);
      std::string head, option;
      if (!(words >> head) || head.front() == '#') continue;
      const size_t colon = head.find(':');
      if (colon == std::string::npos || colon == 0 || colon > 64)
        return key_error(where, "a line is 'name:key', the name of at most 64 characters");
      ApiClient client{.name = head.substr(0, colon), .cache_salt = ""};
      while (words >> option) TC_RETURN_IF_ERROR(read_option(option, where, client));
      TC_RETURN_IF_ERROR(add(std::move(client), head.substr(colon + 1), where));
    }
    if (keys.empty()) return key_error(options_.file, "there is no key in it");
  }
  // Several keys are several parties: none may take the whole server, or see what another one cached.
  for (Key& key : keys) {
    if (keys.size() > 1 && key.client.max_requests == 0) key.client.max_requests = options_.max_requests;
    if (key.client.cache_salt.empty()) key.client.cache_salt = keys.size() > 1 ? "key:" + key.client.name : "shared";
  }
  return keys;
}

std::shared_ptr<const ApiKeys::Keys> ApiKeys::keys() const {
  const std::lock_guard lock(mutex_);
  return keys_;
}

bool ApiKeys::required() const { return !keys()->empty(); }

std::optional<ApiClient> ApiKeys::identify(const HttpHead& head) const {
  const std::shared_ptr<const Keys> keys = this->keys();
  if (keys->empty()) {
    ApiClient client{.name = key_name(head), .cache_salt = ""};
    client.cache_salt = client.name;
    return client;
  }
  const std::string digest = digest_of(secret_of(head));
  const Key* found = nullptr;
  for (const Key& key : *keys)  // all of them, however early one fits
    if (sodium_memcmp(key.digest.data(), digest.data(), digest.size()) == 0) found = &key;
  if (!found) return std::nullopt;
  return found->client;
}

}  // namespace thermocline::server
