// The built-in page: the files of this folder, embedded when the program is built. It needs no model and no key.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "runtime/server/api/endpoint.h"

namespace thermocline::server {

/// The file of a path without query (`/`, `/page/<file>`), gzipped where the client takes that, 304 where it has it
/// already; none where the page has no such path.
std::optional<Reply> page_reply(const std::string& path, const HttpHead& head);

std::vector<Endpoint> page_endpoints(Services& services);

}  // namespace thermocline::server
