// Names for replies: nobody can guess another client's.
#pragma once

#include <string>

namespace thermocline::server {

/// `prefix` and 144 random bits, from the system (getrandom).
std::string random_id(const std::string& prefix);

}  // namespace thermocline::server
