#include "runtime/server/api/render.h"

#include "runtime/server/api/chat_completions.h"

namespace thermocline::server {

Result<std::vector<int32_t>> chat_prompt_ids(Services& services, const Call& call, const Json& body) {
  const auto chat = std::make_shared<ChatGeneration>(Call{.query = call.query, .model = call.model}, services);
  TC_ASSIGN(std::vector<Request> requests, chat->read(body));
  return std::move(requests.at(0).prompt);
}

std::string text_of(const ServedModel& model, const std::vector<int32_t>& ids) {
  std::string text;
  for (const int32_t id : ids) text += model.tokenizer.token_bytes(id);
  return text;
}

std::vector<Endpoint> render_endpoints(Services& services) {
  const auto render = [&services](Call asked) {
    return prepared(services, std::move(asked), [&services](const Call& call, const Json& body) -> Result<Json> {
      TC_ASSIGN(const std::vector<int32_t> ids, chat_prompt_ids(services, call, body));
      const std::string text = text_of(*call.model, ids);
      return Json{{"prompt", text}, {"token_ids", ids}, {"count", ids.size()}};
    });
  };
  return {{.method = "POST", .path = "/apply-template", .answer = render},
          {.method = "POST", .path = "/v1/chat/completions/render", .answer = render}};
}

}  // namespace thermocline::server
