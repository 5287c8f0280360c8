// POST /apply-template, as llama.cpp words it, and /v1/chat/completions/render, as vLLM does: the prompt that a chat
// would run.
#pragma once

#include "runtime/server/api/endpoint.h"

namespace thermocline::server {

/// The token ids of a body of /v1/chat/completions. Errors: those that the chat itself would get.
Result<std::vector<int32_t>> chat_prompt_ids(Services& services, const Call& call, const Json& body);
/// Their text, special tokens included.
std::string text_of(const ServedModel& model, const std::vector<int32_t>& ids);

std::vector<Endpoint> render_endpoints(Services& services);

}  // namespace thermocline::server
