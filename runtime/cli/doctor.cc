// `thermocline doctor`: what stands in the way of speed on this box, a line each, and what to do about it.
#include "runtime/engine/doctor.h"

#include <fmt/format.h>

#include <algorithm>

#include "runtime/cli/command.h"
#include "runtime/cli/machine_checks.h"

namespace thermocline::cli {
namespace {

struct DoctorFlags {
  std::string root = "/", folder = ".";
  bool json = false;
};

Json checks_json(const std::vector<Check>& checks) {
  Json json = Json::array();
  for (const Check& check : checks)
    json.push_back({{"check", check.name},
                    {"level", kCheckLevelNames[static_cast<size_t>(check.level)]},
                    {"found", check.found},
                    {"advice", check.advice}});
  return json;
}

Result<int> run_doctor(const DoctorFlags& flags) {
  TC_ASSIGN(const Topology topology, read_topology());
  const CpuFeatures features = detect_cpu_features();
  const cpu::KernelTable table = cpu::make_kernel_table(features);
  const MachineInfo machine{features, topology, table.isa, topology.default_threads()};
  const std::vector<Check> checks =
      check_machine(machine, {.root = flags.root, .folder = flags.folder, .profiles = {}});
  const bool problem =
      std::any_of(checks.begin(), checks.end(), [](const Check& c) { return c.level == CheckLevel::problem; });
  const Json document = {{"machine", machine_json(machine)}, {"build", build_json()}, {"checks", checks_json(checks)}};
  if (flags.json)
    fmt::print("{}\n", dump_json(document, 2));
  else
    print_checks(checks, true);
  return problem ? 1 : 0;
}

}  // namespace

void print_checks(const std::vector<Check>& checks, bool all) {
  for (const Check& check : checks) {
    if (check.level == CheckLevel::ok && !all) continue;
    fmt::print("{:<8} {:<24} {}\n", kCheckLevelNames[static_cast<size_t>(check.level)], check.name, check.found);
    if (!check.advice.empty()) fmt::print("{:<33} -> {}\n", "", check.advice);
  }
}

void add_doctor(CLI::App& app, Outcome& outcome) {
  auto flags = std::make_shared<DoctorFlags>();
  CLI::App* command = app.add_subcommand("doctor", "Check this machine's settings; exit code 1 with a problem");
  command->add_option("--dir", flags->folder, "The folder whose disk should have room")->capture_default_str();
  command->add_flag("--json", flags->json, "A JSON document");
  command->add_option("--root", flags->root, "Where /proc, /sys and /dev are")->group("");
  command->callback([flags, &outcome] {
    const Result<int> code = run_doctor(*flags);
    outcome.exit_code = code ? *code : exit_code_of(code.error());
  });
}

}  // namespace thermocline::cli
