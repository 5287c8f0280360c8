#include "runtime/metrics/families.h"

#include <limits>

namespace thermocline::metrics {
namespace {

template <class T>
double number(T value) {
  return static_cast<double>(value);
}

// "experts (CPU)" is experts_cpu.
std::string phase_label(std::string_view phase) {
  std::string label;
  for (const char c : phase)
    if (c == ' ')
      label += '_';
    else if (c != '(' && c != ')')
      label += static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c);
  return label;
}

void add_server(FamilyList& list, const Snapshot& now) {
  list.gauge("build_info", "1; the version of the program", 1, {{"version", TC_VERSION}});
  list.gauge("model_info", "1; the model that is served, empty while it loads", 1, {{"model", now.model}});
  list.gauge("ready", "1 while requests are taken and steps succeed", now.ready);
  list.gauge("loaded_ratio", "Share of the weights that is loaded", now.loaded);
  list.gauge("watchdog_seconds_since_step", "How long the step that runs has taken so far; 0 while idle",
             now.stats.step_running_seconds);
}

void add_requests(FamilyList& list, const Snapshot& now) {
  const EngineStats& s = now.stats;
  list.gauge("requests_running", "Sequences that have a place in steps", number(s.running));
  const char* const waiting = "Requests that wait: being read and tokenised, for a place in steps";
  list.gauge("requests_waiting", waiting, number(now.preparing), {{"reason", "preparing"}});
  list.gauge("requests_waiting", waiting, number(now.queued), {{"reason", "queued"}});
  list.counter("preemptions_total", "Sequences that gave their KV pages back to others", number(s.preemptions));
  const int64_t cached = s.kept_tokens + s.fetched_tokens;
  list.counter("prompt_tokens_total", "Tokens of prompts, computed or cached", number(s.prompt_tokens + cached));
  const char* const by_source = "Tokens of prompts by where their KV rows came from";
  const auto source = [&](const char* name, int64_t tokens) {
    list.counter("prompt_tokens_by_source_total", by_source, number(tokens), {{"source", name}});
  };
  source("computed", s.prompt_tokens);
  source("hit_gpu", s.measures.kv_on_host ? 0 : s.kept_tokens);
  source("hit_ram", s.measures.kv_on_host ? s.kept_tokens : 0);
  source("hit_nvme", s.fetched_tokens);
  list.counter("generation_tokens_total", "Tokens of answers", number(s.answer_tokens));
  list.histogram("inter_token_latency_seconds", "Between two tokens of an answer, in the step loop", kTokenGapSeconds,
                 s.token_gaps);
}

void add_kv(FamilyList& list, const EngineStats& s) {
  const double total = number(s.kv_tokens_total);
  list.gauge("kv_cache_used_tokens", "Tokens whose KV pages are taken", number(s.kv_tokens_used));
  list.gauge("kv_cache_capacity_tokens", "Tokens that the KV cache holds", total);
  list.gauge("kv_cache_usage_ratio", "Share of the KV cache that is taken",
             total > 0 ? number(s.kv_tokens_used) / total : 0);
  const PrefixCacheStats& p = s.prefix_cache;
  list.counter("prefix_cache_query_tokens_total", "Tokens of prompts that were looked up", number(s.admitted_tokens));
  list.counter("prefix_cache_hit_tokens_total", "Those of them that were found",
               number(s.kept_tokens + s.fetched_tokens));
  list.counter("prefix_cache_evictions_total", "Checkpoints that made room for others", number(p.evictions));
  list.gauge("prefix_cache_checkpoints", "Checkpoints of prompts that are kept", number(p.checkpoints));
  list.counter("nvme_read_bytes_total", "Read from the disk tier", number(p.disk.log.read_bytes), {{"purpose", "kv"}});
  list.counter("nvme_written_bytes_total", "Written to the disk tier", number(p.disk.log.saved_bytes),
               {{"purpose", "kv"}});
  list.counter("nvme_fetches_total", "Prefixes that were asked of the disk tier", number(p.fetches));
  list.counter("nvme_failed_fetches_total", "Those of them that it could not give", number(p.failed_fetches));
  list.counter("nvme_io_errors_total", "Reads and writes of the disk tier that failed", number(p.disk.log.io_errors));
  list.counter("nvme_skipped_items_total", "Not saved, as the queue to the disk was full",
               number(p.disk.skipped_items));
}

void add_steps(FamilyList& list, const EngineStats& s) {
  const StepMeasures& m = s.measures;
  list.histogram("step_seconds", "Steps", kStepSeconds, m.seconds);
  for (size_t i = 0; i < sched::kPhaseNames.size(); ++i)
    list.histogram("step_phase_seconds", "Phases of steps, of those that have and measure them; some run side by side",
                   kStepSeconds, m.phases[i], {{"phase", phase_label(sched::kPhaseNames[i])}});
  list.histogram("step_tokens", "Tokens of a step", kStepTokens, m.tokens);
  const char* const gap = "From the end of a step to the next: queue, with nothing to run; host, for the loop itself";
  list.counter("step_gap_seconds_total", gap, s.idle_seconds, {{"cause", "queue"}});
  list.counter("step_gap_seconds_total", gap, s.between_steps_seconds, {{"cause", "host"}});
  list.counter("step_failures_total", "Steps that failed", number(s.failed_steps));
  const auto forecast = [&](const char* name, const char* help, const sched::StepTime& time) {
    list.counter(name, help, time.total / 1e9, {{"phase", "all"}});
    for (size_t i = 0; i < sched::kPhaseNames.size(); ++i)
      list.counter(name, help, time.phases[i] / 1e9, {{"phase", phase_label(sched::kPhaseNames[i])}});
  };
  forecast("step_measured_seconds_total", "What steps took, where it was predicted", s.forecast.measured);
  forecast("step_predicted_seconds_total", "What the cost model said of the same steps", s.forecast.predicted);
  if (s.forecast.steps > 0 && s.forecast.predicted.total > 0)
    list.gauge("step_predicted_ratio", "Measured over predicted, of all steps so far",
               s.forecast.measured.total / s.forecast.predicted.total);
}

void add_experts(FamilyList& list, const EngineStats& s) {
  const char* const help = "(token, expert) pairs by who computed them, kind of step and part of the model";
  for (size_t place = 0; place < ExpertPairs::kPlaces.size(); ++place)
    for (size_t phase = 0; phase < ExpertPairs::kPhases.size(); ++phase)
      for (size_t group = 0; group < ExpertPairs::kGroups.size(); ++group)
        list.counter("expert_tokens_total", help, number(s.measures.experts.pairs[place][phase][group]),
                     {{"tier", ExpertPairs::kPlaces[place]},
                      {"phase", ExpertPairs::kPhases[phase]},
                      {"layer_group", ExpertPairs::kGroups[group]}});
  const int64_t resident = std::min(s.measures.resident_experts, s.experts.slots);
  const char* const slots = "Slots for experts on devices";
  list.gauge("expert_slots", slots, number(resident), {{"state", "resident"}});
  list.gauge("expert_slots", slots, number(s.experts.slots - resident), {{"state", "free"}});
  list.counter("expert_installs_total", "Experts brought into slots", number(s.experts.fills));
  list.counter("expert_evictions_total", "Experts taken out of slots", number(s.experts.evictions));
  list.counter("h2d_bytes_total", "Copied to devices", number(s.experts.fill_bytes), {{"purpose", "experts"}});
}

void add_memory(FamilyList& list, const Snapshot& now) {
  for (const MemoryTier& tier : now.tiers)
    for (const TierPart& part : tier.parts)
      list.gauge("tier_bytes", "What the server takes of a memory", number(part.bytes),
                 {{"tier", tier.name}, {"kind", part.kind}});
  for (const MemoryTier& tier : now.tiers)
    for (const TierPart& part : tier.parts)
      if (part.used_bytes)
        list.gauge("tier_used_bytes", "What of it a cache has in use", number(*part.used_bytes),
                   {{"tier", tier.name}, {"kind", part.kind}});
  for (const MemoryTier& tier : now.tiers)
    if (tier.capacity_bytes)
      list.gauge("tier_capacity_bytes", "What was free of a memory for the server", number(*tier.capacity_bytes),
                 {{"tier", tier.name}});
  const StepMeasures& m = now.stats.measures;
  const char* const read = "Read from host memory by steps: weights as counted, KV rows by the lengths of sequences";
  list.counter("read_bytes_total", read, number(m.weight_bytes), {{"kind", "weights"}});
  list.counter("read_bytes_total", read, number(m.kv_bytes), {{"kind", "kv"}});
  const auto node = [](int i) { return Labels{{"node", std::to_string(i)}}; };
  for (int i = 0; i < m.nodes; ++i)
    list.counter("numa_read_bytes_total", "Weights read, by the memory node they lie on",
                 number(m.node_bytes[static_cast<size_t>(i)]), node(i));
  list.counter("numa_remote_read_bytes_total", "Weights read by workers of another node", number(m.remote_bytes));
  const RateCounts& recent = now.stats.recent.counts;
  const double peak = now.stream_bytes_per_second.value_or(0);
  if (peak <= 0) return;
  // Over the time inside the calls that read weights.
  for (int i = 0; i < m.nodes; ++i)
    list.gauge("numa_bandwidth_share", "Of a node's measured read rate, while weights were read in the last 10 s",
               recent.weight_seconds > 0
                   ? number(recent.node_bytes[static_cast<size_t>(i)]) / recent.weight_seconds / (peak / m.nodes)
                   : 0,
               node(i));
  list.gauge("bandwidth_share", "Of the measured read rate, over the steps of the last 10 s",
             recent.step_seconds > 0 ? number(recent.read_bytes) / recent.step_seconds / peak : 0);
}

}  // namespace

