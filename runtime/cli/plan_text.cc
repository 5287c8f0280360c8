#include "runtime/cli/plan_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace thermocline::cli {
namespace {

std::string size_text(double bytes) {
  return bytes < 1000.0 * (1 << 20) ? fmt::format("{:.1f} MiB", bytes / (1 << 20))
                                    : fmt::format("{:.1f} GiB", bytes / (1 << 30));
}

std::string value_text(const Figure& figure) {
  switch (figure.unit) {
    case Figure::Unit::count:
      return fmt::format("{:.0f}", figure.value);
    case Figure::Unit::bytes:
      return size_text(figure.value);
    case Figure::Unit::bytes_per_second:
      return fmt::format("{:.1f} GB/s", figure.value / 1e9);
    case Figure::Unit::flops:
      return fmt::format("{:.2f} TFLOP/s", figure.value / 1e12);
  }
  return "";
}

const char* unit_name(Figure::Unit unit) {
  constexpr const char* kNames[] = {"count", "bytes", "bytes_per_second", "flops"};
  return kNames[static_cast<size_t>(unit)];
}

std::string rate_text(double tokens_per_second) {
  return tokens_per_second < 100 ? fmt::format("{:.1f}", tokens_per_second) : fmt::format("{:.0f}", tokens_per_second);
}

// "+33 %", and "x 12" where that says more.
std::string change_text(double percent) {
  if (percent >= 900) return fmt::format("x {:.0f}", 1 + percent / 100);
  return fmt::format("{:+.0f} %", std::round(percent) + 0.0);  // no "-0"
}

std::string time_text(double seconds) {
  if (seconds < 120) return fmt::format("{:.1f} s", seconds);
  return seconds < 7200 ? fmt::format("{:.0f} min", seconds / 60) : fmt::format("{:.1f} h", seconds / 3600);
}

std::string hardware_text(const Box& box) {
  std::string text = "hardware\n";
  size_t width = 0;
  for (const Figure& figure : box.figures) width = std::max(width, figure.name.size());
  for (const Figure& figure : box.figures)
    text += fmt::format("  {:<{}}  {:>14}  {}\n", figure.name, width, value_text(figure), figure.source);
  if (!box.machine.gpus.empty() && box.machine.fingerprint.empty())
    text += fmt::format("  assumed of a card: {:.0f} us a kernel, {:.0f} us to hand a layer to the CPU and back\n",
                        box.machine.gpus[0].kernel_ns / 1000, box.machine.gpus[0].sync_ns / 1000);
  return text;
}

std::string rows_text(const sched::BoxPlan& plan) {
  if (plan.rows.freed_bytes <= 0) return "";
  return fmt::format("  {}: {}{}\n", plan.host_rows ? "CSA rows in RAM" : "CSA rows on the card",
                     to_string(plan.rows, plan.host_rows),
                     plan.rows_crowd ? "; on the card they take more than half" : "");
}

std::string decode_text(const PlanReport& r) {
  const bool cards = !r.question.machine.gpus.empty();
  std::string text =
      fmt::format("decode at {:.0f} tokens of context, tokens/s of all sequences together\n", r.question.context);
  text += cards ? "  batch   estimate   uniform  experts there    hits  waits most for\n"
                : "  batch   estimate  waits most for\n";
  for (const sched::DecodeSpeed& d : r.plan.decode) {
    const std::string note = d.fits || !r.plan.refusal.empty() ? "" : " (its KV cache does not fit)";
    text += fmt::format("  {:>5}  {:>9}", d.batch, rate_text(d.tokens_per_second));
    if (cards)
      text += fmt::format(" {:>9} {:>12.1f} % {:>5.0f} %", rate_text(d.uniform_tokens_per_second), 100 * d.resident,
                          100 * d.hits);
    text += fmt::format("  {}{}\n", d.bottleneck, note);
  }
  if (cards)
    text +=
        "  hits are an assumption, as a least recently used cache had them on V4-Flash; uniform routing is the worst "
        "case\n";
  return text;
}

std::string prefill_text(const PlanReport& r) {
  const sched::PrefillSpeed& p = r.plan.prefill;
  const std::string experts =
      r.question.machine.gpus.empty()
          ? ""
          : fmt::format(", missing experts: {}", sched::kPrefillExpertsNames[static_cast<size_t>(p.experts)]);
  return fmt::format(
      "prefill of {:.0f} tokens, one prompt alone\n"
      "  {} tokens/s, first token after {}; steps of {} tokens{}; waits most for {}\n",
      r.question.context, rate_text(p.tokens_per_second), time_text(p.seconds), p.chunk, experts, p.bottleneck);
}

std::string what_if_text(const PlanReport& r) {
  if (r.what_ifs.empty()) return "";
  std::string text = "what if\n";
  size_t width = 0;
  for (const sched::WhatIf& w : r.what_ifs) width = std::max(width, w.change.size());
  for (const sched::WhatIf& w : r.what_ifs) {
    text += fmt::format("  {:<{}}  ", w.change, width);
    if (!w.fits)
      text += "would not fit\n";
    else
      text += fmt::format("decode {:>7}  prefill {:>7}{}\n", change_text(w.decode_percent),
                          change_text(w.prefill_percent), r.plan.refusal.empty() ? "" : "  and it would fit");
  }
  return text;
}

std::string verdict_text(const PlanReport& r) {
  const std::string not_computed =
      r.not_computed.empty() ? ""
                             : fmt::format("NOT COMPUTED: this version plans {} and cannot serve it\n", r.not_computed);
  if (r.plan.refusal.empty()) return not_computed.empty() ? fmt::format("serve it\n  {}\n", r.serve) : not_computed;
  std::string text = not_computed + fmt::format("DOES NOT FIT: {}\n", r.plan.refusal);
  const double disk = r.question.machine.disk.read_bytes_per_second;
  if (disk > 0)
    text += fmt::format("  from a disk of {:.1f} GB/s its experts would make at most {} tokens/s\n", disk / 1e9,
                        rate_text(sched::disk_tokens_per_second(r.question.model, disk, r.plan.decode[0].hits)));
  return text + "  the speeds above are what they would be if it fitted\n";
}

Json memory_json(const sched::MemoryPlan& memory) {
  Json rows = Json::array();
  for (const sched::MemoryPlan::Row& row : memory.rows())
    rows.push_back({{"tier", sched::MemoryPlan::tier_name(row.tier)}, {"owner", row.owner}, {"bytes", row.bytes}});
  return rows;
}

}  // namespace

