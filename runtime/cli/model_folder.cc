#include "runtime/cli/model_folder.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <string>
#include <vector>

#include "runtime/base/edit_distance.h"

namespace thermocline::cli {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMostNames = 12;

bool is_model(const fs::path& folder) {
  std::error_code ignored;
  return fs::exists(folder / "config.json", ignored);
}

// Sorted; of folders only those that hold a model, if `models`.
std::vector<std::string> names_in(const fs::path& folder, bool models) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error))
    if (!models || is_model(entry->path())) names.push_back(entry->path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

std::string listed(std::vector<std::string> names) {
  if (names.empty()) return "nothing";
  const bool more = names.size() > kMostNames;
  names.resize(std::min(names.size(), kMostNames));
  return fmt::format("{}{}", fmt::join(names, ", "), more ? ", ..." : "");
}

std::string missing_files(const fs::path& folder) {
  std::error_code ignored;
  std::vector<std::string> missing = {"config.json"};
  if (!fs::exists(folder / "model.safetensors", ignored) &&
      !fs::exists(folder / "model.safetensors.index.json", ignored))
    missing.emplace_back("model.safetensors.index.json");
  if (!fs::exists(folder / "tokenizer.json", ignored)) missing.emplace_back("tokenizer.json");
  return fmt::format("{} {} missing", fmt::join(missing, ", "), missing.size() == 1 ? "is" : "are");
}

std::string suggestion(const fs::path& folder) {
  const fs::path whole = folder.has_filename() ? folder : folder.parent_path();
  const fs::path parent = whole.has_parent_path() ? whole.parent_path() : fs::path(".");
  const std::vector<std::string> models = names_in(parent, true);
  if (const std::string near = nearest(whole.filename().string(), models); !near.empty())
    return fmt::format("; did you mean {}?", (whole.parent_path() / near).string());
  return models.empty() ? "" : fmt::format("; models in {}: {}", parent.string(), listed(models));
}

Error no_model(std::string message) { return {ErrorCode::not_found, std::move(message), "--model"}; }

}  // namespace

Status check_model_folder(const fs::path& folder, bool weights) {
  std::error_code error;
  const fs::file_status status = fs::status(folder, error);
  if (!fs::exists(status)) {
    const bool absent = status.type() == fs::file_type::not_found;
    return no_model(fmt::format("there is no model folder {}{}{}", folder.string(),
                                absent ? "" : ": " + error.message(), absent ? suggestion(folder) : ""));
  }
  if (!fs::is_directory(status)) return no_model(folder.string() + " is a file; give the folder of the checkpoint");
  if (!weights || is_model(folder)) return {};
  const std::vector<std::string> inside = names_in(folder, true);
  return no_model(fmt::format(
      "{} is no model: {}; it holds {}{}", folder.string(), missing_files(folder), listed(names_in(folder, false)),
      inside.empty() ? suggestion(folder) : fmt::format("; did you mean {}?", (folder / inside[0]).string())));
}

Result<std::unique_ptr<Tokenizer>> load_tokenizer(const fs::path& folder) {
  std::error_code ignored;
  if (fs::status(folder / "tokenizer.json", ignored).type() == fs::file_type::not_found)
    return no_model(fmt::format(
        "{} has no tokenizer.json, and `thermocline synth` writes none: copy that of the published model there. logits "
        "and bench step need none, bench server takes another folder's by --tokenizer DIR",
        folder.string()));
  return of_model(Tokenizer::load(folder));
}

}  // namespace thermocline::cli
