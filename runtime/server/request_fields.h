// Checked access to the fields of a request body. Every error names its field, as OpenAI's `param` does.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "runtime/engine/generation.h"
#include "runtime/io/json_document.h"

namespace thermocline::server {

Error field_error(const std::string& field, const std::string& what);

/// The fields of one JSON object. A field that is null counts as absent.
class Fields {
 public:
  explicit Fields(const Json& object) : object_(object) {}

  const Json* find(const char* name) const {
    const auto it = object_.find(name);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  Result<double> number(const char* name, double fallback) const;
  Result<int64_t> integer(const char* name, int64_t fallback, int64_t low, int64_t high) const;
  Result<bool> boolean(const char* name, bool fallback) const;
  Result<std::string> text(const char* name, const std::string& fallback) const;
  /// A string or a list of at most 16 non-empty strings.
  Result<std::vector<std::string>> stops() const;

 private:
  const Json& object_;
};

/// Sampling, limits and stops of both completion endpoints; defaults come from the model's generation_config.json.
Result<GenerationRequest> read_generation_fields(const Fields& fields, const SamplingParams& defaults);

/// temperature, top_p and top_k of a checkpoint's generation_config.json; the plain defaults where it has none.
/// Errors: corrupt, naming the file.
Result<SamplingParams> read_sampling_defaults(const std::filesystem::path& model);

}  // namespace thermocline::server
