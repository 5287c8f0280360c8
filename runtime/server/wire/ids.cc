#include "runtime/server/wire/ids.h"

#include <sys/random.h>

#include "runtime/base/check.h"

namespace thermocline::server {

std::string random_id(const std::string& prefix) {
  constexpr const char* kDigits = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-";
  unsigned char bytes[24];
  TC_CHECK_EQ(getrandom(bytes, sizeof bytes, 0), static_cast<ssize_t>(sizeof bytes));
  std::string id = prefix;
  for (const unsigned char byte : bytes) id += kDigits[byte & 63];
  return id;
}

}  // namespace thermocline::server
