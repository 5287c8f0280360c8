#include "runtime/server/api/cache.h"

namespace thermocline::server {
namespace {

Reply cache_stats(const ServedModel& model) {
  const EngineStats s = model.backend->stats();
  const PrefixCacheStats& c = s.prefix_cache;
  return {200,
          dump_json(Json{
              {"checkpoints", c.checkpoints},
              {"checkpoint_bytes", c.checkpoint_bytes},
              {"cached_pages", c.cached_pages},
              {"lookups", c.lookups},
              {"hits", c.hits},
              {"hit_rate", c.lookups > 0 ? Json(static_cast<double>(c.hits) / static_cast<double>(c.lookups)) : Json()},
              {"saved_tokens", c.saved_tokens},
              {"evictions", c.evictions},
              {"disk_fetches", c.fetches},
              {"disk_fetched_tokens", c.fetched_tokens},
              {"disk_failed_fetches", c.failed_fetches},
              {"kv_tokens_used", s.kv_tokens_used},
              {"kv_tokens_total", s.kv_tokens_total}})};
}

// The step thread does it, between two steps.
Outcome flush(Services& services, Call call) {
  Backend& backend = *call.model->backend;
  const auto late = std::make_shared<LateReply>(services, std::move(call));
  backend.flush_prefix_cache([late](const PrefixCacheFlush& flushed) {
    late->finish({200, dump_json(Json{{"checkpoints", flushed.checkpoints},
                                      {"checkpoint_bytes", flushed.checkpoint_bytes},
                                      {"pages", flushed.pages},
                                      {"page_bytes", flushed.page_bytes}})});
  });
  return std::static_pointer_cast<Exchange>(late);
}

}  // namespace

std::vector<Endpoint> cache_endpoints(Services& services) {
  using enum Endpoint::Access;
  return {
      {.method = "GET",
       .path = "/v1/cache/stats",
       .access = admin,
       .answer = [](const Call& call) -> Outcome { return cache_stats(*call.model); }},
      {.method = "POST", .path = "/v1/cache/flush", .access = admin, .json = false, .answer = [&services](Call call) {
         return flush(services, std::move(call));
       }}};
}

}  // namespace thermocline::server
