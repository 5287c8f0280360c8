#include "runtime/server/api/unsupported.h"

namespace thermocline::server {

std::vector<Endpoint> unsupported_endpoints(Services&) {
  constexpr const char* embeddings = "this model answers in text and makes no embeddings";
  constexpr const char* ranking = "this model answers in text and does not score documents";
  constexpr const char* audio = "this model reads and writes text, no audio";
  constexpr const char* images = "this model reads and writes text, no images";
  constexpr std::pair<const char*, const char*> kPaths[] = {
      {"/v1/embeddings", embeddings},
      {"/v1/rerank", ranking},
      {"/v2/rerank", ranking},
      {"/v1/score", ranking},
      {"/v1/audio/transcriptions", audio},
      {"/v1/audio/translations", audio},
      {"/v1/audio/speech", audio},
      {"/v1/images/generations", images},
      {"/v1/images/edits", images},
      {"/v1/images/variations", images},
      {"/v1/moderations", "this model answers in text and does not classify it"},
  };
  std::vector<Endpoint> endpoints;
  for (const auto& [path, text] : kPaths)
    endpoints.push_back({.method = "POST",
                         .path = path,
                         .model = false,
                         .json = false,
                         .answer = [text = text](const Call&) -> Outcome {
                           return error_reply(501, "not_supported", "not_supported", text);
                         }});
  return endpoints;
}

}  // namespace thermocline::server
