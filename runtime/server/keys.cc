#include "runtime/server/keys.h"

#include <fmt/format.h>

#include <cctype>
#include <functional>

#include "runtime/server/wire/ids.h"

namespace thermocline::server {
namespace {

std::string secret_of(const HttpHead& head) {
  if (!head.api_key.empty()) return head.api_key;
  const std::string& value = head.authorization;
  const size_t space = value.find(' ');
  return space == std::string::npos ? value
                                    : value.substr(value.find_first_not_of(' ', space) == std::string::npos
                                                       ? value.size()
                                                       : value.find_first_not_of(' ', space));
}

}  // namespace

std::string key_name(const HttpHead& head) {
  static const std::string salt = random_id("");  // so that a name in a log tells nothing about its key
  const std::string secret = secret_of(head);
  if (secret.empty()) return "";
  return fmt::format("key-{:012x}", std::hash<std::string>()(salt + secret) & 0xffffffffffff);
}

}  // namespace thermocline::server
