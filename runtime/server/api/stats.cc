#include "runtime/server/api/stats.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime/base/statistics.h"
#include "runtime/server/api/generation.h"

namespace thermocline::server {
namespace {

// Three digits behind the point are enough for whoever reads milliseconds.
double milliseconds(double seconds) { return std::round(seconds * 1e6) / 1e3; }
Json known(double value, bool is) { return is ? Json(value) : Json(nullptr); }
double share(int64_t part, int64_t whole) { return static_cast<double>(part) / static_cast<double>(whole); }

void add_state(const ServerState& state, Json& out) {
  const EngineHealth health = state.model ? state.model->backend->health() : EngineHealth();
  const bool failed = health.state == EngineHealth::State::failed;
  out["state"] = failed ? "failed" : state.draining || !health.ok() ? "draining" : state.model ? "ready" : "loading";
  out["reason"] = health.reason;
  if (!state.model) out["progress"] = state.loaded;
}

double tpot_seconds(const AccessEntry& entry) {
  return entry.completion_tokens > 1 ? entry.decode_seconds / static_cast<double>(entry.completion_tokens - 1) : 0;
}

Json active_json(const RequestBook::Active& request) {
  const char* const phase = std::strcmp(request.look.phase, "preparing") == 0 ? "waiting" : request.look.phase;
  return {{"id", request.id},
          {"path", request.path},
          {"phase", phase},
          {"prompt_tokens", request.look.prompt_tokens},
          {"cached_tokens", request.look.cached_tokens},
          {"completion_tokens", request.look.completion_tokens},
          {"seconds", request.seconds}};
}

Json recent_json(const RequestBook::Recent& recent) {
  const AccessEntry& e = recent.entry;
  const double age = std::chrono::duration<double>(RequestBook::Clock::now() - recent.at).count();
  return {{"id", e.id},
          {"path", e.path},
          {"status", e.status},
          {"finish", e.finish},
          {"error", e.error},
          {"prompt_tokens", e.prompt_tokens},
          {"cached_tokens", e.cached_tokens},
          {"completion_tokens", e.completion_tokens},
          {"queue_ms", milliseconds(e.queue_seconds)},
          {"ttft_ms", known(milliseconds(e.first_token_seconds), e.first_token_seconds > 0)},
          {"tpot_ms", known(milliseconds(tpot_seconds(e)), tpot_seconds(e) > 0)},
          {"total_ms", milliseconds(e.total_seconds)},
          {"age_seconds", age}};
}

Json quantiles(const std::vector<double>& seconds) {
  return {{"p50", known(seconds.empty() ? 0 : milliseconds(percentile(seconds, 50)), !seconds.empty())},
          {"p95", known(seconds.empty() ? 0 : milliseconds(percentile(seconds, 95)), !seconds.empty())}};
}

void add_requests(const Services& services, const ApiClient& client, const EngineStats& s, Json& out) {
  const auto shown = [&](const std::string& key) { return services.shows(client, key); };
  Json active = Json::array(), ended = Json::array();
  for (const RequestBook::Active& request : services.book.active())
    if (shown(request.key)) active.push_back(active_json(request));
  std::vector<double> first, per_token;
  for (const RequestBook::Recent& recent : services.book.recent()) {
    if (recent.entry.first_token_seconds > 0) first.push_back(recent.entry.first_token_seconds);
    if (tpot_seconds(recent.entry) > 0) per_token.push_back(tpot_seconds(recent.entry));
    if (shown(recent.entry.key)) ended.push_back(recent_json(recent));
  }
  out["requests"] = {
      {"running", s.running}, {"waiting", s.waiting}, {"active", std::move(active)}, {"recent", std::move(ended)}};
  out["latency"] = {{"ttft_ms", quantiles(first)}, {"tpot_ms", quantiles(per_token)}};
}

Json tokens_json(const EngineStats& s) {
  const int64_t cached = s.kept_tokens + s.fetched_tokens;
  return {{"prompt_total", s.prompt_tokens + cached},
          {"cached_total", cached},
          {"answer_total", s.answer_tokens},
          {"prompt_per_second", s.recent.per_second(static_cast<double>(s.recent.counts.prompt_tokens))},
          {"answer_per_second", s.recent.per_second(static_cast<double>(s.recent.counts.answer_tokens))}};
}

Json kv_json(const EngineStats& s) {
  const int64_t cached = s.kept_tokens + s.fetched_tokens;
  return {{"tokens_used", s.kv_tokens_used},
          {"tokens_total", s.kv_tokens_total},
          {"prefix_cached_tokens", s.prefix_cache.cached_pages * kPageTokens},
          {"hit_rate", s.admitted_tokens > 0 ? Json(share(cached, s.admitted_tokens)) : Json(nullptr)}};
}

Json tiers_json(const std::vector<MemoryTier>& tiers) {
  Json out = Json::array();
  for (const MemoryTier& tier : tiers) {
    Json parts = Json::array();
    for (const TierPart& part : tier.parts) {
      parts.push_back({{"kind", part.kind}, {"bytes", part.bytes}});
      if (part.used_bytes) parts.back()["used_bytes"] = *part.used_bytes;
    }
    out.push_back({{"tier", tier.name},
                   {"capacity_bytes", tier.capacity_bytes ? Json(*tier.capacity_bytes) : Json(nullptr)},
                   {"parts", std::move(parts)}});
  }
  return out;
}

Json experts_json(const EngineStats& s) {
  int64_t by_place[2] = {0, 0};
  for (size_t place = 0; place < 2; ++place)
    for (const auto& groups : s.measures.experts.pairs[place])
      for (const int64_t pairs : groups) by_place[place] += pairs;
  const int64_t all = by_place[0] + by_place[1];
  return {{"hit_rate", s.experts.slots > 0 && all > 0 ? Json(share(by_place[0], all)) : Json(nullptr)},
          {"gpu", by_place[0]},
          {"cpu", by_place[1]},
          {"slots", std::min(s.measures.resident_experts, s.experts.slots)},
          {"slots_total", s.experts.slots},
          {"installs_total", s.experts.fills}};
}

// Of the time inside steps: an idle server reads nothing, and does not read slowly.
Json speed_json(const EngineStats& s, std::optional<double> stream) {
  const RateCounts& recent = s.recent.counts;
  const double rate = recent.step_seconds > 0 ? static_cast<double>(recent.read_bytes) / recent.step_seconds : 0;
  const bool measured = stream && *stream > 0;
  return {{"read_bytes_per_second", rate},
          {"stream_bytes_per_second", known(stream.value_or(0), measured)},
          {"share", known(measured ? rate / *stream : 0, measured)},
          {"busy", std::min(1.0, s.recent.per_second(recent.step_seconds))}};
}

Json forecast_json(const ForecastStats& f) {
  Json phases = Json::array();
  for (size_t i = 0; i < sched::kPhaseNames.size(); ++i)
    if (f.measured.phases[i] > 0)
      phases.push_back({{"phase", sched::kPhaseNames[i]},
                        {"measured_seconds", f.measured.phases[i] / 1e9},
                        {"predicted_seconds", f.predicted.phases[i] / 1e9}});
  return {{"steps", f.steps},
          {"measured_seconds", f.measured.total / 1e9},
          {"predicted_seconds", f.predicted.total / 1e9},
          {"phases", std::move(phases)}};
}

/// Twice a second, until the client goes or the server drains.
class StatsStream : public Exchange, public Ticker::Sleeper {
 public:
  StatsStream(Services& services, Call call)
      : services_(services), client_(std::move(call.client)), entry_(call.http.head) {
    entry_.key = client_.name;
  }

