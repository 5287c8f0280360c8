#include "runtime/base/log_lines.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

namespace thermocline {

// In UTF-8, U+0080 to U+009F are controls too: C2 and a byte below A0.
std::string log_text(std::string_view message) {
  std::string out;
  for (size_t i = 0; i < message.size(); ++i) {
    const auto byte = static_cast<unsigned char>(message[i]);
    const bool high = byte == 0xc2 && i + 1 < message.size() && static_cast<unsigned char>(message[i + 1]) < 0xa0;
    if (byte == '\n')
      out += i + 1 < message.size() && message[i + 1] == ' ' ? "\n" : "\n  ";  // tables are indented already
    else if (high)
      out += fmt::format("\\u{:04x}", static_cast<unsigned char>(message[++i]));
    else if ((byte < ' ' && byte != '\t') || byte == 0x7f)
      out += fmt::format("\\x{:02x}", byte);
    else
      out += message[i];
  }
  return out;
}

std::string log_json(double time, std::string_view level, std::string_view message) {
  const nlohmann::ordered_json line = {{"time", time}, {"level", level}, {"message", message}};
  return line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace thermocline
