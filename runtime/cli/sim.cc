// `thermocline sim` and `thermocline trace replay`: policies over traces on simulated boxes.
#include <fmt/format.h>

#include "runtime/cli/box.h"
#include "runtime/cli/command.h"
#include "runtime/cli/sim_box.h"
#include "runtime/engine/planned_model.h"
#include "runtime/io/file.h"
#include "scheduler/sim/serving.h"

namespace thermocline::cli {
namespace {

struct SimFlags {
  HardwareFlags hardware;
  std::string model = "v4-flash", trace, workload = "one", json, html;
  std::vector<std::string> policies = {"static", "lru", "value", "eager"}, faults;
  std::vector<double> resident = {0.05, 0.12, 0.25, 0.44};
  int requests = 1, tokens = 600;
  double context = 1024, noise = 0, ram_experts = 1;
  uint64_t seed = 1;
  std::string staging;
  int staged_experts = 3, read_ahead = 0;
  bool serve = false;
  sched::ServingOptions serving;
};

// "cpu:0.5@1s-2s": an engine, its speed, from when to when.
Result<sched::SimFault> parse_fault(const std::string& text) {
  char engine[8] = "";
  sched::SimFault fault;
  int used = 0;
  if (std::sscanf(text.c_str(), "%7[a-z0-9]:%lf@%lfs-%lfs%n", engine, &fault.speed, &fault.from_ns, &fault.to_ns,
                  &used) != 4 ||
      used != static_cast<int>(text.size()) || !(fault.speed >= 1e-6 && fault.speed <= 1) ||
      !(fault.from_ns >= 0 && fault.to_ns > fault.from_ns && fault.to_ns <= 1e9))
    return invalid("--fault '" + text + "' should be an engine, a speed from 1e-6 to 1 and seconds, as cpu:0.5@1s-2s");
  fault.from_ns *= 1e9;
  fault.to_ns *= 1e9;
  constexpr const char* kNames[] = {"gpu", "cpu", "h2d", "disk"};
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (engine == std::string_view(kNames[i])) {
      fault.engine = static_cast<sched::Engine>(i);
      return fault;
    }
  return invalid("--fault '" + text + "': the engines are gpu, cpu, h2d and disk");
}

Result<std::vector<std::string>> policies_of(const SimFlags& o) {
  std::vector<std::string> names;
  for (const std::string& name : o.policies) {
    if (name == "all") {
      for (const sched::PolicyInfo& policy : sched::policies())
        if (!o.serve || !policy.offline) names.emplace_back(policy.name);
      continue;
    }
    TC_ASSIGN(const sched::PolicyInfo* const policy, sched::find_policy(name));
    names.emplace_back(policy->name);
  }
  return names;
}

Result<sched::Trace> trace_of(const SimFlags& o, const sched::ModelCosts& m, double share) {
  if (!o.trace.empty()) return read_trace(o.trace);
  TC_ASSIGN(const sched::Workload workload, sched::parse_workload(o.workload));
  const int64_t tables = int64_t{1} * o.requests * m.routed_layer_count() * m.experts;
  if (tables > 1 << 26)
    return invalid("--requests times the model's experts are " + std::to_string(tables) + ": 2^26 at most");
  if (o.requests < 1 || o.tokens < 2 || static_cast<int64_t>(o.requests) * o.tokens > 1'000'000)
    return invalid("--requests times --tokens should be 2 to 1,000,000");
  return synthesize_trace(
      {.layers = m.routed_layer_count(),
       .experts = m.experts,
       .top_k = m.experts_per_token,
       .hash_layers = m.hash_layer_count(),
       .guesses = o.staging.starts_with("router") ? std::min(2 * m.experts_per_token, m.experts) : 0,
       .seed = o.seed},
      workload, o.requests, o.tokens, static_cast<int>(share * m.experts) + 2 * m.experts_per_token);
}

Result<sched::SimOptions> sim_options(const SimFlags& o) {
  sched::SimOptions options{.context = o.context,
                            .ram_experts = o.ram_experts,
                            .staging = o.staging,
                            .staged_experts = o.staged_experts,
                            .read_ahead = o.read_ahead,
                            .noise = o.noise,
                            .seed = o.seed,
                            .recorded_steps = o.html.empty() ? 0 : 1};
  if (!(o.noise >= 0 && o.noise <= 1)) return invalid("--noise should be 0 to 1");
  if (!(o.context >= 0 && o.context <= 1e9)) return invalid("--context should be 0 to 10^9");
  if (!(o.ram_experts > 0 && o.ram_experts <= 1)) return invalid("--ram-experts should be above 0, 1 at most");
  for (const std::string& text : o.faults) {
    TC_ASSIGN(const sched::SimFault fault, parse_fault(text));
    options.faults.push_back(fault);
  }
  return options;
}

Status write_pages(const SimFlags& o, const Json& json, HtmlPage& page, const LinePlot& hits, const LinePlot& times,
                   const std::vector<sched::SimReport>& last) {
  if (!o.json.empty() && o.json != "-") TC_RETURN_IF_ERROR(write_text_file(o.json, dump_json(json, 2) + "\n"));
  if (o.json == "-") fmt::print("{}\n", dump_json(json, 2));
  if (o.html.empty()) return {};
  page.plot(times);
  page.plot(hits);
  for (const sched::SimReport& report : last) page.plot(timeline_of(report));
  return write_text_file(o.html, page.text());
}

Status run_policies(const SimFlags& o, const sched::CostModel& cost) {
  TC_ASSIGN(const std::vector<std::string> names, policies_of(o));
  TC_ASSIGN(const sched::SimOptions options, sim_options(o));
  const bool quiet = o.json == "-";
  LinePlot hits{"Hit rate", "% of the experts in slots", "%", {}},
      times{"Time", "% of the experts in slots", "ms a step", {}};
  for (const std::string& name : names) {
    hits.lines.push_back({name, {}});
    times.lines.push_back({name, {}});
  }
  Json json = Json::array();
  HtmlPage page("Expert policies, simulated");
  page.paragraph(fmt::format("{}, {} on {}; every policy with the same steps.",
                             o.trace.empty() ? "synthetic routing (" + o.workload + ")" : o.trace, o.model,
                             cost.machine().gpus.empty() ? "the CPU alone" : cost.machine().gpus[0].name));
  if (!quiet) fmt::print("{}", sim_table_head());
  std::vector<sched::SimReport> reports;
  for (const double share : o.resident) {
    TC_ASSIGN(const sched::Trace trace, trace_of(o, cost.model(), share));
    TC_ASSIGN(reports, simulate_policies(cost, trace, names, share, options));
    for (size_t i = 0; i < reports.size(); ++i) {
      const std::string what =
          fmt::format("{}, {:.3g} % in slots", o.trace.empty() ? o.workload : "trace", 100 * share);
      if (!quiet) fmt::print("{}", sim_table_row(what, reports[i]));
      Json entry = sim_json(reports[i]);
      entry["resident_share"] = share;
      json.push_back(std::move(entry));
      hits.lines[i].points.emplace_back(100 * share, 100 * reports[i].hit_rate());
      times.lines[i].points.emplace_back(100 * share,
                                         reports[i].total_ns / 1e6 / static_cast<double>(reports[i].steps));
    }
  }
  return write_pages(o, json, page, hits, times, reports);
}

Status run_serving(const SimFlags& o, const sched::CostModel& cost) {
  TC_ASSIGN(const std::vector<std::string> names, policies_of(o));
  TC_ASSIGN(sched::SimOptions options, sim_options(o));
  const sched::ModelCosts& m = cost.model();
  Json json = Json::array();
  if (o.json != "-")
    fmt::print(
        "| {:<9} | in slots | answer tok/s | TTFT p50 ms |      p95 | TPOT p50 ms |      p95 |  hits | preempted |\n"
        "| --------- | -------: | -----------: | ----------: | -------: | ----------: | -------: | ----: | --------: "
        "|\n",
        "policy");
  for (const double share : o.resident)
    for (const std::string& name : names) {
      sched::ServingOptions serving = o.serving;
      serving.box = options;
      serving.box.policy = name;
      serving.box.slots = static_cast<int>(share * m.experts * m.routed_layer_count());
      if (!(share >= 0 && share <= 1))
        return invalid(fmt::format("a share of {} of the experts is outside 0..1", share));
      serving.limits.max_logit_rows = serving.limits.max_num_seqs;
      serving.routing = {.layers = m.routed_layer_count(),
                         .experts = m.experts,
                         .top_k = m.experts_per_token,
                         .hash_layers = m.hash_layer_count(),
                         .seed = o.seed};
      TC_ASSIGN(const sched::ServingReport r, simulate_serving(cost, serving));
      const std::vector<double> tpot = r.tpot_ms.empty() ? std::vector<double>{0} : r.tpot_ms;
      if (o.json != "-")
        fmt::print("| {:<9} | {:6.1f} % | {:12.1f} | {:11.0f} | {:8.0f} | {:11.2f} | {:8.2f} | {:3.0f} % | {:9} |\n",
                   name, 100 * share, r.answer_tokens_per_second(), percentile(r.ttft_ms, 50),
                   percentile(r.ttft_ms, 95), percentile(tpot, 50), percentile(tpot, 95), 100 * r.box.hit_rate(),
                   r.preemptions);
      Json entry = sim_json(r.box);
      entry["resident_share"] = share;
      entry["answer_tokens_per_second"] = r.answer_tokens_per_second();
      for (const double p : {50.0, 95.0, 99.0}) {
        entry["ttft_ms"]["p" + std::to_string(static_cast<int>(p))] = percentile(r.ttft_ms, p);
        entry["tpot_ms"]["p" + std::to_string(static_cast<int>(p))] = percentile(tpot, p);
      }
      entry["preemptions"] = r.preemptions;
      json.push_back(std::move(entry));
    }
  if (o.json == "-") fmt::print("{}\n", dump_json(json, 2));
  return o.json.empty() || o.json == "-" ? Status() : write_text_file(o.json, dump_json(json, 2) + "\n");
}

Status sim(const SimFlags& o) {
  TC_ASSIGN(const PlannedModel model, planned_model(o.model));
  TC_ASSIGN(const Box box, box_of(o.hardware));
  const sched::CostModel cost(model.costs, box.machine);
  if (o.serve && (!o.html.empty() || !o.trace.empty()))
    return invalid("--serve makes up its requests and draws no page: leave out --trace and --html");
  return o.serve ? run_serving(o, cost) : run_policies(o, cost);
}

// Hits and fills are those of any box that has time for the fills: a usual one stands for it.
Status replay(const SimFlags& o) {
  TC_ASSIGN(const sched::Trace trace, read_trace(o.trace));
  const sched::ModelCosts costs = costs_like(trace.header());
  HardwareFlags hardware{.gpus = {"5090"}, .ram = "12x6000", .ram_size = "", .cpu = "", .nvme = ""};
  TC_ASSIGN(const Box box, box_of(hardware));
  return run_policies(o, sched::CostModel(costs, box.machine));
}

void add_policy_flags(CLI::App& command, SimFlags& o) {
  command.add_option("--policy", o.policies, "Policies to compare, or all")->delimiter(',')->capture_default_str();
  command.add_option("--resident", o.resident, "Shares of the experts that have a slot")
      ->delimiter(',')
      ->capture_default_str();
  command.add_option("--json", o.json, "As data: a file, or - for standard output alone");
  command.add_option("--html", o.html, "A page with the curves and a step's timeline");
}

}  // namespace

void add_trace_replay(CLI::App& trace, Outcome& outcome) {
  auto o = std::make_shared<SimFlags>();
  CLI::App* command = trace.add_subcommand("replay", "What policies find and fill over a trace");
  command->add_option("file", o->trace, "A trace or CSV")->required();
  add_policy_flags(*command, *o);
  command->callback([o, &outcome] { outcome.exit_code = exit_code_of(replay(*o)); });
}

void add_sim(CLI::App& app, Outcome& outcome) {
  auto o = std::make_shared<SimFlags>();
  CLI::App* command = app.add_subcommand("sim", "Policies, steps and servers on a box that is not there");
  command->add_option("--model", o->model, "v4-flash, v4-pro, v4.1-flash, v3, demo, or a folder with a config.json")
      ->capture_default_str();
  add_hardware_flags(*command, o->hardware);
  add_policy_flags(*command, *o);
  command->add_option("--trace", o->trace, "A recorded trace of that model; else routing is made up");
  command->add_option("--workload", o->workload, "one, domains, mixed, uniform or cyclic")->capture_default_str();
  command->add_option("--requests", o->requests, "That decode together")->capture_default_str();
  command->add_option("--tokens", o->tokens, "Of each; the first half warms up")->capture_default_str();
  command->add_option("--context", o->context, "Tokens each attends to")->capture_default_str();
  command
      ->add_option("--ram-experts", o->ram_experts, "Share of the experts that memory holds; the disk has the others")
      ->capture_default_str();
  command->add_option("--staging", o->staging,
                      "A predictor: the CPU reads guessed experts into its caches while the device is at attention");
  command->add_option("--staged-experts", o->staged_experts, "That its caches hold")->capture_default_str();
  command
      ->add_option("--read-ahead", o->read_ahead, "Of the guesses, experts that are read from the disk a layer ahead")
      ->capture_default_str();
  command->add_option("--noise", o->noise, "Spread of every operation's time (sigma of its logarithm)");
  command->add_option("--fault", o->faults, "An engine that slows down, as cpu:0.5@1s-2s");
  command->add_option("--seed", o->seed, "The same seed gives the same numbers")->capture_default_str();
  command->add_flag("--serve", o->serve, "A server with its queue: requests with prompts arrive");
  command->add_option("--serve-requests", o->serving.requests, "Requests in all")->capture_default_str();
  command->add_option("--prompt-tokens", o->serving.prompt_tokens, "Of a request, a third more or less")
      ->capture_default_str();
  command->add_option("--answer-tokens", o->serving.answer_tokens, "The same of its answer")->capture_default_str();
  command->add_option("--clients", o->serving.clients,
                      "Each sends its next request when it has its answer; 0: arrivals by rate");
  command->add_option("--rate", o->serving.requests_per_second, "Requests a second (Poisson); 0: all at once");
  command->add_option("--max-num-seqs", o->serving.limits.max_num_seqs, "That run together")->capture_default_str();
  command->add_option("--max-num-batched-tokens", o->serving.limits.max_num_batched_tokens, "Of a step")
      ->capture_default_str();
  command->callback([o, &outcome] { outcome.exit_code = exit_code_of(sim(*o)); });
}

}  // namespace thermocline::cli
