// A folder given as --model that is none: what was probably meant.
#pragma once

#include <filesystem>
#include <memory>

#include "runtime/base/result.h"
#include "runtime/text/tokenizer.h"

namespace thermocline::cli {

/// Only what is no model at all; what is wrong in a file is told by who reads it. Without `weights` any folder will do:
/// text tools need a tokenizer alone.
/// Errors: not_found, of --model: what is there, what is missing, and models nearby.
Status check_model_folder(const std::filesystem::path& folder, bool weights);

/// The same result; an error that a model's files are to blame for says so, and ends the program with kModelError.
template <class T>
Result<T> of_model(Result<T> result) {
  if (result) return result;
  Error error = std::move(result).error();
  const bool files =
      error.code == ErrorCode::not_found || error.code == ErrorCode::corrupt || error.code == ErrorCode::unsupported;
  if (files && error.field.empty()) error.field = "--model";
  return error;
}

/// Its tokenizer. Errors: not_found, of --model, where it has none; those of Tokenizer::load.
Result<std::unique_ptr<Tokenizer>> load_tokenizer(const std::filesystem::path& folder);

}  // namespace thermocline::cli
