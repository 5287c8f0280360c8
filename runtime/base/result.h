// Result<T> and Status: outcomes the caller decides on. An Error carries a code (the server maps codes to HTTP
// statuses) and a sentence; `with` adds context on the way up and keeps the code.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "runtime/base/check.h"

namespace thermocline {

enum class ErrorCode {
  invalid_argument,  // the caller's input is wrong: a flag, a request field, a prompt
  not_found,         // a file, tensor or model that should be there is not
  corrupt,           // bytes from outside contradict themselves or their format
  unsupported,       // well-formed, but not something this build can run
  io,                // the operating system refused a read, write or mapping
  out_of_memory,     // host memory or KV pages do not suffice
  cancelled,         // the client left or the user pressed Ctrl-C
  internal,          // a bug of ours that was caught before it did harm
  context_length,    // a prompt, or a prompt and its answer, that no context of this model holds
  overloaded,        // healthy, but the queue is full: later
  unavailable,       // not ready: loading, draining, or a device has failed
  deadline,          // the request's own time is over
};

struct [[nodiscard]] Error {
  ErrorCode code = ErrorCode::internal;
  std::string message;
  std::string field = {};                                    // the request field or flag at fault, where there is one
  std::vector<std::pair<std::string, int64_t>> counts = {};  // numbers a program may want: n_prompt_tokens, n_ctx

  /// The same error with `context: ` in front of its message.
  Error with(const std::string& context) && {
    message = context + ": " + message;
    return std::move(*this);
  }
};

inline Error invalid(std::string message) { return {ErrorCode::invalid_argument, std::move(message)}; }
inline Error corrupt(std::string message) { return {ErrorCode::corrupt, std::move(message)}; }
inline Error unsupported(std::string message) { return {ErrorCode::unsupported, std::move(message)}; }

/// A value or an Error. Reading the value of a failed result aborts: check first.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}

  bool has_value() const { return state_.index() == 0; }
  bool ok() const { return has_value(); }
  explicit operator bool() const { return has_value(); }

  T& value() & {
    TC_CHECK(has_value(), "value() of a failed Result: " + std::get<1>(state_).message);
    return std::get<0>(state_);
  }
  const T& value() const& { return const_cast<Result*>(this)->value(); }
  T&& value() && { return std::move(value()); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(value()); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

  Error& error() & { return std::get<1>(state_); }
  const Error& error() const& { return std::get<1>(state_); }
  Error&& error() && { return std::move(std::get<1>(state_)); }

 private:
  std::variant<T, Error> state_;
};

/// Success or an Error.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Error error) : error_(std::move(error)), ok_(false) {}

  bool ok() const { return ok_; }
  explicit operator bool() const { return ok_; }
  const Error& error() const& { return error_; }
  Error&& error() && { return std::move(error_); }

 private:
  Error error_;
  bool ok_ = true;
};

}  // namespace thermocline

/// Returns the error of a Status or Result from the enclosing function, if it is one.
#define TC_RETURN_IF_ERROR(expression)                                                  \
  do {                                                                                  \
    if (auto tc_status = (expression); !tc_status) return std::move(tc_status).error(); \
  } while (false)

#define TC_CONCAT_INNER(a, b) a##b
#define TC_CONCAT(a, b) TC_CONCAT_INNER(a, b)
#define TC_ASSIGN_INNER(result, declaration, expression) \
  auto result = (expression);                            \
  if (!result) return std::move(result).error();         \
  declaration = std::move(result).value()
/// `TC_ASSIGN(auto x, f())`: x is the value of f(), or the enclosing function returns its error.
#define TC_ASSIGN(declaration, expression) TC_ASSIGN_INNER(TC_CONCAT(tc_result_, __LINE__), declaration, expression)
