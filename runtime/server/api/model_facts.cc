#include "runtime/server/api/model_facts.h"

#include "runtime/io/file.h"
#include "runtime/io/json_document.h"
#include "runtime/io/safetensors.h"

namespace thermocline::server {
namespace {

// As text, or as the object of an added token.
std::string token_text(const Json& config, const char* name) {
  const auto it = config.find(name);
  if (it == config.end()) return "";
  if (it->is_string()) return it->get<std::string>();
  return it->is_object() && it->contains("content") && (*it)["content"].is_string() ? (*it)["content"] : "";
}

Status read_tokenizer_config(const std::filesystem::path& path, ModelFacts& facts) {
  const Result<std::string> text = read_text_file(path, 16 << 20);
  if (!text) return {};  // older checkpoints have none
  Result<Json> config = parse_json(*text);
  if (config && !config->is_object()) config = corrupt("not a JSON object");
  if (!config) return std::move(config).error().with(path.string());
  for (const auto& [name, token] : {std::pair("bos_token", &facts.bos_token),
                                    {"eos_token", &facts.eos_token},
                                    {"pad_token", &facts.pad_token},
                                    {"tokenizer_class", &facts.tokenizer_class}})
    if (std::string found = token_text(*config, name); !found.empty()) *token = std::move(found);
  return {};
}

}  // namespace

Result<ModelFacts> read_model_facts(const std::filesystem::path& folder, const Tokenizer& tokenizer,
                                    int32_t bos_token_id, int32_t eos_token_id) {
  ModelFacts facts;
  facts.folder = std::filesystem::weakly_canonical(folder).filename().string();
  facts.eos_token_id = eos_token_id;
  facts.bos_token = tokenizer.token_bytes(bos_token_id);
  facts.eos_token = tokenizer.token_bytes(eos_token_id);
  TC_ASSIGN(const Checkpoint checkpoint, Checkpoint::open(folder));
  for (const auto& [_, tensor] : checkpoint.tensors()) {
    facts.weight_bytes += static_cast<int64_t>(tensor.bytes);
    if (tensor.dtype == DType::f8_e8m0 || tensor.dtype == DType::i32 || tensor.dtype == DType::i64) continue;
    facts.parameters += tensor.elements() * (tensor.dtype == DType::i8 ? 2 : 1);  // FP4 is published in pairs
  }
  TC_RETURN_IF_ERROR(read_tokenizer_config(folder / "tokenizer_config.json", facts));
  return facts;
}

}  // namespace thermocline::server
