// GET /openapi.json. Paths, methods, keys and errors come from the table of endpoints; what bodies look like from the
// files of openapi/, which are in the program.
#pragma once

#include <string>
#include <vector>

#include "runtime/server/api/endpoint.h"

namespace thermocline::server {

/// openapi/*.json as they were written.
struct OpenapiSource {
  const char* paths;     // as in OpenAPI, without security and without what openapi_document() adds
  const char* requests;  // schemas
  const char* replies;   // schemas
};
extern const OpenapiSource kOpenapiSource;

/// The document of these endpoints. A `model` sets bounds that are its own; without `keys` no operation needs one.
Json openapi_document(const std::vector<Endpoint>& endpoints, const ServedModel* model, bool keys);
/// A documented path as Endpoint::path words it: "/v1/models/{model}" is "/v1/models/*".
std::string endpoint_path(const std::string& documented);

}  // namespace thermocline::server
