// What a checkpoint's folder says of it beside what a step needs: for /v1/models, /props and /tokenizer_info.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "runtime/base/result.h"
#include "runtime/text/tokenizer.h"

namespace thermocline::server {

struct ModelFacts {
  std::string folder;           // its last part alone
  int64_t trained_context = 0;  // tokens
  int64_t parameters = 0;       // without the scales of blocks and tables of ids
  int64_t weight_bytes = 0;     // of all tensors
  int32_t eos_token_id = 0;
  std::string bos_token, eos_token, pad_token, tokenizer_class;  // "": it names none
};

/// From the headers of the weights and, where it is there, tokenizer_config.json.
/// Errors: those of Checkpoint::open; corrupt, naming tokenizer_config.json.
Result<ModelFacts> read_model_facts(const std::filesystem::path& folder, const Tokenizer& tokenizer,
                                    int32_t bos_token_id, int32_t eos_token_id);

}  // namespace thermocline::server
