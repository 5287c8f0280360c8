// `thermocline version`: what this build is, and which kernels it takes on this machine.
#include <fmt/format.h>

#include "kernels_cpu/kernel_table.h"
#include "runtime/cli/command.h"
#include "runtime/engine/machine_info.h"
#include "runtime/hw/cpu_features.h"
#include "runtime/io/json_document.h"

namespace thermocline::cli {
namespace {

void print_version(bool as_json) {
  Json json = build_json();
  const std::string cuda = json["cuda"].get<std::string>();
  const CpuFeatures features = detect_cpu_features();
  const std::string isa(isa_name(cpu::make_kernel_table(features).isa));
  if (!as_json)
    return fmt::print("thermocline {}, {}, {}, {}; {} kernels on this {}\n", TC_VERSION, TC_BUILD_TYPE,
                      json["compiler"].get<std::string>(), cuda.empty() ? "no CUDA" : "CUDA " + cuda, isa,
                      features.model);
  json["cuda_built"] = !cuda.empty();
  json["cpu"] = {{"model", features.model}, {"isa", isa}};
  fmt::print("{}\n", dump_json(json, 2));
}

}  // namespace

void add_version(CLI::App& app, Outcome&) {
  auto as_json = std::make_shared<bool>(false);
  CLI::App* command = app.add_subcommand("version", "What this build is, and the kernels it takes on this CPU");
  command->add_flag("--json", *as_json, "A JSON document");
  command->callback([as_json] { print_version(*as_json); });
}

}  // namespace thermocline::cli
