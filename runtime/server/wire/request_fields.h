// Checked access to the fields of a request body. Every error names its field, as OpenAI's `param` does.
#pragma once

#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "runtime/engine/request.h"
#include "runtime/io/json_document.h"

namespace thermocline::server {

Error field_error(const std::string& field, const std::string& what);
/// A field that is understood and that this server does not offer.
Error not_offered(const std::string& field, const std::string& what);

/// A number without a fraction, however it is written: 5, 5.0, 5e0. None: something else, or no int64.
std::optional<int64_t> integer_of(const Json& value);
/// The same of one that is a token's id.
std::optional<int32_t> token_id_of(const Json& value, int64_t vocab);

/// The fields of one JSON object. A field that is null counts as absent.
class Fields {
 public:
  /// `place`: where the object stands, with a dot behind it: errors name "stream_options.include_usage".
  explicit Fields(const Json& object, std::string place = "") : object_(object), place_(std::move(place)) {}

  const Json* find(const char* name) const {
    const auto it = object_.find(name);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  Result<double> number(const char* name, double fallback) const;
  Result<int64_t> integer(const char* name, int64_t fallback, int64_t low, int64_t high) const;
  Result<bool> boolean(const char* name, bool fallback) const;
  Result<std::string> text(const char* name, const std::string& fallback) const;
  Result<std::string> required_text(const char* name) const;
  /// `stop`: a string or a list of at most 16, none of them empty or longer than 4,096 bytes.
  Result<std::vector<std::string>> stops() const;
  /// A list of token ids below `vocab`, at most `most` of them.
  Result<std::vector<int32_t>> token_ids(const char* name, int64_t vocab, size_t most) const;

 private:
  Error error(const char* name, const std::string& what) const { return field_error(place_ + name, what); }

  const Json& object_;
  const std::string place_;
};

/// Sampling, limits and stops of both completion endpoints; defaults come from the model's generation_config.json.
/// `timeout` (seconds, from `arrived` on) becomes the request's deadline.
/// Errors: invalid_argument and unsupported, naming the field.
Result<Request> read_generation_fields(const Fields& fields, const SamplingParams& defaults, int64_t vocab,
                                       Request::Clock::time_point arrived);

/// Every field that read_generation_fields looks at.
std::span<const char* const> generation_fields();

/// temperature, top_p and top_k of a checkpoint's generation_config.json; the plain defaults where it has none.
/// Errors: corrupt, naming the file.
Result<SamplingParams> read_sampling_defaults(const std::filesystem::path& model);

}  // namespace thermocline::server
