#include <fmt/format.h>

#include <charconv>
#include <cstdio>

#include "runtime/cli/command.h"
#include "runtime/cli/model_folder.h"
#include "runtime/model/deepseek_v4/config.h"

namespace thermocline::cli {

// A minus is refused before CLI11 reads the text, as it takes -1 for 2^64 - 1. What is added last looks first.
CLI::Option* as_size(CLI::Option* option) {
  CLI::AsSizeValue size(false);
  size.description("");
  option->type_name("SIZE")->transform(size)->default_str("0");
  option->transform(CLI::Validator(
      [](std::string& text) { return text.starts_with('-') ? "a size is not negative" : std::string(); }, ""));
  return option;
}

CLI::Option* not_empty(CLI::Option* option) {
  return option->check(
      CLI::Validator([](const std::string& text) { return text.empty() ? "a value is missing" : std::string(); }, ""));
}

void ModelOptions::add_to(CLI::App& command, bool weights) {
  settings_ = Settings::add_to(command);
  weights_ = weights;
  const auto add = [&](const char* group, const char* name, auto& value, const char* text) {
    return command.add_option(name, value, text)->capture_default_str()->group(group);
  };
  add("model", "model,--model", model_, "Folder of a DeepSeek-V4 checkpoint")->required()->type_name("DIR");
  if (!weights) return;
  add("model", "--max-model-len", max_model_len_, "Context in tokens; 0: the model's limit, at most 32768");
  add("model", "--numerics", numerics_, "What is rounded: published, bf16 or fp32 (docs/numerics.md)");
  add("model", "--activations", activations_,
      "Inputs of the routed experts: exact, or int8 (faster; docs/numerics.md has its KL)");
  command.add_flag("--direct-io", direct_io_, "Read the checkpoint with O_DIRECT, past the page cache")->group("model");
  add("memory", "--kv-cache-dtype", kv_dtype_,
      "Rows of the KV cache: fp8 (exact, 0.58 of the bytes) or bf16; auto: fp8, f32 in the fp32 numerics");
  add("memory", "--kv-offload", kv_offload_,
      "With a device, CSA rows of the KV cache in host memory, those in use also on the device: off, on, or "
      "auto: where it cannot hold them all, or experts make more of its memory (docs/kv.md)");
  add("cpu", "--threads", threads_, "Worker threads; 0: one per core this process may use");
  add("cpu", "--max-isa", max_isa_, "Highest instruction set to use: scalar, avx2, avx512, amx or amx-emulated");
  add("cpu", "--topology", topology_, "An hwloc description such as 'node:2 core:4 pu:1' instead of this machine");
  add("devices", "--device", device_,
      "Where attention and hot experts run: auto (CUDA where there is a card), cuda, cuda:2 (two cards), simt "
      "(the interpreter) or none");
  as_size(
      command.add_option("--gpu-memory", gpu_memory_, "Bytes to use of each device, such as 20GiB; 0: what is free"))
      ->group("devices");
  add("devices", "--experts-on-gpu", experts_on_gpu_,
      "Routed experts to keep on devices: a number, all, or auto: as many as fit");
  add("devices", "--expert-policy", expert_policy_,
      "Which experts have a device slot: static (they stay: the same bits every time), value, eager, lru, ... "
      "(docs/scheduler.md)");
  add("devices", "--prefill-experts", prefill_,
      "Missing experts of long steps: cpu, stream (copied to the device) or hybrid (by measured costs)");
  add("devices", "--expert-prefetch", prefetch_,
      "Read the experts that a device will probably miss into the CPU's caches while it is at attention: auto "
      "(where the clock says that it pays), on or off; the answers are the same");
  add("devices", "--expert-profile", expert_profile_,
      "A file of how often experts are used: slots begin with those, and this run is added at its end");
  add("logging", "--record-trace", record_trace_, "Write which experts the routers choose to this file, without text");
  command.add_flag("--trace-token-ids", trace_token_ids_, "Also the token ids: whoever has the file can read the text")
      ->group("logging");
}

Status ModelOptions::check_folder() const { return check_model_folder(model_, weights_); }

Status ModelOptions::check_architecture() const {
  TC_RETURN_IF_ERROR(check_folder());
  Result<ModelGeometry> geometry = of_model(deepseek_v4::read_config(model_));
  if (!geometry) return std::move(geometry).error();
  return {};
}

Result<EngineOptions> ModelOptions::engine_options() const {
  TC_RETURN_IF_ERROR(check_folder());
  EngineOptions options;
  options.model = model_;
  TC_ASSIGN(options.numerics, parse_numerics(numerics_));
  TC_ASSIGN(options.kv_dtype, parse_kv_dtype(kv_dtype_));
  TC_ASSIGN(options.kv_offload, parse_kv_offload(kv_offload_));
  TC_ASSIGN(options.max_isa, parse_isa(max_isa_));
  if (activations_ != "exact" && activations_ != "int8")
    return invalid("unknown activations '" + activations_ + "': use exact or int8");
  options.int8_activations = activations_ == "int8";
  options.threads = threads_;
  options.threads_source = settings_->source_of("--threads");
  options.topology = topology_;
  options.max_context = max_model_len_;
  options.direct_io = direct_io_;
  options.device = device_;
  options.gpu_memory = gpu_memory_;
  if (experts_on_gpu_ == "all") {
    options.gpu.experts = 1 << 20;  // more than any model has: a pool takes no more slots than experts
  } else if (experts_on_gpu_ != "auto") {
    const char* const end = experts_on_gpu_.data() + experts_on_gpu_.size();
    const auto [stop, error] = std::from_chars(experts_on_gpu_.data(), end, options.gpu.experts);
    if (error != std::errc() || stop != end || options.gpu.experts < 0)
      return invalid("--experts-on-gpu should be auto, all or a number, not '" + experts_on_gpu_ + "'");
  }
  TC_ASSIGN(const sched::PolicyInfo* const policy, sched::find_policy(expert_policy_));
  if (policy->offline)
    return invalid("the expert policy '" + expert_policy_ + "' knows the future: it is for `thermocline sim`");
  options.gpu.policy = expert_policy_;
  options.record_trace = record_trace_;
  options.trace_token_ids = trace_token_ids_;
  options.expert_profile = expert_profile_;
  TC_ASSIGN(options.gpu.prefetch.mode, ExpertPrefetch::parse(prefetch_));
  TC_ASSIGN(options.gpu.prefill, sched::parse_prefill_experts(prefill_));
  return options;
}

namespace {

int code_of(const Error& error) {
  if (error.code == ErrorCode::cancelled) return kInterrupted;
  if (error.code == ErrorCode::out_of_memory) return kDoesNotFit;
  if (error.code == ErrorCode::invalid_argument) return kUsage;
  if (error.field == "--model") return kModel;
  if (error.field == "--device") return kDevice;
  if (error.field == "--port") return kPort;
  return kOther;
}

}  // namespace

int exit_code_of(const Status& status) {
  if (status.ok()) return 0;
  const int code = code_of(status.error());
  if (code == kInterrupted) return code;
  fmt::print(stderr, "error: {}\n", status.error().message);
  if (code == kUsage && !taken_settings().empty())
    fmt::print(stderr, "note: set outside the command line: {}\n", taken_settings());
  return code;
}

}  // namespace thermocline::cli
