// POST /tokenize and /detokenize, as llama.cpp and as vLLM word them; GET /tokenizer_info.
#pragma once

#include "runtime/server/api/endpoint.h"

namespace thermocline::server {

std::vector<Endpoint> tokenize_endpoints(Services& services);

}  // namespace thermocline::server
