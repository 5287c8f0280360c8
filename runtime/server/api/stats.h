// GET /v1/stats: what the server does now, as a document or as an event stream. docs/observability.md has the fields.
#pragma once

#include <vector>

#include "runtime/server/api/endpoint.h"

namespace thermocline::server {

/// As `client` may see it: where there are keys, only admins see the requests of others.
Json stats_json(const Services& services, const ApiClient& client);

std::vector<Endpoint> stats_endpoints(Services& services);

}  // namespace thermocline::server
