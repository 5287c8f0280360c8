#include "runtime/server/api/metrics_endpoint.h"

#include <cstring>

namespace thermocline::server {
namespace {

metrics::EndedRequest::Outcome outcome_of(const AccessEntry& e, bool draining) {
  using enum metrics::EndedRequest::Outcome;
  if (e.finish == "cancelled") return abort_client;
  if (e.error == "queue_full") return rejected;  // at once, or after it has waited
  if (e.finish == "error") return draining && e.error == "unavailable" ? abort_shutdown : error;
  if (e.status >= 400) return e.status >= 500 && e.status != 503 ? error : rejected;
  if (e.finish == "length") return length;
  return e.finish == "tool_calls" ? tool : stop;
}

std::string text(Services& services) {
  const ServerState state = services.state();
  metrics::Snapshot now{.loaded = state.model ? 1 : state.loaded};
  for (const RequestBook::Active& request : services.book.active()) {
    now.preparing += std::strcmp(request.look.phase, "preparing") == 0;
    now.queued += std::strcmp(request.look.phase, "waiting") == 0;
  }
  if (state.model) {
    const Backend& backend = *state.model->backend;
    now.model = state.model->name;
    now.ready = !state.draining && backend.health().ok();
    now.stats = backend.stats();
    now.tiers = backend.memory_tiers(now.stats);
    now.stream_bytes_per_second = backend.stream_bytes_per_second();
  }
  return services.metrics.text(now);
}

}  // namespace

metrics::EndedRequest ended_request(const AccessEntry& e, bool draining) {
  return {.outcome = outcome_of(e, draining),
          .prompt_tokens = e.prompt_tokens,
          .completion_tokens = e.completion_tokens,
          .max_tokens = e.max_tokens,
          .choices = e.choices,
          .queue_seconds = e.queue_seconds,
          .prefill_seconds = e.prefill_seconds,
          .decode_seconds = e.decode_seconds,
          .total_seconds = e.total_seconds,
          .first_token_seconds = e.first_token_seconds};
}

std::vector<Endpoint> metrics_endpoints(Services& services) {
  return {{.method = "GET", .path = "/metrics", .model = false, .answer = [&services](const Call&) -> Outcome {
             return Reply{200, text(services), {{"Content-Type", "text/plain; version=0.0.4; charset=utf-8"}}};
           }}};
}

}  // namespace thermocline::server