  void tick() override {
    due_ = true;
    ready();
  }
  Output take() override {
    Output out;
    out.finished = services_.state().draining;
    if (due_.exchange(false) || out.finished) out.bytes = event_of(stats_json(services_, client_));
    return out;
  }
  bool streams() const override { return true; }
  void cancel() override {}
  bool ended() const override { return services_.state().draining; }
  Output abort(const Error&) override { return {event_of(stats_json(services_, client_)), {}, true}; }
  void closed(bool complete, int status) override {
    entry_.complete = complete;
    entry_.status = status;
    services_.book.ended(entry_);
  }

 private:
  Services& services_;
  const ApiClient client_;
  AccessEntry entry_;
  std::atomic<bool> due_{true};
};

Outcome answer(Services& services, Call call) {
  const auto stream = call.query.find("stream");
  if (stream == call.query.end() || stream->second == "0" || stream->second == "false")
    return Reply{200, dump_json(stats_json(services, call.client))};
  const auto exchange = std::make_shared<StatsStream>(services, std::move(call));
  services.ticker.add(std::weak_ptr<Ticker::Sleeper>(exchange));
  return std::static_pointer_cast<Exchange>(exchange);
}

}  // namespace

Json stats_json(const Services& services, const ApiClient& client) {
  const ServerState state = services.state();
  const Backend* const backend = state.model ? state.model->backend : nullptr;
  const EngineStats s = backend ? backend->stats() : EngineStats();
  Json out = {{"model", state.model ? state.model->name : ""},
              {"version", TC_VERSION},
              {"uptime_seconds", state.uptime_seconds}};
  add_state(state, out);
  add_requests(services, client, s, out);
  out["tokens"] = tokens_json(s);
  out["kv"] = kv_json(s);
  out["tiers"] = tiers_json(backend ? backend->memory_tiers(s) : std::vector<MemoryTier>());
  out["experts"] = experts_json(s);
  out["speed"] = speed_json(s, backend ? backend->stream_bytes_per_second() : std::nullopt);
  out["forecast"] = forecast_json(s.forecast);
  return out;
}

std::vector<Endpoint> stats_endpoints(Services& services) {
  return {{.method = "GET", .path = "/v1/stats", .model = false, .answer = [&services](Call call) -> Outcome {
             return answer(services, std::move(call));
           }}};
}

}  // namespace thermocline::server
