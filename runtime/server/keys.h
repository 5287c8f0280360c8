// Who asks, without keeping the secret that says so.
#pragma once

#include <string>

#include "runtime/server/http/handler.h"

namespace thermocline::server {

/// A short name for the API key of a request (Authorization: Bearer or x-api-key), the same for the same key while the
/// program runs; "" where there is none. The fair queue and the access log know clients by it.
std::string key_name(const HttpHead& head);

}  // namespace thermocline::server
