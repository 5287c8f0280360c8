// GET /v1/models, /v1/models/{id}: the one model, under all its names.
#pragma once

#include "runtime/server/api/endpoint.h"

namespace thermocline::server {

std::vector<Endpoint> models_endpoints(Services& services);

}  // namespace thermocline::server
