// What other servers offer and this one does not: 501 and a sentence, so that a client says more than "not found".
#pragma once

#include "runtime/server/api/endpoint.h"

namespace thermocline::server {

std::vector<Endpoint> unsupported_endpoints(Services& services);

}  // namespace thermocline::server
