#include "runtime/metrics/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <chrono>
#include <mutex>

#include "runtime/metrics/energy.h"
#include "runtime/metrics/families.h"

namespace thermocline::metrics {
namespace {

using Bounds = prometheus::Histogram::BucketBoundaries;

// vLLM's, so that both can be compared; first tokens of long prompts take longer here.
const Bounds kFirstToken = {.001, .005, .01, .02, .04, .06, .08, .1,  .25, .5,  .75,  1,
                            2.5,  5,    7.5, 10,  20,  40,  80,  160, 320, 640, 1280, 2560};
const Bounds kLatency = {.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
const Bounds kPerToken = {.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80};
const Bounds kTokens = {1,    2,    5,     10,    20,    50,     100,    200,    500,    1000,
                        2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1000000};
const Bounds kChoices = {1, 2, 5, 10, 20};

constexpr std::array<const char*, 7> kOutcomes = {"stop",           "length", "tool",    "abort_client",
                                                  "abort_shutdown", "error",  "rejected"};

}  // namespace

struct Metrics::Impl {
  explicit Impl(const Options& o) : options(o), energy(o.powercap) {}

  prometheus::Histogram& histogram(const char* name, const char* help, const Bounds& bounds) {
    return prometheus::BuildHistogram()
        .Name(std::string("thermocline_") + name)
        .Help(help)
        .Register(registry)
        .Add({}, bounds);
  }
  prometheus::Family<prometheus::Counter>& counters(const char* name, const char* help) {
    return prometheus::BuildCounter().Name(std::string("thermocline_") + name).Help(help).Register(registry);
  }

  const Options options;
  const std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
  prometheus::Registry registry;
  prometheus::Histogram &first_token = histogram("time_to_first_token_seconds",
                                                 "From a request's arrival to its first token", kFirstToken),
                        &per_token = histogram("request_time_per_output_token_seconds",
                                               "Of a request, per token after its first", kPerToken),
                        &whole =
                            histogram("e2e_request_latency_seconds", "From a request's arrival to its end", kLatency),
                        &queue = histogram("request_queue_time_seconds", "Until it has a place in steps", kLatency),
                        &prefill = histogram("request_prefill_time_seconds", "From there to its first token", kLatency),
                        &decode =
                            histogram("request_decode_time_seconds", "From its first token to its last", kLatency),
                        &prompt = histogram("request_prompt_tokens", "Tokens of a request's prompts", kTokens),
                        &answer = histogram("request_generation_tokens", "Tokens of a request's answers", kTokens),
                        &most = histogram("request_max_num_generation_tokens",
                                          "What requests set as their most, where they do", kTokens),
                        &choices = histogram("request_params_n", "Answers a request asks for", kChoices);
  prometheus::Family<prometheus::Counter>&outcomes =
      counters("requests_total", "Requests for answers that have ended, by how"),
  &http = counters("http_requests_total", "HTTP requests that an endpoint answered");
  std::array<prometheus::Counter*, kOutcomes.size()> by_outcome{};
  std::mutex mutex;  // of what follows
  EnergyCounters energy;
};

Metrics::Metrics(const Options& options) : impl_(std::make_unique<Impl>(options)) {
  for (size_t i = 0; i < kOutcomes.size(); ++i)
    impl_->by_outcome[i] = &impl_->outcomes.Add({{"outcome", kOutcomes[i]}});
  http_answered("/metrics", 0);
}

Metrics::~Metrics() = default;

void Metrics::request_ended(const EndedRequest& r) {
  impl_->by_outcome[static_cast<size_t>(r.outcome)]->Increment();
  if (r.choices > 0) impl_->choices.Observe(r.choices);
  if (r.max_tokens >= 0) impl_->most.Observe(static_cast<double>(r.max_tokens));
  if (r.first_token_seconds > 0) impl_->first_token.Observe(r.first_token_seconds);
  using enum EndedRequest::Outcome;
  if (r.outcome != stop && r.outcome != length && r.outcome != tool) return;  // half an answer would make them shorter
  impl_->whole.Observe(r.total_seconds);
  impl_->queue.Observe(r.queue_seconds);
  impl_->prefill.Observe(r.prefill_seconds);
  impl_->decode.Observe(r.decode_seconds);
  impl_->prompt.Observe(static_cast<double>(r.prompt_tokens));
  impl_->answer.Observe(static_cast<double>(r.completion_tokens));
  const int64_t later = r.completion_tokens - std::max(1, r.choices);
  if (later > 0) impl_->per_token.Observe(r.decode_seconds / static_cast<double>(later) * std::max(1, r.choices));
}

// A status of 0 only makes the family known.
void Metrics::http_answered(const std::string& handler, int status) {
  impl_->http.Add({{"handler", handler}, {"status", std::to_string(status == 0 ? 200 : status)}})
      .Increment(status == 0 ? 0 : 1);
}

std::string Metrics::text(const Snapshot& now) {
  MetricFamilies families = families_of(now);
  FamilyList more;
  more.gauge("uptime_seconds", "Since the server began to listen",
             std::chrono::duration<double>(std::chrono::steady_clock::now() - impl_->start).count());
  {
    const std::lock_guard lock(impl_->mutex);
    for (const auto& [domain, joules] : impl_->energy.joules())
      more.counter("energy_joules_total", "What the processors used (RAPL)", joules, {{"domain", domain}});
  }
  for (MetricFamilies list : {more.take(), impl_->registry.Collect()})
    for (prometheus::MetricFamily& family : list) families.push_back(std::move(family));
  if (impl_->options.vllm_names)
    for (prometheus::MetricFamily& family : vllm_families(families, now.model)) families.push_back(std::move(family));
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace thermocline::metrics
