// The subcommands of `thermocline`, one .cc each. A command adds itself to the program; its callback returns the exit
// code through Outcome.
#pragma once

#include <CLI/CLI.hpp>

#include "runtime/cli/settings.h"
#include "runtime/engine/engine.h"

namespace thermocline::cli {

/// The exit code of the command that ran.
struct Outcome {
  int exit_code = 0;
  std::vector<std::string> client_args;  // of `launch`: what stood behind --
};

void add_run(CLI::App& app, Outcome& outcome);
void add_serve(CLI::App& app, Outcome& outcome);
void add_bench(CLI::App& app, Outcome& outcome);  // step, kernels, gpu, kv, sched, server
void add_bench_step(CLI::App& bench, Outcome& outcome);
void add_bench_kernels(CLI::App& bench, Outcome& outcome);
void add_bench_gpu(CLI::App& bench, Outcome& outcome);
void add_bench_kv(CLI::App& bench, Outcome& outcome);
void add_bench_sched(CLI::App& bench, Outcome& outcome);
void add_bench_server(CLI::App& bench, Outcome& outcome);
void add_sim(CLI::App& app, Outcome& outcome);
void add_trace(CLI::App& app, Outcome& outcome);  // info, replay, predict, fit, convert, synth
void add_trace_replay(CLI::App& trace, Outcome& outcome);
void add_plan(CLI::App& app, Outcome& outcome);
void add_synth(CLI::App& app, Outcome& outcome);
void add_logits(CLI::App& app, Outcome& outcome);
void add_perplexity(CLI::App& app, Outcome& outcome);
void add_calibrate(CLI::App& app, Outcome& outcome);
void add_doctor(CLI::App& app, Outcome& outcome);
void add_selfcheck(CLI::App& app, Outcome& outcome);
void add_version(CLI::App& app, Outcome& outcome);
void add_launch(CLI::App& app, Outcome& outcome);
void add_docs(CLI::App& app, Outcome& outcome);
void add_chat_tools(CLI::App& app, Outcome& outcome);  // tokenize, detokenize, render, parse

/// Flags of every command that loads a model: what to load, what to round, the CPU's side, the devices' side.
class ModelOptions {
 public:
  void add_to(CLI::App& command, bool weights = true);
  Settings& settings() const { return *settings_; }  // once it was added
  /// Errors: invalid_argument for a name that is none; those of check_folder.
  Result<EngineOptions> engine_options() const;
  const std::string& model() const { return model_; }
  /// Errors: those of check_model_folder.
  Status check_folder() const;
  /// Before its tokenizer is read, which another architecture has otherwise. Errors: those of read_config.
  Status check_architecture() const;

 private:
  std::shared_ptr<Settings> settings_;
  std::string model_, numerics_ = "published", max_isa_ = "amx", topology_, activations_ = "exact", kv_dtype_ = "auto",
                      kv_offload_ = "auto";
  std::string device_ = "auto", experts_on_gpu_ = "auto", expert_policy_ = "static", prefill_ = "cpu",
              prefetch_ = "auto", record_trace_, expert_profile_;
  uint64_t gpu_memory_ = 0;
  int threads_ = 0;
  int64_t max_model_len_ = 0;
  bool weights_ = true, direct_io_ = false, trace_token_ids_ = false;
};

/// An option of bytes, such as 8GiB, 0 by default. A command line error: what is none, and negative ones.
CLI::Option* as_size(CLI::Option* option);

/// Takes no empty word: a command line error, where it would count as not given.
CLI::Option* not_empty(CLI::Option* option);

/// What the program ends with; docs/configuration.md tells users.
enum ExitCode {
  kOther = 1,         // also: doctor found a problem, a check failed
  kUsage = 2,         // a flag, setting or prompt is wrong
  kModel = 3,         // no model, or one that is broken or of another kind
  kDoesNotFit = 4,    // not enough memory
  kDevice = 5,        // the device is not there, or cannot be used
  kPort = 6,          // the address cannot be listened on
  kInterrupted = 130  // Ctrl-C
};

/// Prints `error: ...` on stderr and gives the exit code, 0 for success. An error's field may say whose it is:
/// --model, --device or --port.
int exit_code_of(const Status& status);

}  // namespace thermocline::cli
