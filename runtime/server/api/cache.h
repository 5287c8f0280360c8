// GET /v1/cache/stats and POST /v1/cache/flush, for admins.
#pragma once

#include "runtime/server/api/endpoint.h"

namespace thermocline::server {

std::vector<Endpoint> cache_endpoints(Services& services);

}  // namespace thermocline::server
