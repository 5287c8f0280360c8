// `thermocline trace`: what a recorded trace says, made-up ones, and traces as other tools read them.
#include <fmt/format.h>

#include <cmath>
#include <map>

#include "runtime/cli/command.h"
#include "runtime/cli/html_page.h"
#include "runtime/cli/sim_box.h"
#include "runtime/engine/expert_profile.h"
#include "runtime/io/file.h"
#include "runtime/io/json_document.h"
#include "scheduler/predict/predictor.h"
#include "scheduler/trace/analysis.h"
#include "scheduler/trace/synthetic.h"
#include "scheduler/trace/trace_csv.h"

namespace thermocline::cli {
namespace {

using sched::Trace;
using sched::TracePick;

constexpr int64_t kFitTokens = 450;
constexpr double kShares[] = {0.05, 0.12, 0.25, 0.44, 0.75, 1};

double at_share(const std::vector<double>& curve, double share) {
  return curve[static_cast<size_t>(std::lround(share * static_cast<double>(curve.size() - 1)))];
}

LinePlot hit_plot(const Trace& trace) {
  LinePlot plot{"Hit rate by cache size", "slots a layer", "%", {}};
  const std::pair<const char*, std::vector<double>> curves[] = {{"LRU a layer", lru_curve(trace)},
                                                                {"the best fixed set", skew_curve(trace)}};
  for (const auto& [name, curve] : curves) {
    plot.lines.push_back({name, {}});
    for (size_t n = 0; n < curve.size(); ++n) plot.lines.back().points.emplace_back(n, 100 * curve[n]);
  }
  return plot;
}

struct TraceOptions {
  std::string file, out, html, workload = "one";
  bool json = false, hash_layers_given = false;
  sched::SyntheticOptions routing;
  int requests = 1, tokens = 1000, cycle = 0;
};

Status trace_info(const TraceOptions& o) {
  TC_ASSIGN(const Trace trace, read_trace(o.file));
  const sched::TraceHeader& h = trace.header();
  std::map<uint32_t, int64_t> requests;
  int64_t prefill = 0, steps = 0;
  for (int64_t i = 0; i < trace.size(); ++i) {
    ++requests[trace.token(i).request];
    prefill += trace.token(i).phase == sched::TracePhase::prefill;
    steps += i == 0 || trace.token(i).step != trace.token(i - 1).step;
  }
  const std::vector<double> skew = skew_curve(trace), lru = lru_curve(trace);
  const double overlap = previous_token_overlap(trace);
  Json json{{"model", h.model},
            {"layers", h.layers},
            {"experts", h.experts},
            {"top_k", h.top_k},
            {"near_misses", h.near_misses},
            {"guesses", h.guesses},
            {"token_ids", h.token_ids},
            {"tokens", trace.size()},
            {"prefill_tokens", prefill},
            {"requests", requests.size()},
            {"steps", steps},
            {"previous_token_overlap", overlap},
            {"cut_bytes", trace.cut_bytes()}};
  if (!o.json) {
    fmt::print("{}: {} layers of {} experts, {} a token{}{}\n", h.model, h.layers, h.experts, h.top_k,
               (h.near_misses > 0 ? fmt::format(", {} near misses", h.near_misses) : "") +
                   (h.guesses > 0 ? fmt::format(", {} guesses", h.guesses) : ""),
               h.token_ids ? ", WITH token ids" : "");
    fmt::print(
        "{} tokens ({} of prompts) of {} requests in {} steps{}\n", trace.size(), prefill, requests.size(), steps,
        trace.cut_bytes() > 0 ? fmt::format("; the recording was cut, {} bytes left out", trace.cut_bytes()) : "");
    fmt::print("a token's experts that the token before had: {:.0f} %\n\n", 100 * overlap);
    fmt::print("| of a layer's experts | the best fixed set finds | LRU a layer finds |\n| ---: | ---: | ---: |\n");
  }
  for (const double share : kShares) {
    json["curve"].push_back({{"share", share}, {"fixed", at_share(skew, share)}, {"lru", at_share(lru, share)}});
    if (!o.json)
      fmt::print("| {:.0f} % | {:.1f} % | {:.1f} % |\n", 100 * share, 100 * at_share(skew, share),
                 100 * at_share(lru, share));
  }
  if (o.json) fmt::print("{}\n", dump_json(json, 2));
  if (o.html.empty()) return {};
  HtmlPage page("Experts of " + h.model);
  page.paragraph(fmt::format("{} tokens of {} requests; a token's experts that the token before had: {:.0f} %.",
                             trace.size(), requests.size(), 100 * overlap));
  page.plot(hit_plot(trace));
  return write_text_file(o.html, page.text());
}

Status trace_synth(const TraceOptions& o) {
  if (o.requests < 1 || o.tokens < 1 || static_cast<int64_t>(o.requests) * o.tokens > 1'000'000)
    return invalid("--requests times --tokens should be 1 to 1,000,000");
  sched::SyntheticOptions r = o.routing;
  if (!o.hash_layers_given) r.hash_layers = std::min(r.hash_layers, r.layers);
  const auto within = [](const char* name, double value, double least, double most) -> Status {
    if (value >= least && value <= most) return {};
    return invalid(fmt::format("{} is {:g}, outside {:g}..{:g}", name, value, least, most));
  };
  TC_RETURN_IF_ERROR(within("--layers", r.layers, 1, 1024));
  TC_RETURN_IF_ERROR(within("--experts", r.experts, 1, 32768));
  TC_RETURN_IF_ERROR(within("--top-k", r.top_k, 1, std::min(64, r.experts)));
  TC_RETURN_IF_ERROR(within("--near-misses", r.near_misses, 0, std::min(64, r.experts - r.top_k)));
  TC_RETURN_IF_ERROR(within("--guesses", r.guesses, 0, std::min(64, r.experts)));
  TC_RETURN_IF_ERROR(within("--ahead-sd", r.ahead_sd, 0, 100));
  TC_RETURN_IF_ERROR(within("--hash-layers", r.hash_layers, 0, r.layers));
  TC_RETURN_IF_ERROR(within("--model-sd", r.model_sd, 0, 100));
  TC_RETURN_IF_ERROR(within("--request-sd", r.request_sd, 0, 100));
  TC_RETURN_IF_ERROR(within("--moment-sd", r.moment_sd, 0, 100));
  TC_RETURN_IF_ERROR(within("--requests", static_cast<double>(o.requests) * r.layers * r.experts, 1, 1 << 28));
  TC_RETURN_IF_ERROR(within(
      "--tokens", 4.0 * o.requests * o.tokens * r.layers * (r.top_k + r.near_misses + 2 * r.guesses), 1, 1 << 30));
  TC_ASSIGN(const sched::Workload workload, sched::parse_workload(o.workload));
  return write_text_file(o.out, trace_bytes(synthesize_trace(r, workload, o.requests, o.tokens, o.cycle)));
}

// What is chosen in the second half, by those who have seen the first.
Status trace_predict(const TraceOptions& o) {
  TC_ASSIGN(const Trace trace, read_trace(o.file));
  const sched::TraceHeader& h = trace.header();
  fmt::print(
      "| {:<12} | guesses a layer | of the chosen, guessed | of the guesses, chosen |\n"
      "| ------------ | --------------: | ---------------------: | ---------------------: |\n",
      "predictor");
  for (const sched::PredictorInfo& info : sched::predictors()) {
    if (info.name.starts_with("router") && h.guesses == 0) continue;  // nobody asked them
    for (const int guesses : {h.top_k, 2 * h.top_k}) {
      const std::unique_ptr<sched::ExpertPredictor> predictor = info.make(h.layers, h.experts);
      const sched::PredictorScore s = score(*predictor, trace, std::min(guesses, h.experts));
      fmt::print("| {:<12} | {:15} | {:20.1f} % | {:20.1f} % |\n", info.name, guesses, 100 * s.recall,
                 100 * s.precision);
    }
  }
  return {};
}

// How unlike each other experts are for a request and for a moment, by the hit rates of a trace.
Status trace_fit(const TraceOptions& o) {
  TC_ASSIGN(const Trace trace, read_trace(o.file));
  const sched::TraceHeader& h = trace.header();
  const std::vector<double> wanted = lru_curve(trace.slice(0, std::min<int64_t>(trace.size(), kFitTokens)));
  sched::SyntheticOptions best;
  double least = INFINITY;
  for (const float request_sd : {0.0f, 0.4f, 0.8f, 1.2f, 1.6f})
    for (const float moment_sd : {0.0f, 0.6f, 1.2f, 1.8f, 2.4f}) {
      sched::SyntheticOptions tried{.layers = std::min(h.layers, 4),
                                    .experts = h.experts,
                                    .top_k = h.top_k,
                                    .hash_layers = 0,
                                    .model_sd = 0,
                                    .request_sd = request_sd,
                                    .moment_sd = moment_sd};
      const auto tokens = static_cast<int>(std::clamp<int64_t>(trace.size(), 1, kFitTokens));
      const std::vector<double> curve = lru_curve(synthesize_trace(tried, sched::Workload::one, 1, tokens));
      double error = 0;
      for (const double share : kShares) error += std::abs(at_share(curve, share) - at_share(wanted, share));
      if (error >= least) continue;
      least = error;
      best = tried;
    }
  fmt::print(
      "--hash-layers 0 --model-sd 0 --request-sd {} --moment-sd {}: hit rates of {} sizes are off by {:.1f} points on "
      "average\n",
      best.request_sd, best.moment_sd, std::size(kShares), 100 * least / std::size(kShares));
  return {};
}

ExpertProfile profile_of_trace(const Trace& trace) {
  const sched::TraceHeader& h = trace.header();
  ExpertProfile profile{h.model_hash, h.layers, h.experts, {}};
  const std::vector<float> uses = uses_of(trace, 0, trace.size());
  profile.uses.assign(uses.begin(), uses.end());
  return profile;
}

Status trace_convert(const TraceOptions& o) {
  TC_ASSIGN(const Trace trace, read_trace(o.file));
  if (o.out.ends_with(".csv")) return write_text_file(o.out, sched::trace_csv(trace));
  if (o.out.ends_with(".json")) return write_text_file(o.out, expert_profile_text(profile_of_trace(trace)));
  return write_text_file(o.out, trace_bytes(trace));
}

}  // namespace

void add_trace(CLI::App& app, Outcome& outcome) {
  CLI::App* trace = app.add_subcommand("trace", "Which experts routers chose: recorded with --record-trace");
  trace->require_subcommand(1);
  const auto add = [&](const char* name, const char* what, Status (*run)(const TraceOptions&)) {
    auto o = std::make_shared<TraceOptions>();
    CLI::App* command = trace->add_subcommand(name, what);
    command->callback([o, run, &outcome] { outcome.exit_code = exit_code_of(run(*o)); });
    return std::pair(command, o);
  };
  const auto [info, i] = add("info", "How unequal experts are, and what caches would find", trace_info);
  info->add_option("file", i->file, "A trace, or CSV: request,position,layer,rank,expert,weight")->required();
  info->add_flag("--json", i->json, "As data");
  info->add_option("--html", i->html, "Also a page with the curves");
  const auto [synth, s] =
      add("synth", "Make one up, by default as V4-Flash's routers were seen to choose", trace_synth);
  synth->add_option("--out", s->out, "File to write")->required();
  synth->add_option("--workload", s->workload, "one, domains, mixed, uniform or cyclic")->capture_default_str();
  synth->add_option("--requests", s->requests, "Requests that run together")->capture_default_str();
  synth->add_option("--tokens", s->tokens, "Tokens of each")->capture_default_str();
  synth->add_option("--cycle", s->cycle, "Experts of a layer that a cyclic workload goes through");
  synth->add_option("--layers", s->routing.layers, "Layers")->capture_default_str();
  synth->add_option("--experts", s->routing.experts, "Experts of a layer")->capture_default_str();
  synth->add_option("--top-k", s->routing.top_k, "Experts of a token")->capture_default_str();
  synth->add_option("--near-misses", s->routing.near_misses, "Kept beside them")->capture_default_str();
  synth->add_option("--guesses", s->routing.guesses, "Of routers asked ahead, kept beside them")->capture_default_str();
  synth->add_option("--ahead-sd", s->routing.ahead_sd, "How far the scores of a router are off, asked a layer ahead");
  synth
      ->add_option_function<int>(
          "--hash-layers",
          [s = s](int layers) {
            s->routing.hash_layers = layers;
            s->hash_layers_given = true;
          },
          "The first N are routed by token id: 3, or all of fewer")
      ->type_name("INT");
  synth->add_option("--model-sd", s->routing.model_sd, "How unequal experts are for good");
  synth->add_option("--request-sd", s->routing.request_sd, "How unequal experts are for a request");
  synth->add_option("--moment-sd", s->routing.moment_sd, "How unequal they are for some tokens on end");
  synth->add_option("--seed", s->routing.seed, "The same seed gives the same trace")->capture_default_str();
  const auto [fit, f] = add("fit", "The options of synth that are most like a trace", trace_fit);
  fit->add_option("file", f->file, "A trace")->required();
  const auto [predicted, p] = add("predict", "How much of a layer's choice could have been guessed", trace_predict);
  predicted->add_option("file", p->file, "A trace")->required();
  const auto [convert, c] =
      add("convert", "To .csv, to an expert profile (.json), or from .csv to a trace", trace_convert);
  convert->add_option("file", c->file, "A trace or CSV")->required();
  convert->add_option("out", c->out, "File to write, by its ending")->required();
  add_trace_replay(*trace, outcome);
}

}  // namespace thermocline::cli
