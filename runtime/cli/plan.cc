// `thermocline plan`: what of a model fits a box and how fast it will be, before anything is downloaded.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "runtime/cli/command.h"
#include "runtime/cli/hardware_flags.h"
#include "runtime/cli/model_folder.h"
#include "runtime/cli/plan_text.h"
#include "runtime/engine/plan_inputs.h"
#include "runtime/engine/planned_model.h"

namespace thermocline::cli {
namespace {

struct PlanOptions {
  std::string model, context;
  HardwareFlags hardware;
  int batch = 8;
  bool json = false;
};

// Flags of serve that make what was planned: those that differ from its defaults or that decide.
std::string serve_line(const PlanReport& r) {
  const bool folder = r.model.find_first_of("/.") != std::string::npos;
  std::string line =
      fmt::format("thermocline serve --model {} --max-model-len {:.0f} --max-num-seqs {} --max-num-batched-tokens {}",
                  folder ? r.model : "DIR", r.question.context, r.question.batch, r.plan.prefill.chunk);
  const size_t cards = r.question.machine.gpus.size();
  if (cards == 0) return line + " --device none";
  line += cards == 1 ? " --device cuda" : fmt::format(" --device cuda:{}", cards);
  if (r.plan.prefill.experts != sched::PrefillExperts::cpu)
    line +=
        fmt::format(" --prefill-experts {}", sched::kPrefillExpertsNames[static_cast<size_t>(r.plan.prefill.experts)]);
  if (r.plan.decode[0].resident < 1) line += " --expert-policy value";
  line += r.plan.host_rows ? " --kv-offload on" : " --kv-offload off";
  if (r.plan.kv_crowds)  // else only half of what is left
    line += fmt::format(" --kv-gpu-memory {:.0f}MiB", std::ceil(1.02 * r.plan.device_kv_bytes / (1 << 20)));
  return line;
}

Status plan(const PlanOptions& o) {
  PlanRequest request{.model = o.model, .batch = o.batch, .hardware = o.hardware};
  if (!o.context.empty()) {
    Result<int64_t> tokens = parse_tokens(o.context);
    if (!tokens) return std::move(tokens).error().with("--context");
    request.context = *tokens;
  }
  TC_ASSIGN(const PlanReport report, make_plan(request));
  fmt::print("{}", o.json ? dump_json(plan_json(report), 2) + "\n" : plan_text(report));
  return {};
}

}  // namespace

Result<PlanReport> make_plan(const PlanRequest& request) {
  if (request.batch < 1 || request.batch > 4096)
    return invalid(fmt::format("--batch is {}, outside 1..4096", request.batch));
  TC_ASSIGN(PlannedModel model, of_model(planned_model(request.model)));
  const int64_t most = model.costs.max_context,
                context = request.context > 0 ? request.context : std::min(EngineOptions::kDefaultContext, most);
  if (context > most) return invalid(fmt::format("--context is {} tokens, and the model's limit {}", context, most));
  PlanReport r;
  r.model = request.model;
  TC_ASSIGN(r.box, box_of(request.hardware));
  r.not_computed = model.not_computed;
  r.question.model = std::move(model.costs);
  r.question.machine = r.box.machine;
  r.question.context = static_cast<double>(context);
  r.question.batch = request.batch;
  r.question.system_bytes = r.box.system_bytes;
  r.question.memory_source = r.box.memory_source;
  r.question.chunks =
      chunk_buffers(model.widths, context, request.batch, r.box.machine.cpu.cores, !r.box.machine.gpus.empty());
  r.plan = sched::plan_box(r.question);
  r.what_ifs = sched::what_ifs(r.question, r.plan, r.box.cpu_sheet);
  if (r.plan.refusal.empty() && r.not_computed.empty()) r.serve = serve_line(r);
  return r;
}

void add_plan(CLI::App& app, Outcome& outcome) {
  auto o = std::make_shared<PlanOptions>();
  CLI::App* command = app.add_subcommand("plan", "What fits a box and how fast it will be, before any download");
  command
      ->add_option("--model", o->model,
                   "v4-flash, v4-pro, v4.1-flash, v3, demo, or a folder with a config.json; weights need not be there")
      ->required();
  add_hardware_flags(*command, o->hardware);
  not_empty(command->add_option("--context", o->context,
                                "Tokens of each sequence, such as 128k; 32k, or the model's limit, unless said"));
  command->add_option("--batch", o->batch, "Sequences that run together")->capture_default_str();
  command->add_flag("--json", o->json, "The same as data");
  command->callback([o, &outcome] { outcome.exit_code = exit_code_of(plan(*o)); });
}

}  // namespace thermocline::cli
