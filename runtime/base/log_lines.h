// The two shapes of a line of the log. Whatever a message quotes, it cannot begin a line of its own.
#pragma once

#include <string>
#include <string_view>

namespace thermocline {

/// As a terminal may show it: control bytes are escaped, further lines of a message are indented.
std::string log_text(std::string_view message);
/// {"time":1732758328.123,"level":"info","message":"..."}; bytes that are no UTF-8 are replaced.
std::string log_json(double time, std::string_view level, std::string_view message);

}  // namespace thermocline
