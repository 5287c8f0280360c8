// TC_CHECK: a promise our own code must keep. A broken one aborts and prints both sides; outside input never gets here.
#pragma once

#include <string>

namespace thermocline {

[[noreturn]] void check_failed(const char* file, int line, const char* expression, const std::string& detail);

}  // namespace thermocline

#define TC_CHECK(condition, ...)                                                               \
  do {                                                                                         \
    if (!(condition)) [[unlikely]]                                                             \
      ::thermocline::check_failed(__FILE__, __LINE__, #condition, ::std::string(__VA_ARGS__)); \
  } while (false)

#define TC_CHECK_EQ(a, b)                                                                  \
  do {                                                                                     \
    if (auto tc_a = (a); !(tc_a == static_cast<decltype(tc_a)>(b))) [[unlikely]]           \
      ::thermocline::check_failed(__FILE__, __LINE__, #a " == " #b,                        \
                                  std::to_string(tc_a) + " against " + std::to_string(b)); \
  } while (false)