prometheus::ClientMetric& FamilyList::add(const std::string& name, const std::string& help, prometheus::MetricType type,
                                          const Labels& labels) {
  const std::string full = "thermocline_" + name;
  if (families_.empty() || families_.back().name != full) families_.push_back({full, help, type, {}});
  prometheus::ClientMetric& metric = families_.back().metric.emplace_back();
  for (const auto& [label, value] : labels) metric.label.push_back({label, value});
  return metric;
}

void FamilyList::gauge(const std::string& name, const std::string& help, double value, const Labels& labels) {
  add(name, help, prometheus::MetricType::Gauge, labels).gauge.value = value;
}

void FamilyList::counter(const std::string& name, const std::string& help, double value, const Labels& labels) {
  add(name, help, prometheus::MetricType::Counter, labels).counter.value = value;
}

void FamilyList::histogram(const std::string& name, const std::string& help, const double* bounds,
                           const uint64_t* counts, size_t n, double sum, const Labels& labels) {
  prometheus::ClientMetric::Histogram& h = add(name, help, prometheus::MetricType::Histogram, labels).histogram;
  for (size_t i = 0; i <= n; ++i) {
    h.sample_count += counts[i];
    h.bucket.push_back({h.sample_count, i < n ? bounds[i] : std::numeric_limits<double>::infinity()});
  }
  h.sample_sum = sum;
}

MetricFamilies families_of(const Snapshot& now) {
  FamilyList list;
  add_server(list, now);
  add_requests(list, now);
  add_kv(list, now.stats);
  add_steps(list, now.stats);
  add_experts(list, now.stats);
  add_memory(list, now);
  return list.take();
}

}  // namespace thermocline::metrics
