#include "runtime/cli/aliases.h"

#include <algorithm>

namespace thermocline::cli {
namespace {

struct Alias {
  const char *names, *ours;
};

constexpr Alias kAliases[] = {
    {"-m,--model-path", "--model"},
    {"-a,--alias", "--served-model-name"},
    {"-c,--ctx-size,--context-length", "--max-model-len"},
    {"--parallel,--max-running-requests", "--max-num-seqs"},
    {"--ubatch-size,--chunked-prefill-size", "--max-num-batched-tokens"},
    {"--max-queued-requests", "--max-queue"},
    {"--n-predict,--predict", "--default-max-tokens"},
    {"--n-predict,--predict", "--max-tokens"},
    {"--no-enable-prefix-caching", "--no-prefix-cache"},
    {"-t", "--threads"},
    {"--temp", "--temperature"},
    {"--repeat-penalty", "--repetition-penalty"},
    {"--system-prompt", "--system"},
};

using Foreign = Settings::Foreign;
struct ForeignFlag {
  const char* names;
  bool flag;
  Foreign kind;
  const char* text;
};

constexpr const char* kExperts =
    "attention and as many experts as fit are on the device; --experts-on-gpu N says how many, --device none: nothing";
constexpr ForeignFlag kForeign[] = {
    {"--n-gpu-layers,--gpu-layers", false, Foreign::refused, kExperts},
    {"--n-cpu-moe,--override-tensor", false, Foreign::refused, kExperts},
    {"--cpu-moe", true, Foreign::refused, "use --experts-on-gpu 0"},
    {"--gpu-memory-utilization,--mem-fraction-static", false, Foreign::refused,
     "use --gpu-memory with the bytes of each device, such as 20GiB"},
    {"--tensor-parallel-size,--pipeline-parallel-size,--data-parallel-size", false, Foreign::refused,
     "use --device cuda:N for N cards, each with a part of the layers"},
    {"--tensor-split,--split-mode,--main-gpu", false, Foreign::refused, "use --device cuda:N; layers are split evenly"},
    {"--cpu-offload-gb", false, Foreign::refused, kExperts},
    {"--swap-space", false, Foreign::refused, "use --kv-host-memory, and --kv-disk-dir for what outlives a restart"},
    {"--cache-type-k,--cache-type-v", false, Foreign::refused, "use --kv-cache-dtype for both"},
    {"--dtype,--quantization", false, Foreign::refused,
     "weights keep the precision they were published in; --numerics says what is rounded between"},
    {"--cont-batching,--enable-chunked-prefill", true, Foreign::noted, "requests are always batched and cut"},
    {"--enable-prefix-caching", true, Foreign::noted, "it is on unless --no-prefix-cache is given"},
    {"--jinja,--enable-auto-tool-choice", true, Foreign::noted,
     "the model's own chat encoding, tools included, is built in"},
    {"--tool-call-parser,--reasoning-parser", false, Foreign::noted, "the model's own format is read"},
    {"--trust-remote-code", true, Foreign::noted, "no code of a checkpoint is run"},
    {"--flash-attn", true, Foreign::noted, "there is one attention"},
};

struct ShortWord {
  const char *given, *meant;
};
constexpr ShortWord kShortWords[] = {{"-np", "--parallel"},        {"-ngl", "--n-gpu-layers"},
                                     {"-cb", "--cont-batching"},   {"-fa", "--flash-attn"},
                                     {"-ub", "--ubatch-size"},     {"-tp", "--tensor-parallel-size"},
                                     {"-ot", "--override-tensor"}, {"-sys", "--system-prompt"}};

// llama.cpp's --flash-attn, and --enable-* of vLLM's older versions, may stand bare or before one of these words.
constexpr std::string_view kBareOrSwitched[] = {"--flash-attn", "--enable-chunked-prefill", "--enable-prefix-caching"};
constexpr std::string_view kSwitches[] = {"on", "off", "auto", "0", "1", "true", "false"};

template <size_t kSize>
bool is_one_of(const std::string_view (&words)[kSize], std::string_view word) {
  return std::find(std::begin(words), std::end(words), word) != std::end(words);
}

// Those that the command has no option for yet.
std::string free_names(const CLI::App& command, const char* names) {
  std::vector<std::string> left = CLI::detail::split(names, ',');
  std::erase_if(left, [&](const std::string& name) { return command.get_option_no_throw(name) != nullptr; });
  return CLI::detail::join(left, ",");
}

}  // namespace

void add_aliases(CLI::App& command, Settings& settings) {
  for (const Alias& alias : kAliases) {
    CLI::Option* const ours = command.get_option_no_throw(alias.ours);
    const std::string names = free_names(command, alias.names);
    if (ours && !names.empty()) settings.add_alias(names, *ours);
  }
  for (const ForeignFlag& foreign : kForeign)
    if (const std::string names = free_names(command, foreign.names); !names.empty())
      settings.add_foreign(names, foreign.flag, foreign.kind, foreign.text);
}

std::vector<std::string> spell_out(const std::vector<std::string>& args) {
  if (args.empty() || (args[0] != "serve" && args[0] != "run")) return args;
  std::vector<std::string> spelled;
  for (auto arg = args.begin(); arg != args.end(); ++arg) {
    if (*arg == "--") {
      spelled.insert(spelled.end(), arg, args.end());
      break;
    }
    if (!spelled.empty() && is_one_of(kBareOrSwitched, spelled.back()) && is_one_of(kSwitches, *arg)) {
      spelled.back() += "=" + *arg;
      continue;
    }
    const auto* const word = std::find_if(std::begin(kShortWords), std::end(kShortWords),
                                          [&](const ShortWord& w) { return *arg == w.given; });
    spelled.emplace_back(word != std::end(kShortWords) ? word->meant : *arg);
  }
  return spelled;
}

}  // namespace thermocline::cli
