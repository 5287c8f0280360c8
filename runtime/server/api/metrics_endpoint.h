// GET /metrics, and what a request's line in the access log says to the metrics.
#pragma once

#include <vector>

#include "runtime/server/api/endpoint.h"

namespace thermocline::server {

/// Of a request for an answer. `draining`: the server was ending then.
metrics::EndedRequest ended_request(const AccessEntry& entry, bool draining);

std::vector<Endpoint> metrics_endpoints(Services& services);

}  // namespace thermocline::server