std::string plan_text(const PlanReport& r) {
  return fmt::format(
      "{}: {} of experts, {} of dense weights{}; {} sequence{} of {:.0f} "
      "tokens\n\n{}\nmemory\n{}{}\n{}\n{}\n{}{}{}",
      r.model, size_text(r.question.model.routed_bytes()), size_text(r.question.model.dense_bytes()),
      r.question.model.table_bytes > 0 ? fmt::format(", {} of n-gram table", size_text(r.question.model.table_bytes))
                                       : "",
      r.question.batch, r.question.batch == 1 ? "" : "s", r.question.context, hardware_text(r.box),
      r.plan.memory.to_string(), rows_text(r.plan), decode_text(r), prefill_text(r), what_if_text(r),
      r.what_ifs.empty() ? "" : "\n", verdict_text(r));
}

Json plan_json(const PlanReport& r) {
  Json hardware = Json::array(), decode = Json::array(), changes = Json::array();
  for (const Figure& f : r.box.figures)
    hardware.push_back({{"name", f.name}, {"value", f.value}, {"unit", unit_name(f.unit)}, {"source", f.source}});
  for (const sched::DecodeSpeed& d : r.plan.decode)
    decode.push_back({{"batch", d.batch},
                      {"fits", d.fits},
                      {"tokens_per_second", d.tokens_per_second},
                      {"uniform_tokens_per_second", d.uniform_tokens_per_second},
                      {"resident", d.resident},
                      {"hits_assumed", d.hits},
                      {"bottleneck", d.bottleneck}});
  for (const sched::WhatIf& w : r.what_ifs)
    changes.push_back({{"change", w.change},
                       {"fits", w.fits},
                       {"decode_percent", w.decode_percent},
                       {"prefill_percent", w.prefill_percent}});
  const sched::PrefillSpeed& p = r.plan.prefill;
  return {{"model", r.model},
          {"context", static_cast<int64_t>(r.question.context)},
          {"batch", r.question.batch},
          {"hardware", hardware},
          {"fits", r.plan.refusal.empty()},
          {"refusal", r.plan.refusal},
          {"not_computed", r.not_computed},
          {"memory", memory_json(r.plan.memory)},
          {"experts_on_devices", r.plan.device_experts},
          {"csa_rows_in_host_memory", r.plan.host_rows},
          {"table_on_disk", r.plan.table_on_disk},
          {"csa_rows",
           {{"freed_bytes", r.plan.rows.freed_bytes},
            {"experts_save_ms", r.plan.rows.saved_ns / 1e6},
            {"copies_take_ms", r.plan.rows.spent_ns / 1e6},
            {"crowd", r.plan.rows_crowd}}},
          {"decode", decode},
          {"prefill",
           {{"tokens_per_second", p.tokens_per_second},
            {"first_token_seconds", p.seconds},
            {"step_tokens", p.chunk},
            {"experts", sched::kPrefillExpertsNames[static_cast<size_t>(p.experts)]},
            {"bottleneck", p.bottleneck}}},
          {"what_if", changes},
          {"serve", r.serve}};
}

}  // namespace thermocline::cli
