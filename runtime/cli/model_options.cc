#include <fmt/format.h>

#include <cstdio>

#include "runtime/cli/command.h"

namespace thermocline::cli {

void ModelOptions::add_to(CLI::App& command, bool weights) {
  command.add_option("--model", model_, "Folder of a DeepSeek-V4 checkpoint")->required();
  if (!weights) return;
  command.add_option("--numerics", numerics_, "What is rounded: published, bf16 or fp32 (docs/numerics.md)")
      ->capture_default_str();
  command
      .add_option("--activations", activations_,
                  "Inputs of the routed experts: exact, or int8 (faster; docs/numerics.md has its KL)")
      ->capture_default_str();
  command.add_option("--threads", threads_, "Worker threads; 0: one per core this process may use")
      ->capture_default_str();
  command
      .add_option("--max-isa", max_isa_, "Highest instruction set to use: scalar, avx2, avx512, amx or amx-emulated")
      ->capture_default_str();
  command
      .add_option("--max-model-len,--ctx-size", max_model_len_,
                  "Context in tokens; 0: the model's limit, at most 32768")
      ->capture_default_str();
  command.add_option("--topology", topology_,
                     "An hwloc description such as 'node:2 core:4 pu:1' instead of this machine");
  command.add_flag("--direct-io", direct_io_, "Read the checkpoint with O_DIRECT, past the page cache");
}

Result<EngineOptions> ModelOptions::engine_options() const {
  EngineOptions options;
  options.model = model_;
  TC_ASSIGN(options.numerics, parse_numerics(numerics_));
  TC_ASSIGN(options.max_isa, parse_isa(max_isa_));
  if (activations_ != "exact" && activations_ != "int8")
    return invalid("unknown activations '" + activations_ + "': use exact or int8");
  options.int8_activations = activations_ == "int8";
  options.threads = threads_;
  options.topology = topology_;
  options.max_context = max_model_len_;
  options.direct_io = direct_io_;
  return options;
}

int exit_code_of(const Status& status) {
  if (status.ok()) return 0;
  if (status.error().code == ErrorCode::cancelled) return 130;
  fmt::print(stderr, "error: {}\n", status.error().message);
  return 1;
}

}  // namespace thermocline::cli
