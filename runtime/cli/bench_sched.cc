// `thermocline bench sched`: every expert policy on three simulated boxes over synthetic V4-Flash routing and stress
// traces, each claim with pass or fail. All of it is virtual time: the numbers are the same on every machine.
#include <fmt/format.h>

#include <cmath>
#include <map>

#include "runtime/cli/box.h"
#include "runtime/cli/command.h"
#include "runtime/cli/sim_box.h"
#include "runtime/engine/plan_inputs.h"
#include "runtime/engine/planned_model.h"
#include "runtime/io/file.h"
#include "scheduler/trace/synthetic.h"

namespace thermocline::cli {
namespace {

constexpr double kResident[] = {0.05, 0.12, 0.25, 0.44};
constexpr double kDrift = 0.005;  // that a golden number may change by

struct SchedBench {
  std::string golden, json;
  bool write_golden = false;
};

struct SchedWorkload {
  const char* name;
  sched::Workload workload;
  int requests, tokens;
};
constexpr SchedWorkload kWorkloads[] = {{"one", sched::Workload::one, 1, 900},
                                        {"domains", sched::Workload::domains, 1, 900},
                                        {"mixed", sched::Workload::mixed, 32, 40},
                                        {"uniform", sched::Workload::uniform, 1, 300},
                                        {"cyclic", sched::Workload::cyclic, 1, 300}};

/// By workload, share and policy.
using Results = std::map<std::string, std::map<double, std::map<std::string, sched::SimReport>>>;

double ms_of(const sched::SimReport& r) { return r.total_ns / 1e6 / static_cast<double>(r.steps); }

Result<Results> run_all(const sched::CostModel& cost) {
  std::vector<std::string> names;
  for (const sched::PolicyInfo& policy : sched::policies()) names.emplace_back(policy.name);
  const sched::ModelCosts& m = cost.model();
  Results results;
  fmt::print("{}", sim_table_head());
  for (const SchedWorkload& w : kWorkloads)
    for (const double share : kResident) {
      const sched::Trace trace = synthesize_trace(
          {.layers = m.routed_layer_count(), .experts = m.experts, .top_k = m.experts_per_token}, w.workload,
          w.requests, w.tokens, static_cast<int>(share * m.experts) + 2 * m.experts_per_token);
      TC_ASSIGN(const std::vector<sched::SimReport> reports, simulate_policies(cost, trace, names, share, {}));
      TC_ASSIGN(const std::vector<sched::SimReport> none, simulate_policies(cost, trace, {"static"}, 0, {}));
      auto& here = results[w.name][share];
      here["none"] = none[0];
      for (const sched::SimReport& r : reports) here[r.policy] = r;
      // Belady with as many fills as ours makes.
      sched::SimOptions few;
      few.max_fills = static_cast<int>(std::ceil(here["value"].fills / static_cast<double>(here["value"].steps)));
      TC_ASSIGN(const std::vector<sched::SimReport> bound, simulate_policies(cost, trace, {"belady"}, share, few));
      here["belady, same fills"] = bound[0];
      for (const sched::SimReport& r : reports)
        fmt::print("{}", sim_table_row(fmt::format("{}, {:.0f} % in slots", w.name, 100 * share), r));
    }
  return results;
}

/// A claim about the policy `value`.
struct Claims {
  bool all = true;
  void check(const std::string& what, double value, double limit, bool at_most) {
    const bool pass = at_most ? value <= limit : value >= limit;
    all = all && pass;
    fmt::print("| {:<84} | {:7.1f} | {} {:5.1f} | {} |\n", what, value, at_most ? "<=" : ">=", limit,
               pass ? "pass" : "FAIL");
  }
};

bool check_claims(Results& results) {
  Claims claims;
  fmt::print("\n| {:<84} | {:>7} | {:>8} |      |\n| {:-<84} | ------: | -------: | ---- |\n", "claim about `value`",
             "is", "target", "");
  for (const double share : {0.05, 0.12}) {
    auto& one = results["one"][share];
    const std::string at = fmt::format(" at {:.0f} % in slots", 100 * share);
    claims.check("step time below FreeToken's rule, %" + at, 100 * (1 - ms_of(one["value"]) / ms_of(one["freetoken"])),
                 15, false);
    claims.check("fill bytes, % of FreeToken's" + at,
                 100 * one["value"].fills_per_token() / one["freetoken"].fills_per_token(), 25, true);
  }
  auto& least = results["one"][0.05];
  claims.check("hit rate below Belady's with as many fills, points, at 5 %",
               100 * (least["belady, same fills"].hit_rate() - least["value"].hit_rate()), 12, true);
  double over_none = -100, over_static = -100;
  for (auto& [name, by_share] : results)
    for (auto& [share, by_policy] : by_share) {
      over_none = std::max(over_none, 100 * (ms_of(by_policy["value"]) / ms_of(by_policy["none"]) - 1));
      over_static = std::max(over_static, 100 * (ms_of(by_policy["value"]) / ms_of(by_policy["static"]) - 1));
    }
  claims.check("step time above all experts on the CPU, %, the worst of all", over_none, 1, true);
  claims.check("step time above static frequency, %, the worst of all", over_static, 2, true);
  fmt::print(
      "\nheadroom at 5 %: Belady with all the fills it wants finds {:.1f} %, `value` {:.1f} %, `eager` {:.1f} %\n",
      100 * least["belady"].hit_rate(), 100 * least["value"].hit_rate(), 100 * least["eager"].hit_rate());
  return claims.all;
}

Json golden_of(const Results& results) {
  Json json = Json::object();
  for (const auto& [name, by_share] : results)
    for (const auto& [share, by_policy] : by_share)
      for (const auto& [policy, r] : by_policy)
        json[name][fmt::format("{:g}", share)][policy] = {
            {"ms_per_step", ms_of(r)}, {"hit_rate", r.hit_rate()}, {"fills_per_token", r.fills_per_token()}};
  return json;
}

// Errors: failed_check where a number has moved; the file names what it was.
Status compare(const Json& now, const std::string& file) {
  TC_ASSIGN(const std::string text, read_text_file(file));
  TC_ASSIGN(const Json golden, parse_json(text));
  const Json flat_now = now.flatten(), flat = golden.flatten();
  std::string moved;
  for (const auto& [key, value] : flat_now.items()) {
    const double was = flat.contains(key) && flat[key].is_number() ? flat[key].get<double>() : NAN;
    const double is = value.get<double>();
    if (!(std::abs(is - was) <= kDrift * std::max(std::abs(was), 1e-3)))
      moved += fmt::format("\n  {}: {:g} was {:g}", key, is, was);
  }
  if (flat_now.size() != flat.size()) moved += fmt::format("\n  {} numbers were {}", flat_now.size(), flat.size());
  if (moved.empty()) return {};
  return invalid("the policies decide otherwise than " + file + " says; --write-golden if that is meant" + moved);
}

Status bench_sched(const SchedBench& o) {
  TC_ASSIGN(const PlannedModel model, planned_model("v4-flash"));
  const HardwareFlags hardware{
      .gpus = {"5090"}, .ram = "12x6000", .ram_size = "", .cpu = "64 cores, avx512", .nvme = ""};
  TC_ASSIGN(const Box box, box_of(hardware));
  const sched::CostModel cost(model.costs, box.machine);
  fmt::print("V4-Flash on a simulated RTX 5090 with 12 channels of DDR5-6000; context 1,024\n\n");
  TC_ASSIGN(Results results, run_all(cost));
  const bool pass = check_claims(results);
  const Json golden = golden_of(results);
  if (!o.json.empty()) TC_RETURN_IF_ERROR(write_text_file(o.json, dump_json(golden, 1) + "\n"));
  if (!o.golden.empty() && o.write_golden) return write_text_file(o.golden, dump_json(golden, 1) + "\n");
  if (!o.golden.empty()) TC_RETURN_IF_ERROR(compare(golden, o.golden));
  return pass ? Status() : invalid("a claim does not hold");
}

}  // namespace

void add_bench_sched(CLI::App& bench, Outcome& outcome) {
  auto o = std::make_shared<SchedBench>();
  CLI::App* command = bench.add_subcommand("sched", "Expert policies on simulated boxes, in virtual time");
  command->add_option("--golden", o->golden, "Compare with the numbers of this file, to half a percent");
  command->add_flag("--write-golden", o->write_golden, "Write them there instead");
  command->add_option("--json", o->json, "Also as data, into a file");
  command->callback([o, &outcome] { outcome.exit_code = exit_code_of(bench_sched(*o)); });
}

}  // namespace thermocline::cli
