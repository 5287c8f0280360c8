// GET /v1/experts: how much every expert is used, and where it is. GET /v1/plan: what the planner says of this model
// here.
#pragma once

#include <vector>

#include "runtime/server/api/endpoint.h"

namespace thermocline::server {

std::vector<Endpoint> experts_endpoints(Services& services);

}  // namespace thermocline::server
