// GET /props, /slots, /load and /get_load: what runs here and how busy it is.
#pragma once

#include "runtime/server/api/endpoint.h"

namespace thermocline::server {

std::vector<Endpoint> server_info_endpoints(Services& services);

}  // namespace thermocline::server
