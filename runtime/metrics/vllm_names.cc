// vLLM's names for what we count too (spec: its three dashboards). Each family is ours under another name, so both
// always say the same.
#include <array>

#include "runtime/metrics/families.h"

namespace thermocline::metrics {
namespace {

constexpr std::array<std::pair<const char*, const char*>, 20> kNames = {{
    {"requests_running", "num_requests_running"},
    {"requests_waiting", "num_requests_waiting"},
    {"preemptions_total", "num_preemptions_total"},
    {"prompt_tokens_total", "prompt_tokens_total"},
    {"generation_tokens_total", "generation_tokens_total"},
    {"time_to_first_token_seconds", "time_to_first_token_seconds"},
    {"inter_token_latency_seconds", "inter_token_latency_seconds"},
    {"request_time_per_output_token_seconds", "request_time_per_output_token_seconds"},
    {"e2e_request_latency_seconds", "e2e_request_latency_seconds"},
    {"request_queue_time_seconds", "request_queue_time_seconds"},
    {"request_prefill_time_seconds", "request_prefill_time_seconds"},
    {"request_decode_time_seconds", "request_decode_time_seconds"},
    {"request_prompt_tokens", "request_prompt_tokens"},
    {"request_generation_tokens", "request_generation_tokens"},
    {"request_max_num_generation_tokens", "request_max_num_generation_tokens"},
    {"request_params_n", "request_params_n"},
    {"kv_cache_usage_ratio", "kv_cache_usage_perc"},  // a share there too, whatever its name says
    {"step_tokens", "iteration_tokens_total"},        // a histogram there too
    {"prefix_cache_query_tokens_total", "prefix_cache_queries_total"},
    {"prefix_cache_hit_tokens_total", "prefix_cache_hits_total"},
}};

std::string value_of(const prometheus::ClientMetric& metric, const std::string& label) {
  for (const auto& [name, value] : metric.label)
    if (name == label) return value;
  return "";
}

// Our finer outcomes by theirs.
const char* finished_reason(const std::string& outcome) {
  if (outcome == "stop" || outcome == "tool") return "stop";
  if (outcome == "length") return "length";
  if (outcome == "error") return "error";
  return outcome.starts_with("abort") ? "abort" : nullptr;  // refused requests never began there
}

prometheus::MetricFamily request_success(const prometheus::MetricFamily& ours, const std::string& model) {
  prometheus::MetricFamily theirs{"vllm:request_success_total", ours.help, ours.type, {}};
  for (const char* const reason : {"stop", "length", "abort", "error"}) {
    prometheus::ClientMetric& sum = theirs.metric.emplace_back();
    sum.label = {{"model_name", model}, {"finished_reason", reason}};
    for (const prometheus::ClientMetric& metric : ours.metric)
      if (const char* const is = finished_reason(value_of(metric, "outcome")); is && is == std::string_view(reason))
        sum.counter.value += metric.counter.value;
  }
  return theirs;
}

// One series: reasons to wait are summed up.
prometheus::MetricFamily renamed(const prometheus::MetricFamily& ours, const std::string& name,
                                 const std::string& model) {
  prometheus::MetricFamily theirs{"vllm:" + name, ours.help, ours.type, {}};
  for (const prometheus::ClientMetric& metric : ours.metric) {
    if (theirs.metric.empty()) {
      theirs.metric.push_back(metric);
      theirs.metric.back().label = {{"model_name", model}};
    } else {
      theirs.metric.back().gauge.value += metric.gauge.value;
    }
  }
  return theirs;
}

}  // namespace

MetricFamilies vllm_families(const MetricFamilies& ours, const std::string& model) {
  MetricFamilies theirs;
  for (const prometheus::MetricFamily& family : ours) {
    const std::string name = family.name.substr(sizeof("thermocline_") - 1);
    for (const auto& [our_name, their_name] : kNames)
      if (our_name == name) theirs.push_back(renamed(family, their_name, model));
    if (name == "requests_total") theirs.push_back(request_success(family, model));
  }
  return theirs;
}

}  // namespace thermocline::metrics
