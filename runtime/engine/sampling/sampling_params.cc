#include "runtime/engine/sampling/sampling_params.h"

#include <fmt/format.h>

#include <string>
#include <type_traits>

namespace thermocline {
namespace {

Status refuse(const std::string& field, const std::string& what) {
  Error error = invalid(field + " " + what);
  error.field = field;
  return error;
}

template <class T>
Status in_range(const std::string& field, T value, std::type_identity_t<T> low, std::type_identity_t<T> high) {
  if (value >= low && value <= high) return {};  // false for NaN
  return refuse(field, fmt::format("is {}, outside {} to {}", value, low, high));
}

}  // namespace

Status SamplingParams::check(int64_t vocab) const {
  TC_RETURN_IF_ERROR(in_range("temperature", temperature, 0, 100));
  TC_RETURN_IF_ERROR(in_range("top_p", top_p, 1e-9, 1));
  TC_RETURN_IF_ERROR(in_range("top_k", top_k, -1, 1'000'000'000));
  TC_RETURN_IF_ERROR(in_range("min_p", min_p, 0, 1));
  TC_RETURN_IF_ERROR(in_range("repetition_penalty", repetition_penalty, 1e-3, 100));
  TC_RETURN_IF_ERROR(in_range("presence_penalty", presence_penalty, -2, 2));
  TC_RETURN_IF_ERROR(in_range("frequency_penalty", frequency_penalty, -2, 2));
  for (const auto& [id, bias] : logit_bias) {
    const std::string field = "logit_bias[" + std::to_string(id) + "]";
    if (id < 0 || (vocab >= 0 && id >= vocab))
      return refuse(field, vocab < 0 ? "names no token: ids start at 0"
                                     : "names no token of the vocabulary of " + std::to_string(vocab));
    TC_RETURN_IF_ERROR(in_range(field, bias, -100, 100));
  }
  return {};
}

}  // namespace thermocline
